"""``foveate motion``: does a video model decide by appearance, by motion, or by both?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import (
    dry_run_option,
    emit,
    find_device,
    json_option,
    model_options,
    open_from_options,
    say,
    table,
)
from foveate.errors import SampleError, UsageError

if TYPE_CHECKING:
    from foveate.data.manifest import Manifest
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource
    from foveate.stats.intervals import Interval
    from foveate.study.motion import MotionReport, ScaleReport
    from foveate.study.motion_subject import Settings

CLIPS_PER_DRAW = 6
"""Changed clips a draw: three coalitions and their shams."""


@click.command("motion")
@click.argument("model", metavar="MODEL|RUN")
@click.argument("clips", nargs=-1, type=click.Path(path_type=Path), metavar="[CLIPS]...")
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), help="JSON file of the whole result."
)
@click.option("--figure", type=click.Path(path_type=Path, dir_okay=False), help="PNG, SVG or PDF of the effects.")
@click.option(
    "--appearance",
    default="neutral",
    show_default=True,
    type=click.Choice(["neutral", "scrambled", "advected"]),
    help="How appearance is removed: grey under masks, scrambled pixels, noise on the optical flow.",
)
@click.option(
    "--motion",
    "by",
    default="freeze",
    show_default=True,
    type=click.Choice(["freeze", "shuffle"]),
    help="How motion is removed: one frame repeated, frames in random order.",
)
@click.option("--draws", default=4, show_default=True, help="Frozen frames, orders and shams a clip.")
@click.option("--target", metavar="CLASS", help="Class that is scored.  [default: what the model answers]")
@click.option("--target-kind", default="default", show_default=True, help="See `foveate inspect MODEL`.")
@click.option("--truth", metavar="COLUMN", help="Column of the table of clips whose value is the class.")
@click.option("--object", "track", type=int, metavar="ROW", help="Row of a tracker.  [default: all it answers]")
@click.option("--margin", default=0.1, show_default=True, help="Share of the total effect that counts as none.")
@click.option("--confidence", default=0.95, show_default=True, help="Of intervals over videos.")
@click.option("--at-most", type=click.IntRange(min=1), metavar="N", help="The first N clips only.")
@click.option("--batch-size", default=8, show_default=True, help="Changed clips run together.")
@click.option("--edges/--no-edges", default=True, help="Also cut attention between frames.")
@click.option("--seed", default=0, show_default=True, help="Of orders, shams, cuts and intervals.")
@model_options
@dry_run_option
@json_option
def command(
    model: str,
    clips: tuple[Path, ...],
    out: Path | None,
    figure: Path | None,
    at_most: int | None,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Test what a video model decides by, on CLIPS or on the clips of a RUN.

    Each clip is shown without its motion, without its appearance and without both, beside shams that change as
    much and no cue. Shapley values over videos give the verdict: appearance, motion, both (additive), both
    (interaction), redundant, or inconclusive. CLIPS are videos, folders of frames, or a table with the columns
    path, mask, label. Exit code 5 where some clips could not be used.
    """
    from foveate.study.motion import loads_of, run_motion
    from foveate.temporal.verdict import Rule

    settings = _settings(given)
    rule = Rule(margin=given.pop("margin"), confidence=given.pop("confidence"), seed=settings.removal.seed)
    source, subjects = _inputs(model, clips, given)
    if dry_run:
        _show_cost(len(loads_of(subjects)[:at_most]), settings, as_json)
        return
    progress = None if as_json else (lambda done, total: say(f"{done} of {total} clips"))
    report = run_motion(source, subjects, settings, rule, at_most=at_most, progress=progress)
    if out is not None:
        _write(report, out)
    if figure is not None:
        from foveate.study.motion_figure import draw_motion

        say(f"wrote {draw_motion(report, figure)}")
    if as_json:
        emit(report.to_dict())
    else:
        click.echo(describe(report), nl=False)
    for name, reason in report.failed.items():
        say(f"failed: {name}: {reason}")
    if report.failed:
        click.get_current_context().exit(SampleError.exit_code)


def _settings(given: dict[str, Any]) -> Settings:
    """Takes its own options out of ``given``; those of the model stay."""
    from foveate.interfaces import Target
    from foveate.study.motion_subject import Settings
    from foveate.temporal.coalitions import Removal

    removal = Removal(given.pop("appearance"), given.pop("by"), given.pop("draws"), seed=given.pop("seed"))
    label, truth, track = given.pop("target"), given.pop("truth"), given.pop("track")
    if label is not None and truth is not None:
        raise UsageError("motion: --target and --truth both name the class", remedy="give one of them")
    target = Target(given.pop("target_kind"), label=label, object=track)
    return Settings(removal, target, truth, max(1, given.pop("batch_size")), given.pop("edges"))


def _inputs(
    model: str, clips: tuple[Path, ...], options: dict[str, Any]
) -> tuple[AttentionSource, Manifest | Run]:
    """The source and what it is tested on: a run's own model and clips, or those that are given."""
    from foveate.data.manifest import Manifest

    if not _is_run(model):
        if not clips:
            raise UsageError("motion: no clips given", remedy="foveate motion MODEL videos/ (or a RUN alone)")
        return open_from_options(model, **options), Manifest.discover(clips, media="clip")
    from foveate.data.run import Run

    run = Run.open(model)
    device = options.get("device", "cpu")
    source = run.open_source(**({"device": find_device(device)} if device != "cpu" else {}))
    return source, Manifest.discover(clips, media="clip") if clips else run


def _is_run(model: str) -> bool:
    return Path(model).is_dir() and (Path(model) / "zarr.json").is_file()


def _show_cost(count: int, settings: Settings, as_json: bool) -> None:
    each = CLIPS_PER_DRAW * settings.removal.draws + 2 + (5 if settings.edges else 0)
    if as_json:
        emit({"dry_run": True, "clips": count, "forwards": count * each, "forwards_per_clip": each})
        return
    click.echo(f"{count} clips, at most {each} forwards each: {count * each:,} in all")
    say("nothing was written")


def _write(report: MotionReport, out: Path) -> None:
    import json

    from foveate.cli._common import _plain

    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_plain(report.to_dict()), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    say(f"wrote {out}")


# ------------------------------------------------------------------------------------------- in words


def describe(report: MotionReport) -> str:
    """The report as a person reads it."""
    head = report.scales[0]
    verdict = head.verdict
    detail = f", {verdict.detail}" if verdict.detail else ""
    lines = [
        f"{report.model}: {verdict.answer}{detail}  ({verdict.n} videos, {head.scale})",
        f"  {verdict.why}",
        "",
        table(_score_rows(head), ("CLIP", "SCORE", "INTERVAL", "SHAM COSTS")),
        "",
        table([(name.replace("_", " "), *_cells(one)) for name, one in verdict.intervals.items()], EFFECT),
    ]
    if head.cuts:
        rows = [(f"cut edges: {name}", *_cells(one)) for name, one in head.cuts.items()]
        lines += ["", table(rows, ("KNOCKOUT", "COSTS", "INTERVAL"))]
    if report.lost:
        kept = [(SHOWN.get(name, name), f"{one.estimate:.0%}") for name, one in report.lost.items()]
        lines += ["", table(kept, ("CLIP", "IDENTITY LOST"))]
    others = [f"{one.scale}: {one.verdict.answer}" for one in report.scales[1:]]
    classes = [f"{label}: {one.answer}" for label, one in report.by_label.items()]
    lines += [f"\nother scales: {', '.join(others)}"] if others else []
    lines += [f"\nby class: {', '.join(classes)}"] if classes else []
    lines += ["", *(f"- {sentence}" for sentence in report.caveats)]
    return "\n".join(lines) + "\n"


EFFECT = ("EFFECT", "MEAN", "INTERVAL")
SHOWN = {"both": "intact", "appearance": "no motion", "motion": "no appearance", "none": "neither"}


def _score_rows(head: ScaleReport) -> list[tuple[Any, ...]]:
    return [
        (words, *_cells(head.coalitions[name]), f"{head.sham_cost[name].estimate:.3f}" if name != "both" else "")
        for name, words in SHOWN.items()
    ] + [("reversed", f"{head.coalitions['both'].estimate + head.reversed.estimate:.3f}", "", "")]


def _cells(one: Interval) -> tuple[str, str]:
    interval = "-" if one.low != one.low else f"{one.low:.3f} to {one.high:.3f}"
    return f"{one.estimate:.3f}", interval
