"""Paired comparison of one number an image: interval, Wilcoxon signed-rank, Holm, effect sizes, a verdict.

The verdict needs two witnesses: the bootstrap interval of the mean difference excludes 0, and the
Wilcoxon test survives Holm's correction over its family. Otherwise it is "inconclusive", which is a
result, not an error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.stats.intervals import Interval, bootstrap_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

Verdict = Literal["better", "worse", "inconclusive", "no interval"]


@dataclass(frozen=True)
class Comparison:
    """What one paired comparison says.

    ``difference`` is the mean of (this - reference) with its interval; ``p`` the two-sided Wilcoxon p,
    ``p_holm`` after correction over the family; ``superiority`` the share of images on which this one is
    better (ties half); ``rank_biserial`` in [-1, 1], positive when this one is better.
    """

    difference: Interval
    p: float
    p_holm: float
    superiority: float
    rank_biserial: float
    verdict: Verdict


def compare_family(
    differences: Mapping[str, ArrayLike],
    *,
    lower_is_better: bool,
    alpha: float = 0.05,
    resamples: int = 4000,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Compare each member's paired ``differences`` (image,) with 0; Holm's correction over all members."""
    singles = {
        name: _single(values, lower_is_better, 1.0 - alpha, resamples, seed)
        for name, values in differences.items()
    }
    adjusted = holm([one.p for one in singles.values()])
    corrected = {
        name: replace(one, p_holm=float(p)) for (name, one), p in zip(singles.items(), adjusted, strict=True)
    }
    return {name: replace(one, verdict=_verdict(one, lower_is_better, alpha)) for name, one in corrected.items()}


def wilcoxon_p(differences: ArrayLike) -> float:
    """Two-sided Wilcoxon signed-rank p (Wilcoxon 1945; zeros by Pratt 1959). NaN below 2 images, 1 if all 0."""
    from scipy.stats import wilcoxon

    values = _finite(differences)
    if values.size < 2:
        return float("nan")
    if not np.any(values):
        return 1.0
    return float(wilcoxon(values, zero_method="pratt").pvalue)


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    """Holm's step-down adjusted p (Holm, Scand. J. Stat. 6, 1979). NaN stays NaN and does not count."""
    p = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.arange(order.size, 0, -1) * p[order]
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def superiority(differences: ArrayLike, *, lower_is_better: bool) -> float:
    """Share of images on which this one is better, ties counted half (Grissom 1994; paired form)."""
    values = _finite(differences)
    gain = -values if lower_is_better else values
    return float(np.mean((gain > 0) + 0.5 * (gain == 0))) if values.size else float("nan")


def rank_biserial(differences: ArrayLike, *, lower_is_better: bool) -> float:
    """Matched-pairs rank-biserial correlation, (R+ - R-) / (R+ + R-) (Kerby 2014); zeros are left out."""
    from scipy.stats import rankdata

    values = _finite(differences)
    gain = -values if lower_is_better else values
    gain = gain[gain != 0]
    if gain.size == 0:
        return 0.0 if values.size else float("nan")
    ranks = rankdata(np.abs(gain))
    return float((ranks * np.sign(gain)).sum() / ranks.sum())


def _single(values: ArrayLike, lower_is_better: bool, confidence: float, resamples: int, seed: int) -> Comparison:
    return Comparison(
        difference=bootstrap_mean(values, confidence=confidence, resamples=resamples, seed=seed),
        p=wilcoxon_p(values),
        p_holm=float("nan"),
        superiority=superiority(values, lower_is_better=lower_is_better),
        rank_biserial=rank_biserial(values, lower_is_better=lower_is_better),
        verdict="no interval",
    )


def _verdict(one: Comparison, lower_is_better: bool, alpha: float) -> Verdict:
    if not np.isfinite(one.difference.low):
        return "no interval"
    if not one.difference.excludes(0.0) or not one.p_holm < alpha:
        return "inconclusive"
    return "better" if (one.difference.estimate < 0.0) == lower_is_better else "worse"


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]
