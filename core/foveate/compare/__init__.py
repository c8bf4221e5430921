"""Two models on the same images: a common canvas, agreement beyond chance, and reasons for no score."""
