"""``foveate inspect``: open a model and say where it attends and where its answer is read from."""

from __future__ import annotations

from typing import Any

import click

from foveate.cli._common import emit, json_option, model_options, open_from_options, table


@click.command("inspect")
@click.argument("model")
@model_options
@json_option
def command(model: str, as_json: bool, **options: Any) -> None:
    """Open MODEL and show its sites, grid, readout and targets.

    MODEL is an id of `foveate models`, a folder with a config.json, or a hub id.
    """
    from foveate.plugins.inspection import inspect_source

    seen = inspect_source(open_from_options(model, **options))
    if as_json:
        emit(seen)
    else:
        click.echo(_in_words(seen))


def _in_words(seen: dict[str, Any]) -> str:
    card = seen["card"]
    head = [
        ("model", f"{card['id']} ({card['source']}, {seen['parameters'] / 1e6:.2f} M parameters)"),
        ("weights", card["weights_sha256"] or "no hash given"),
        ("revision", card["revision"] or "none given"),
        ("licence", card["licence"]),
        ("input", " x ".join(map(str, seen["input"])) + "  (channel, y, x)"),
        ("grid", " x ".join(map(str, seen["grid"])) + " cells" if seen["grid"] else "none: not a picture"),
        ("crop", f"{seen['visible']:.0%} of a 4:3 picture reaches the model"),
        ("targets", ", ".join(seen["targets"])),
        *seen["facts"].items(),
        *(("note", note) for note in card["notes"]),
    ]
    width = max(len(str(name)) for name, _ in head)
    lines = [f"{str(name).ljust(width)}  {value}" for name, value in head]
    columns = ("site", "kind", "layers", "heads", "query tokens", "key tokens", "read out by")
    return "\n".join([*lines, "", table([_row(site) for site in seen["sites"]], columns)])


def _row(site: dict[str, Any]) -> tuple[str, ...]:
    return (
        site["id"],
        site["kind"],
        _ranges(site["layers"]),
        str(site["heads"]),
        _count(site["query"]),
        _count(site["key"]),
        site["readout"] or "-",
    )


def _count(tokens: dict[str, int]) -> str:
    parts = " + ".join(f"{number} {kind}" for kind, number in tokens.items())
    return f"{sum(tokens.values())} ({parts})"


def _ranges(layers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
