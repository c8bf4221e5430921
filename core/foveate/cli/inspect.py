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
    card, clip = seen["card"], seen["media"] == "clip"
    head = [
        ("model", f"{card['id']} ({card['source']}, {seen['parameters'] / 1e6:.2f} M parameters)"),
        ("weights", card["weights_sha256"] or "no hash given"),
        ("revision", card["revision"] or "none given"),
        ("licence", card["licence"]),
        ("input", " x ".join(map(str, seen["input"])) + f"  ({'frame, ' if clip else ''}channel, y, x)"),
        ("grid", _cells(seen)),
        ("crop", f"{seen['visible']:.0%} of a 4:3 {'frame' if clip else 'picture'} reaches the model"),
        ("targets", ", ".join(seen["targets"])),
        *seen["facts"].items(),
        *(("note", note) for note in card["notes"]),
    ]
    width = max(len(str(name)) for name, _ in head)
    lines = [f"{str(name).ljust(width)}  {value}" for name, value in head]
    columns = ("site", "kind", "layers", "heads", "query tokens", "key tokens", "read out by")
    return "\n".join([*lines, "", table([_row(site) for site in seen["sites"]], columns)])


def _cells(seen: dict[str, Any]) -> str:
    if not seen["grid"]:
        return "none: not a picture"
    spatial = " x ".join(map(str, seen["grid"]))
    frames = seen["frame_cells"]
    return f"{spatial} cells" if not frames else f"{frames} frame cells of {spatial} cells"


def _row(site: dict[str, Any]) -> tuple[str, ...]:
    return (
        site["id"],
        site["kind"],
        _ranges(site["layers"]),
        str(site["heads"]),
        _per_group(site["group"]) + _count(site["query"]),
        _count(site["key"]),
        site["readout"] or "-",
    )


def _per_group(group: dict[str, int]) -> str:
    """For attention that stays within frames, places or windows: how many there are."""
    return "".join(f"{size} {name}s x " for name, size in group.items())


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
