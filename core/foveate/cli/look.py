"""``foveate look``: one picture or clip, its answer, its map, its caveats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from foveate.cli._common import emit, json_option, model_options, open_from_options, say
from foveate.errors import UsageError


@click.command("look")
@click.argument("model")
@click.argument("image", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="PNG, SVG or PDF.  [default: look.png]")
@click.option("--layer", type=int, default=-1, show_default=True, help="True layer number; -1 is the last.")
@click.option("--head", default="mean", show_default=True, help="Head number, or mean.")
@click.option("--target", help="Class (or prompt) to test instead of the answer.")
@click.option("--object", type=int, metavar="QUERY", help="Object of a detector.  [default: the surest]")
@click.option("--scale", default="lift", show_default=True, help="lift (times uniform), linear or per-image.")
@click.option("--check/--no-check", default=True, help="Delete cells in the map's order, where that is quick.")
@model_options
@json_option
def command(
    model: str,
    image: Path,
    out: Path | None,
    layer: int,
    head: str,
    target: str | None,
    object: int | None,
    scale: str,
    check: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Show what MODEL answers for IMAGE and what the row behind the answer attends to.

    For a model of clips IMAGE is a video, a folder of frames or an animated image. Models that compare pictures
    with text take their classes from --prompts.
    """
    if head != "mean" and not head.isdigit():
        raise UsageError(f"--head {head}: expected a number or mean")
    from foveate.study.look import look

    source = open_from_options(model, **options)
    seen = look(
        source, image, target=target, object=object, layer=layer, head="mean" if head == "mean" else int(head),
        scale=scale, check=check,
    )  # fmt: skip
    path = seen.save(out or Path("look.png"))
    if as_json:
        emit({**seen.summary(), "out": str(path)})
    else:
        click.echo(seen)
        click.echo(path)
        say(f"{seen.seconds:.1f} s after the model was open")
