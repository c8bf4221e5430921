"""``foveate demo``: the whole job, offline, on a small trained model that ships with foveate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from foveate.cli._common import emit, json_option, say
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.study.story import StoryReport


@click.command("demo")
@click.argument("subject", type=click.Choice(["vit", "detr", "video"]), default="vit")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Folder.  [default: demo, demo-detr, demo-video, demo-real]",
)
@click.option(
    "--images", type=int, help="Held-out pictures or clips, with masks.  [default: 100; detr: 30; video: 12]"
)
@click.option("--steps", type=int, help="Of deletion and insertion.  [default: 8; detr: 18]")
@click.option("--model", help="Show this model on photographs instead: a folder, a registry id or a hub id.")
@json_option
def command(
    subject: str, out: Path | None, images: int | None, steps: int | None, model: str | None, as_json: bool
) -> None:
    """Capture, measure, explain and test a small trained model on pictures whose evidence is known.

    SUBJECT is vit (a classifier, the default), detr (a detector: every object is explained by itself, and
    explanations compete with the object's own box) or video (a segmenter of clips: explanations compete with the
    track's own mask, and each class is tested for what tells it: appearance, motion or both).

    Writes pictures, runs, tables, figures and the leaderboard into a folder, and says what they show. Every
    step is printed as the command that does it again. The same call continues a demo that was cut off.
    """
    given = {name: value for name, value in (("images", images), ("steps", steps)) if value is not None}
    if subject != "vit" and model is not None:
        raise UsageError("--model shows a classifier on photographs", remedy="foveate demo --model MODEL")
    if subject == "video":
        from foveate.study.demo_video import run_video_demo

        named = {"clips" if name == "images" else name: value for name, value in given.items()}
        video = run_video_demo(out or Path("demo-video"), **named, say=say)
        _tell(video, as_json)
        return
    if subject == "detr":
        from foveate.study.demo_detr import run_detector_demo

        report = run_detector_demo(out or Path("demo-detr"), **given, say=say)
    elif model is None:
        from foveate.study.demo import run_demo

        report = run_demo(out or Path("demo"), **given, say=say)
    else:
        from foveate.study.demo_photos import run_photo_demo

        report = run_photo_demo(model, out or Path("demo-real"), say=say)
    _tell(report, as_json)


def _tell(report: StoryReport, as_json: bool) -> None:
    if as_json:
        emit(report.to_dict())
    else:
        click.echo(report.to_text(), nl=False)
