"""``foveate plot``: pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from foveate.cli._common import emit, json_option, say, table
from foveate.errors import UsageError

REPEATED = ("metric", "method")


@click.command("plot")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--kind", help="Which picture; see --list.  [default: triptych; of clips strip]")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="PNG, SVG or PDF.  [default: KIND.png]")
@click.option("--sample", help="Position or id of one sample.")
@click.option("--site", help="Where attention is taken from; the first with rows by default.")
@click.option("--layer", type=int, help="True layer number; -1 is the last one kept.")
@click.option("--head", help="Head number, or mean.")
@click.option("--query", type=int, help="Which kept row.")
@click.option("--track", help="Track of a clip: its row, and its outline alone.")
@click.option("--method", multiple=True, help="Stored attribution map(s) instead of attention.")
@click.option("--metric", multiple=True, help="Metric(s) of a distribution.")
@click.option("--by", help="Column to group by, or statistic whose extremes are shown.")
@click.option("--count", type=int, help="How many samples on a page.")
@click.option("--seed", type=int, help="Seed of a random choice.")
@click.option(
    "--scale", default="lift", show_default=True, help="lift (times uniform), linear, signed or per-image."
)
@click.option("--list", "as_list", is_flag=True, help="List the kinds of picture and stop.")
@json_option
def command(
    run: Path | None, kind: str | None, out: Path | None, scale: str, as_list: bool, as_json: bool, **options: Any
) -> None:
    """Draw a picture of RUN, a folder written by `foveate capture`."""
    if as_list:
        _list(as_json)
        return
    if run is None:
        raise UsageError("which run?", remedy="foveate plot RUN.zarr --kind triptych; kinds: foveate plot --list")
    from foveate.data.run import Run
    from foveate.plugins.manager import plugin_manager

    opened = Run.open(run)
    kind = kind or ("strip" if opened.media == "clip" else "triptych")
    renderer = plugin_manager().spec("renderer", kind).create()
    path = renderer.render(opened, out=out or Path(f"{kind}.png"), scale=scale, **_given(kind, options))
    if as_json:
        emit({"kind": kind, "out": str(path), "bytes": path.stat().st_size})
    else:
        click.echo(path)


def _given(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options that were set, in the form that renderers take."""
    given = {name: value for name, value in options.items() if value not in (None, ())}
    for name in REPEATED:
        if name in given and kind not in ("methods", "distributions"):
            if len(given[name]) > 1:
                raise UsageError(f"--{name} can be given once for {kind}")
            given[name] = given[name][0]
    if "head" in given and given["head"] != "mean":
        if not given["head"].isdigit():
            raise UsageError(f"--head {given['head']}: expected a number or mean")
        given["head"] = int(given["head"])
    return given


def _list(as_json: bool) -> None:
    from foveate.plugins.manager import plugin_manager

    specs = plugin_manager().specs("renderer")
    if as_json:
        emit({"kinds": [{"name": spec.name, "summary": spec.summary} for spec in specs]})
        return
    click.echo(table([(spec.name, spec.summary) for spec in specs], ("kind", "draws")))
    say("foveate plot RUN --kind KIND -o picture.png")
