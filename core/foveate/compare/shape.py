"""How concentrated each model's maps are, in numbers that do not depend on how many cells there are.

A row over 576 keys has more entropy than one over 49 whatever the model does, so nothing here is in nats or
keys: entropy over ln K, lift over uniform, Hoyer's sparseness. Each map is measured on its own grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.metrics.concentration import Top10Lift
from foveate.metrics.entropy import EntropyNormalised
from foveate.metrics.sparsity import Hoyer
from foveate.stats.intervals import Interval, bootstrap_mean
from foveate.stats.paired import Comparison, compare_family

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.compare.maps import MapSet

STATISTICS = (EntropyNormalised, Top10Lift, Hoyer)
"""K-free by construction: 0 to 1, or multiples of uniform."""

Higher = Literal["a", "b", "inconclusive", "no interval"]
_HIGHER: dict[str, Higher] = {"better": "a", "worse": "b"}


@dataclass(frozen=True)
class ShapeRow:
    """One statistic on both sides; ``difference`` is a - b, paired by image."""

    name: str
    summary: str
    a: Interval
    b: Interval
    difference: Comparison

    @property
    def higher(self) -> Higher:
        """Which side is higher, if the interval and the corrected test say so."""
        verdict = self.difference.verdict
        return _HIGHER.get(verdict, "no interval" if verdict == "no interval" else "inconclusive")


def compare_shapes(a: MapSet, b: MapSet, *, seed: int = 0) -> list[ShapeRow]:
    """Every statistic of non-negative maps of the same images; none for signed maps."""
    if a.rule.signed or b.rule.signed:
        return []
    one, other = shape_statistics(a), shape_statistics(b)
    tests = compare_family({name: one[name] - other[name] for name in one}, lower_is_better=False, seed=seed)
    return [
        ShapeRow(
            statistic.info.name,
            statistic.info.summary,
            bootstrap_mean(one[statistic.info.name], seed=seed),
            bootstrap_mean(other[statistic.info.name], seed=seed),
            tests[statistic.info.name],
        )
        for statistic in STATISTICS
    ]


def shape_statistics(maps: MapSet) -> dict[str, NDArray[np.float64]]:
    """Each statistic of each map over its cells, ``(image,)``."""
    rows = maps.values.reshape(len(maps), 1, -1)  # (image, query, key)
    return {
        statistic.info.name: np.asarray(statistic().kernel(rows), dtype=np.float64)[:, 0]
        for statistic in STATISTICS
    }
