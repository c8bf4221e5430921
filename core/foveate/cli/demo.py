"""``foveate demo``: the whole job, offline, on a small trained model that ships with foveate."""

from __future__ import annotations

from pathlib import Path

import click

from foveate.cli._common import emit, json_option, say


@click.command("demo")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder.  [default: demo, or demo-real]")
@click.option("--images", type=int, default=100, show_default=True, help="Held-out pictures with masks.")
@click.option("--steps", type=int, default=8, show_default=True, help="Of deletion and insertion.")
@click.option("--model", help="Show this model on photographs instead: a folder, a registry id or a hub id.")
@json_option
def command(out: Path | None, images: int, steps: int, model: str | None, as_json: bool) -> None:
    """Capture, measure, explain and test a small trained model on pictures whose evidence is known.

    Writes pictures, runs, tables, figures and the leaderboard into a folder, and says what they show. Every
    step is printed as the command that does it again. The same call continues a demo that was cut off.
    """
    if model is None:
        from foveate.study.demo import run_demo

        report = run_demo(out or Path("demo"), images=images, steps=steps, say=say)
    else:
        from foveate.study.demo_photos import run_photo_demo

        report = run_photo_demo(model, out or Path("demo-real"), say=say)
    if as_json:
        emit(report.to_dict())
    else:
        click.echo(report.to_text(), nl=False)
