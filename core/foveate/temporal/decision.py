"""When a clip's answer is decided, and which frames it rests on.

Attention on early frames does not say that the answer was decided early. Two quantities do: the **decision
time**, the first prefix of the clip from which on the predicted label never changes again, and the score that is
lost when a frame is taken away. Both depend on what stands in for the missing frames (nothing, a frozen frame, a
mean frame), which is part of the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.intervals import Interval, bootstrap_mean
from foveate.stats.ranks import descending

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PHASES = ("early", "middle", "late")


def decision_time(labels: ArrayLike) -> NDArray[np.int64]:
    """Prefix lengths ``(video,)`` from which the label never changes again.

    ``labels`` ``(video, prefix)`` are integers: the label predicted from the first 1, 2, ... frames, -1 for no
    answer. 1 where the first frame already decides; the last prefix always agrees with itself.
    """
    table = np.asarray(labels)
    if table.ndim != 2 or table.shape[1] < 1 or table.dtype.kind not in "iu":
        raise UsageError(
            f"decision_time: expected integer labels (video, prefix), got {table.dtype} {table.shape}"
        )
    same = table == table[:, -1:]
    steady = np.cumprod(same[:, ::-1], axis=1).sum(axis=1)
    return np.asarray(table.shape[1] - steady + 1, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class FrameCurve:
    """Scores while frames go, in the order of an importance.

    ``curve (video, step)``: the score with 0, 1, ... frames removed; ``area (video,)``: mean of the curve by the
    trapezoid rule over the share removed; ``order (video, frame)``: frames, most important first.
    """

    order: NDArray[np.intp]
    curve: NDArray[np.float64]

    @property
    def area(self) -> NDArray[np.float64]:
        """Area under each curve over the share of frames removed, from 0 to 1."""
        from scipy.integrate import trapezoid

        steps = self.curve.shape[1] - 1
        return np.asarray(trapezoid(self.curve, dx=1.0 / max(1, steps), axis=1))


def removal_order(importance: ArrayLike, *, seed: int = 0) -> NDArray[np.intp]:
    """Frames ``(video, frame)`` from the most important; ties in seeded random order, unknown frames last."""
    table = np.asarray(importance, np.float64)
    if table.ndim != 2:
        raise UsageError(f"removal_order: expected importance (video, frame), got {table.shape}")
    return descending(table, np.random.default_rng(seed).random(table.shape))


def phase_mass(importance: ArrayLike) -> NDArray[np.float64]:
    """Share of each third of the clip in a non-negative importance ``(video, frame)``: ``(video, phase)``.

    A frame that lies across a border counts in both thirds by its share, so that clips of any length compare; an
    even importance gives thirds. NaN frames do not count; a clip without any importance is NaN.
    """
    table = np.asarray(importance, np.float64)
    if table.ndim != 2 or (table < 0).any():
        raise UsageError(f"phase_mass: expected a non-negative importance (video, frame), got {table.shape}")
    frames, phases = table.shape[1], len(PHASES)
    edges = np.linspace(0, frames, phases + 1)
    place = np.arange(frames)
    overlap = np.clip(
        np.minimum(edges[1:, None], place + 1) - np.maximum(edges[:-1, None], place), 0.0, None
    )  # (phase, frame), in frames
    filled = np.nan_to_num(table, nan=0.0)
    total = filled.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(total > 0, filled @ overlap.T / total, np.nan))


@dataclass(frozen=True)
class Phases:
    """Shares of the thirds over videos, and the verdict: early, middle, late, even or inconclusive."""

    early: Interval
    middle: Interval
    late: Interval
    verdict: str


def phases(importance: ArrayLike, *, margin: float = 0.1, seed: int = 0) -> Phases:
    """Where in time an importance ``(video, frame)`` lies, over videos.

    A third is the verdict where its whole interval lies above 1/3 and above the other two estimates; *even* where
    all three intervals lie within ``margin`` of 1/3; otherwise *inconclusive*. Intervals are not corrected for
    being three.
    """
    shares = phase_mass(importance)
    spans = [bootstrap_mean(column, seed=seed) for column in shares.T]
    even = all(span.low >= 1 / 3 - margin and span.high <= 1 / 3 + margin for span in spans)
    best = int(np.argmax([span.estimate for span in spans])) if len(shares) else 0
    ahead = spans[best].low > max([1 / 3, *(span.estimate for i, span in enumerate(spans) if i != best)])
    verdict = "even" if even else PHASES[best] if ahead else "inconclusive"
    early, middle, late = spans
    return Phases(early, middle, late, verdict)
