"""``foveate analyse``: what a detector's queries, layers and heads do, or attention over a clip's frames."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli._common import device_option, emit, find_device, json_option, say, table
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.study.detection import Line, Report

HEADER = ("SITE", "LAYER", "HEAD", "N", "MEAN", "95 % INTERVAL", "BASELINE", "IS", "DIFFERS")


@click.command("analyse")
@click.argument("run", required=False, metavar="[RUN]")
@click.option("--list", "list_analyses", is_flag=True, help="Show the analyses and stop.")
@click.option("--analysis", "names", multiple=True, metavar="NAME", help="Repeat for several; default all.")
@click.option(
    "--truth", type=click.Path(dir_okay=False, exists=True), help="JSON of true objects: label, box, mask of each."
)
@click.option("--at-most", type=click.IntRange(min=1), metavar="N", help="The first N samples only.")
@click.option(
    "-o", "--output", type=click.Path(file_okay=False), help="Folder for lines.csv, values.csv, figures."
)
@click.option("--seed", default=0, show_default=True, help="Of permutations, shifts and intervals.")
@device_option
@json_option
def command(
    run: str | None,
    list_analyses: bool,
    names: tuple[str, ...],
    truth: str | None,
    at_most: int | None,
    output: str | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Analyse RUN of a detector or of clips, captured with --rows all.

    The unit is the image or the video: MEAN is over N of them with a 95 % bootstrap interval. DIFFERS says whether
    the paired difference to the baseline excludes 0 (or p <= 0.05 of a permutation test; "untested" below eight
    images or videos); lines are not corrected for their number. Analyses that RUN cannot give are left out with
    the reason, on stderr. Findings are kept in RUN as analyses/ANALYSIS, arrays over time as temporal/ANALYSIS.
    """
    if list_analyses:
        _list(as_json)
        return
    if run is None:
        raise UsageError("analyse: no run given", remedy="foveate analyse RUN.zarr, or foveate analyse --list")
    report = _analyse(run, names, truth, at_most, output, seed, device, quiet=as_json)
    for name, why in report.left_out.items():
        say(f"left out: {name} ({why})")
    if as_json:
        lines = [{**asdict(line), "verdict": line.verdict} for line in report.lines]
        files = [str(file) for file in report.files]
        told = {"run": run, "lines": lines, "left_out": report.left_out, "files": files}
        emit(told | {"products": report.products})
    else:
        _print(report)


def _analyse(
    run: str,
    names: tuple[str, ...],
    truth: str | None,
    at_most: int | None,
    output: str | None,
    seed: int,
    device: str,
    *,
    quiet: bool,
) -> Report:
    from foveate.data.run import Run
    from foveate.study.detection import analyse_run
    from foveate.study.detection_subject import Subject
    from foveate.study.temporal import analyse_clips
    from foveate.study.temporal_subject import ClipSubject

    overrides = {"device": find_device(device)} if device != "cpu" else {}
    opened, true_objects = Run.open(run), Path(truth) if truth else None
    progress = None if quiet else (lambda name: say(f"{name} ..."))
    folder = Path(output) if output else None
    if opened.media == "clip":
        clips = ClipSubject(opened, at_most, seed, overrides)
        if true_objects is not None:
            raise UsageError(
                "--truth is for runs of images; true masks of clips are a column of the manifest",
                remedy="leave --truth out, and capture with a manifest that has the column mask",
            )
        return analyse_clips(clips, names or None, out=folder, seed=seed, progress=progress)
    subject = Subject(opened, true_objects, at_most, seed, overrides)
    return analyse_run(subject, names or None, out=folder, seed=seed, progress=progress)


def _list(as_json: bool) -> None:
    from foveate.study.detection import ANALYSES as OF_DETECTORS
    from foveate.study.temporal import ANALYSES as OF_CLIPS

    listed = [
        {"name": a.name, "of": of, "needs": a.needs, "summary": a.summary}
        for of, analyses in (("detectors", OF_DETECTORS), ("clips", OF_CLIPS))
        for a in analyses.values()
    ]
    if as_json:
        emit({"analyses": listed})
    else:
        rows = [tuple(entry[key] for key in ("name", "of", "needs", "summary")) for entry in listed]
        click.echo(table(rows, ("ANALYSIS", "OF", "NEEDS", "QUESTION")))


def _print(report: Report) -> None:
    """A block a quantity, so that its lines stand below each other."""
    blocks: dict[tuple[str, str, str], list[Line]] = {}
    for line in report.lines:
        blocks.setdefault((line.analysis, line.quantity, line.unit), []).append(line)
    last = ""
    for (analysis, quantity, unit), lines in blocks.items():
        if analysis != last:
            click.echo(f"\n== {analysis}")
        last = analysis
        click.echo(f"\n{quantity} [{unit}]")
        click.echo(table([_row(line) for line in lines], HEADER))
    for file in report.files:
        say(f"wrote {file}")
    for product in report.products:
        say(f"in the run: {product}")


def _row(line: Line) -> tuple[Any, ...]:
    interval = "-" if line.low != line.low else f"{_number(line.low)} to {_number(line.high)}"
    p = f" (p = {line.p:.3g})" if line.p == line.p else ""
    place = tuple("-" if part in (None, "") else part for part in (line.site, line.layer, line.head))
    ends = (_number(line.baseline), line.baseline_is or "-", f"{line.verdict or '-'}{p}")
    return (*place, line.n, _number(line.mean), interval, *ends)


def _number(value: float) -> str:
    return "-" if value != value else "0" if abs(value) < 1e-9 else f"{value:.3g}"
