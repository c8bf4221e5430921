"""What the video demonstration found, in words and as plain data, whichever way it falls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.study.story import StoryReport
from foveate.testing.swimming import CELLS, CLASSES, TOLD_BY, answer

if TYPE_CHECKING:
    from foveate.study.faithfulness import FaithfulnessReport
    from foveate.study.motion import MotionReport
    from foveate.temporal.verdict import Verdict

EXPECTED = {"look": "appearance", "motion": "motion", "look and motion": "both (interaction)"}
"""The verdict that a class deserves, by what tells it in the data."""
SHOWN = {"none": "no cue", "appearance": "look alone", "motion": "motion alone", "both": "both"}


def told(label: str) -> tuple[float, float, float, float]:
    """What clips of a class tell of it by Bayes' rule: with no cue, look alone, motion alone, both."""
    index, cells = CLASSES.index(label), CELLS[label]
    looks = np.mean([answer(look, None)[index] for look, _ in cells])
    motions = np.mean([answer(None, motion)[index] for _, motion in cells])
    return float(answer(None, None)[index]), float(looks), float(motions), 1.0


@dataclass(frozen=True)
class TrackScore:
    """One shape: its class, how well its track fits (IoU over the whole clip), and whether it is named right."""

    label: str
    iou: float
    named: bool


@dataclass
class VideoReport(StoryReport):
    """The story of the clips. ``boards`` holds a leaderboard for each unit that vanishes at once."""

    tracks: list[TrackScore] = field(default_factory=list)
    boards: dict[str, FaithfulnessReport] = field(default_factory=dict)
    motion: MotionReport | None = None
    real: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> Mapping[str, Verdict]:
        """By class, in the order of the classes."""
        found = {} if self.motion is None else self.motion.by_label
        return {label: found[label] for label in CLASSES if label in found}

    @property
    def as_built(self) -> int:
        """Classes whose verdict is what the data was built to deserve."""
        return sum(one.answer == EXPECTED[TOLD_BY[label]] for label, one in self.verdicts.items())

    def to_text(self) -> str:
        """Tracks, leaderboards, verdicts class by class, what was left out, and where to look next."""
        lines = ["", *self._track_lines(), ""]
        for unit, board in self.boards.items():
            lines += [f"Explanations, {unit} vanishing at once:", board.to_text()]
        lines += [*self._motion_lines(), ""]
        lines += [*self.findings, *(f"{name}: {said}" for name, said in self.real.items())]
        lines += [f"left out: {reason}" for reason in self.left_out]
        lines += [f"{len(self.files)} files in {self.folder}:", *(f"  {path}" for path in self.files)]
        lines += [f"{sum(self.seconds.values()):.0f} s in all. Next: foveate motion {self.model} CLIPS"]
        return "\n".join(lines) + "\n"

    def _track_lines(self) -> list[str]:
        if not self.tracks:
            return []
        lines = [f"Tracks on {self.captured} held-out clips, {len(self.tracks)} shapes:"]
        for told_by in EXPECTED:
            some = [one for one in self.tracks if TOLD_BY[one.label] == told_by]
            if some:
                iou, named = np.mean([one.iou for one in some]), np.mean([one.named for one in some])
                lines += [f"  told by {told_by:16} n={len(some):3}  IoU {iou:.2f}  named right {named:.1%}"]
        return lines

    def _motion_lines(self) -> list[str]:
        """One line a class: what tells it in the data, and what the test says that the model decides by."""
        if self.motion is None:
            return []
        lines = ["Appearance, motion or both? What the data was built with, and what the test says of the model:"]
        for label, one in self.verdicts.items():
            expected = EXPECTED[TOLD_BY[label]]
            missed = "undecided" if one.answer == "inconclusive" else "NOT as built"
            mark = "as built" if one.answer == expected else f"{missed} (built: {expected})"
            effects = ", ".join(
                f"{name} {one.intervals[name].estimate:+.2f}" for name in ("appearance", "motion", "interaction")
            )
            lines += [f"  {label:8} told by {TOLD_BY[label]:16} -> {one.answer:19} n={one.n:2}  {effects}  {mark}"]
            lines += [f"           {self._shown(label)}"]
            lines += [f"           {one.why}"] if one.answer == "inconclusive" else []
        few = [label for label in CLASSES if label not in self.verdicts]
        if few:
            lines += [f"  too few clips for a verdict: {', '.join(few)}"]
        undecided = sum(one.answer == "inconclusive" for one in self.verdicts.values())
        total = f"{self.as_built} of {len(self.verdicts)} classes as built, {undecided} undecided"
        return [*lines, f"  {total}; {self._mass_line()}"]

    def _shown(self, label: str) -> str:
        """Mean probability of the class under each set of cues, before the correction, beside Bayes' rule."""
        assert self.motion is not None
        scale = self.motion.scales[0].scale
        clips = [clip.scores[scale] for clip in self.motion.clips if clip.label == label]
        pairs = [
            f"{words} {np.mean([scores[name] for scores in clips]):.2f} ({known:.2f})"
            for (name, words), known in zip(SHOWN.items(), told(label), strict=True)
        ]
        return "probability (and what the clip tells) with " + ", ".join(pairs)

    def _mass_line(self) -> str:
        assert self.motion is not None
        mass = self.motion.mass.estimate
        if not np.isfinite(mass):
            return "no attention between frames"
        return (
            f"the rule of thumb by attention mass on other frames ({mass:.2f}, uniform {self.motion.uniform:.2f}) "
            f'calls all of them "{self.motion.mass_rule}"'
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {
            **super().to_dict(),
            "tracks": [{"label": one.label, "iou": one.iou, "named": one.named} for one in self.tracks],
            "boards": {unit: board.to_dict() for unit, board in self.boards.items()},
            "motion": None if self.motion is None else self.motion.to_dict(),
            "verdicts": {
                label: {"verdict": one.answer, "told_by": TOLD_BY[label], "expected": EXPECTED[TOLD_BY[label]]}
                for label, one in self.verdicts.items()
            },
            "as_built": self.as_built,
            "real": self.real,
            "findings": self.findings,
            "left_out": self.left_out,
        }
