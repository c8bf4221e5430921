"""The job behind ``foveate analyse`` on runs of clips: analyses over time, each number with its baseline.

An analysis gives findings (one number a clip beside that of no preference), arrays for the run
(``temporal/<analysis>``) and figures. Findings become lines as for detectors (:mod:`foveate.study.detection`), but
the unit is the video: windows of one recording are averaged first. Below :data:`FEWEST` videos nothing is said to
differ, because bootstrap intervals over so few are too narrow (measured in :mod:`foveate.temporal.verdict`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from foveate.errors import FoveateError, UsageError
from foveate.stats.known import mean_known
from foveate.study.detection import Finding, Line, Report, line_of, written
from foveate.study.temporal_subject import ClipSubject, Outcome
from foveate.temporal.verdict import FEWEST

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class VideoLine(Line):
    """A line over videos; with fewer than :data:`FEWEST` its difference is ``untested``."""

    @property
    def verdict(self) -> str:
        """``above``, ``below``, ``no``, ``untested``, or empty without a baseline."""
        told = super().verdict
        return "untested" if told and self.n < FEWEST else told


@dataclass(frozen=True)
class Analysis:
    """One entry of the list: what it answers, what it needs (rows, tracks, model), where it is."""

    name: str
    summary: str
    needs: str
    target: str

    def load(self) -> Callable[[ClipSubject], Outcome]:
        """Import the function."""
        module, name = self.target.split(":")
        function: Callable[[ClipSubject], Outcome] = getattr(import_module(f"foveate.study.{module}"), name)
        return function


_LIST: tuple[tuple[str, str, str, str], ...] = (
    (
        "frames",
        "how much of a frame's attention lies on other frames, and how far",
        "rows",
        "temporal_frames:frames",
    ),
    (
        "consistency",
        "do maps of consecutive frames agree more than maps of other videos",
        "rows",
        "temporal_consistency:agree",
    ),
    (
        "moving",
        "does the map lie on what moves, more than elsewhere and than the centre",
        "rows, masks",
        "temporal_moving:on_what_moves",
    ),
    ("importance", "which third of the clip the answer reads", "rows", "temporal_importance:importance"),
    (
        "deletion",
        "does the score fall when the most important frames freeze",
        "rows, model",
        "temporal_importance:deletion",
    ),
    ("decision", "from which frame on the answer stays", "model", "temporal_decision:decision"),
    (
        "evolution",
        "how maps change over frames, where they jump, how much they flicker",
        "rows",
        "temporal_evolution:evolution",
    ),
    ("identity", "do tracks read the query that becomes their mask", "model", "temporal_identity:identity"),
    (
        "recurrence",
        "how much of a track was made in earlier frames, beside the untrained twin",
        "model",
        "temporal_identity:recurrence",
    ),
)
ANALYSES: dict[str, Analysis] = {row[0]: Analysis(*row) for row in _LIST}
"""Name -> analysis, in the order in which they run."""


def analyse_clips(
    subject: ClipSubject,
    names: Sequence[str] | None = None,
    *,
    out: Path | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run analyses (default: all that can) on a run of clips, and store their arrays in the run.

    What a run cannot give is left out with its reason; asked for by name, that is an error. ``out``: folder for
    ``lines.csv``, ``values.csv`` (per clip), ``left_out.csv`` and figures. Raises UsageError for an unknown name.
    """
    lines: list[Line] = []
    left_out: dict[str, str] = {}
    rows: list[dict[str, Any]] = []
    files: list[Path] = []
    for analysis in _chosen(names):
        if progress:
            progress(analysis.name)
        try:
            outcome = analysis.load()(subject)
        except FoveateError as error:
            if names:
                raise
            left_out[analysis.name] = error.message.splitlines()[0]
            continue
        found = [finding for finding in outcome.findings if np.isfinite(finding.values).any()]
        lines += [video_line(analysis.name, finding, subject.videos, seed=seed) for finding in found]
        rows += [row for finding in found for row in _rows(analysis.name, finding, subject)]
        left_out |= {f"{analysis.name}, {part}": why for part, why in outcome.left_out.items()}
        files += _kept(subject, outcome, out)
    report = Report(subject.run.path, lines, left_out, pd.DataFrame(rows))
    if out is None:
        return report
    told = written(report, out)
    return replace(told, files=[*told.files, *files])


def video_line(analysis: str, finding: Finding, videos: Sequence[str], *, seed: int = 0) -> VideoLine:
    """A finding of clips as one line over videos: clips of one video are averaged first."""
    line = line_of(analysis, finding if finding.whole else by_video(finding, videos), seed=seed)
    return VideoLine(**{field.name: getattr(line, field.name) for field in fields(line)})


def by_video(finding: Finding, videos: Sequence[str]) -> Finding:
    """The same finding with one value a video, over those clips that have a value (and a baseline, if any do)."""
    base = np.broadcast_to(np.asarray(finding.baseline, np.float64), finding.values.shape)
    names = list(dict.fromkeys(videos))
    number = np.array([names.index(video) for video in videos])

    def pooled(table: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.array([mean_known(table[number == i]) for i in range(len(names))], np.float64)

    both = np.isfinite(base) if np.isfinite(base).any() else np.ones(base.shape, bool)
    values = np.where(both, finding.values, np.nan)
    return replace(
        finding, values=pooled(values), baseline=pooled(np.where(np.isfinite(finding.values), base, np.nan))
    )


def _chosen(names: Sequence[str] | None) -> list[Analysis]:
    unknown = [name for name in names or () if name not in ANALYSES]
    if unknown:
        raise UsageError(f"no analysis {unknown[0]!r} of clips", remedy=f"one of {', '.join(ANALYSES)}")
    return [ANALYSES[name] for name in dict.fromkeys(names or ANALYSES)]


def _kept(subject: ClipSubject, outcome: Outcome, out: Path | None) -> list[Path]:
    """Arrays into the run, figures into the folder."""
    settings = {
        "seed": subject.seed,
        "clips": len(subject),
        "unit": "sample; windows of one video are not independent",
    }
    for name, table in outcome.products.items():
        subject.run.write_product(name, table, settings)
    if out is None:
        return []
    out.mkdir(parents=True, exist_ok=True)
    return [picture.save(out / f"{name}.png") for name, picture in outcome.figures.items()]


def _rows(analysis: str, finding: Finding, subject: ClipSubject) -> list[dict[str, Any]]:
    base = np.broadcast_to(np.asarray(finding.baseline, np.float64), finding.values.shape)
    place = {"site": finding.site, "layer": finding.layer, "head": finding.head}
    named = [("", "(all clips)")] if finding.whole else list(zip(subject.videos, subject.ids, strict=True))
    return [
        {"analysis": analysis, "quantity": finding.quantity, **place, "video": video, "sample": name, "value": v}
        | {"baseline": b}
        for (video, name), v, b in zip(named, finding.values, base, strict=True)
    ]
