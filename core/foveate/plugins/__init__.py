"""Finding plugins and models: metadata first, light declarations next, heavy classes only when used."""
