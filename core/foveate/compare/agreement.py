"""Do two models look at the same things? Agreement per image beyond the cross-image null, or a reason why not.

Unit: the image. Three measures on the common cells: Spearman correlation of densities, overlap of the top
tenth, Jensen-Shannon divergence of the two maps as distributions. Two models that always look at the middle
agree on every image; that is what the null (same method, maps of different images) takes away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.compare.canvas import Meeting, meet
from foveate.errors import UsageError
from foveate.stats.agreement import JS_DIVERGENCE, SPEARMAN, TOP_OVERLAP, Agreement, agreement
from foveate.stats.intervals import Interval, bootstrap_mean
from foveate.stats.paired import Comparison, compare_family

if TYPE_CHECKING:
    from foveate.compare.maps import MapRule, MapSet

Verdict = Literal["beyond chance", "below chance", "inconclusive", "no interval"]
_VERDICTS: dict[str, Verdict] = {
    "better": "beyond chance",
    "worse": "below chance",
    "inconclusive": "inconclusive",
    "no interval": "no interval",
}


@dataclass(frozen=True, eq=False)
class Measured:
    """One measure over all images: ``own`` and ``null`` means with intervals, and the test of the excess.

    ``per_image`` holds the numbers behind it. ``excess`` is positive where maps of the same image are closer
    than maps of different images, whichever way the measure runs.
    """

    own: Interval
    null: Interval
    excess: Comparison
    per_image: Agreement

    @property
    def verdict(self) -> Verdict:
        """Whether the models agree on images beyond what their habits share."""
        return _VERDICTS[self.excess.verdict]


@dataclass(frozen=True, eq=False)
class Result:
    """Two models compared on ``kept`` images (positions within the matched ones), or ``reasons`` why not."""

    models: tuple[str, str]
    rule: MapRule
    reasons: tuple[str, ...]
    kept: tuple[int, ...] = ()
    meeting: Meeting | None = None
    measures: Mapping[str, Measured] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def compare(a: MapSet, b: MapSet, *, seed: int = 0) -> Result:
    """Compare two models' maps of the same images; row i of one belongs to row i of the other.

    Images on which the two explain different answers are left out and counted. Where method, layer or head
    rule, kind of target or options differ, or nothing is left, there is no score and ``reasons`` says why.
    """
    if len(a) != len(b):
        raise UsageError(f"compare: {len(a)} maps and {len(b)} maps; rows must be the same images")
    models, reasons = (a.model, b.model), tuple(a.rule.differences(b.rule))
    if reasons:
        return Result(models, a.rule, reasons)
    kept, notes = _comparable(a, b)
    if not kept:
        return Result(models, a.rule, notes or ("no image in common",), notes=notes)
    one, other = a.take(kept), b.take(kept)
    meeting = meet(one, other)
    blind = [i for i in range(len(kept)) if not np.isfinite(meeting.a[i] + meeting.b[i]).any()]
    if len(blind) == len(kept):
        return Result(models, a.rule, ("on no image did both models see a common part",), notes=notes)
    return Result(models, a.rule, (), kept, meeting, _measured(meeting, a.rule.signed, seed), notes)


def _comparable(a: MapSet, b: MapSet) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Images on which both sides have a map of the same answer, and notes on the others."""
    there = [i for i in range(len(a)) if np.isfinite(a.values[i]).any() and np.isfinite(b.values[i]).any()]
    same = [i for i in there if a.labels[i] == b.labels[i]]
    notes = []
    if len(there) < len(a):
        notes.append(f"{len(a) - len(there)} images left out: no map on one side")
    if len(same) < len(there):
        notes.append(f"{len(there) - len(same)} images left out: the models explain different answers")
    return tuple(same), tuple(notes)


def _measured(meeting: Meeting, signed: bool, seed: int) -> dict[str, Measured]:
    """Every measure that is defined: signed maps are no distributions, so they have no divergence."""
    chosen = (SPEARMAN, TOP_OVERLAP) if signed else (SPEARMAN, TOP_OVERLAP, JS_DIVERGENCE)
    found = {measure.name: agreement(meeting.a, meeting.b, measure, seed=seed) for measure in chosen}
    tests = compare_family({name: one.excess for name, one in found.items()}, lower_is_better=False, seed=seed)
    return {
        name: Measured(
            own=bootstrap_mean(one.own, seed=seed),
            null=bootstrap_mean(one.null, seed=seed),
            excess=tests[name],
            per_image=one,
        )
        for name, one in found.items()
    }
