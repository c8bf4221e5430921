"""``foveate video RUN``: a clip with its tracks and a map, as a video that browsers play."""

from __future__ import annotations

from pathlib import Path

import click

from foveate.cli._common import dry_run_option, emit, json_option, say


@click.command("video")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="MP4 or WebP.  [default: SAMPLE.mp4]")
@click.option("--sample", help="Position or id of the clip.  [default: the first]")
@click.option("--track", help="Show this track alone, and its map.  [default: all tracks, the best one's map]")
@click.option("--site", help="Where attention is taken from.  [default: the first cross-attention over patches]")
@click.option("--layer", type=int, default=-1, show_default=True, help="True layer number; -1 is the last kept.")
@click.option("--head", default="mean", show_default=True, help="Head number, or mean.")
@click.option("--method", help="A stored attribution in place of attention.")
@click.option("--no-map", is_flag=True, help="Tracks alone.")
@click.option("--least", type=float, default=0.0, show_default=True, help="Leave out tracks below this score.")
@click.option("--scale", default="lift", show_default=True, help="lift (times uniform), linear or signed.")
@click.option("--fps", type=float, help="Frames a second.  [default: the clip's own]")
@click.option("--size", type=int, default=640, show_default=True, help="Pixels of the longer side, at most.")
@dry_run_option
@json_option
def command(
    run: Path,
    out: Path | None,
    sample: str | None,
    track: str | None,
    site: str | None,
    layer: int,
    head: str,
    method: str | None,
    no_map: bool,
    least: float,
    scale: str,
    fps: float | None,
    size: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Draw a clip of RUN, frame by frame: outlines of the tracks, a map on one scale over the whole clip.

    A map is the attention row of the track (of the readout where the run keeps no other), or a stored
    attribution. The file plays in browsers: H.264, even sizes, constant frame rate.
    """
    from foveate.data.run import Run
    from foveate.study.video import VideoPlan, draw_video

    plan = VideoPlan(
        sample=sample, track=track, site=site, layer=layer, head=head, method=method, with_map=not no_map,
        least=least, scale=scale, fps=fps, size=size,
    )  # fmt: skip
    drawn = draw_video(Run.open(run), plan, out, dry_run=dry_run)
    if as_json:
        emit(drawn.to_dict())
        return
    click.echo(drawn.path)
    say(drawn.to_text())
