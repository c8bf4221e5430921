"""The picture of a motion test: Shapley values of appearance and motion, their interaction, the verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foveate.render.clip_time import cues

if TYPE_CHECKING:
    from foveate.study.motion import MotionReport

SHOWN = ("appearance", "motion", "interaction", "total")


def draw_motion(report: MotionReport, out: Path) -> Path:
    """Draw a report to PNG, SVG or PDF: all videos together, then class by class, on the headline scale.

    Other scales have other units; their verdicts stand in the caption.
    """
    head, *others = report.scales
    verdicts = {"all": head.verdict, **report.by_label}
    effects = {name: {part: one.intervals[part] for part in SHOWN} for name, one in verdicts.items()}
    answers = {name: one.answer for name, one in verdicts.items()}
    removal = report.settings.removal.record()
    source = f"{report.model} · removal: " + ", ".join(f"{name} {value}" for name, value in removal.items())
    level = f"intervals at {report.rule.confidence:.0%} over videos, margin {report.rule.margin:g} of the total"
    told = "".join(f" · on the {other.scale}, all together: {other.verdict.answer}" for other in others)
    title = f"{report.model}: appearance, motion or both ({head.scale})"
    return cues(effects, answers, title=title, source=f"{source} · {level}{told}").save(out)
