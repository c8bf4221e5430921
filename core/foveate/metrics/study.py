"""The six statistics of the StreetCLIP study, exactly as its code computes them.

Kept because tables of that kind exist and must be reproducible; for anything new use the other families, whose
pages say why. The quirks are deliberate: 1e-8 added to the sum, 1e-10 inside the logarithm, the number of keys in
the "top 10 %" rounded down (25 of 256), "high attention" above the mean of the row, and a spread that is the
standard deviation of the raw weights, hence bounded by sqrt(K-1)/K. ``attention_max`` was never defined by the
study; here it is the largest raw weight. Rows are the raw weights on patch keys, after the head mean.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import as_float, count_keys, descending, namespace, ranks, valid_weights
from foveate.metrics.sparsity import spread

COLUMNS = (
    "image_id",
    "country",
    "attention_entropy",
    "attention_max",
    "attention_concentration_top10",
    "attention_concentration_top25",
    "num_high_attention_patches",
    "attention_spread",
)
"""The study's CSV, in its order."""

SUM_FLOOR, LOG_FLOOR = 1e-8, 1e-10
_STUDY = "StreetCLIP attention study (PLONK), January 2026, 'Metrics Computed'"


def study_share(rows: Any) -> tuple[Any, Any]:
    """The study's ``cls_attn_norm`` and which keys are valid; ``(..., key)`` each."""
    weights, valid = valid_weights(rows)
    xp = namespace(weights)
    return weights / (xp.sum(weights, axis=-1)[..., None] + SUM_FLOOR), valid


def floor_count(count: Any, fraction: float) -> Any:
    """The study's ``int(len(x) * fraction)``, in float64 as Python computes it."""
    xp = namespace(count)
    exact = count.astype(np.float64) if xp is np else count.double()
    return xp.floor(exact * fraction)


def _where_captured(values: Any, valid: Any) -> Any:
    xp = namespace(values)
    return xp.where(xp.sum(valid, axis=-1) > 0, values, xp.full_like(values, float("nan")))


class StudyEntropy(Metric):
    """``-(n * log(n + 1e-10)).sum()`` with ``n = a / (a.sum() + 1e-8)``."""

    info = MetricInfo(
        name="attention_entropy",
        summary="entropy as the study computes it; at most ln K; use entropy_normalised",
        unit="nat",
        citation=_STUDY,
        bounds=(0.0, float("inf")),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to nats ``(..., query)``."""
        share, valid = study_share(rows)
        xp = namespace(share)
        return _where_captured(-xp.sum(share * xp.log(share + LOG_FLOOR), axis=-1), valid)


class StudyMax(Metric):
    """``a.max()``."""

    info = MetricInfo(
        name="attention_max",
        summary="largest raw weight (the study never defines it); use max_weight or max_lift",
        unit="1",
        citation=_STUDY,
        bounds=(0.0, 1.0),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)``."""
        weights, valid = valid_weights(rows)
        return _where_captured(namespace(weights).amax(weights, axis=-1), valid)


class _StudyTop(Metric):
    fraction: float

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)``."""
        share, valid = study_share(rows)
        xp = namespace(share)
        taken = floor_count(count_keys(valid, share.dtype), self.fraction)
        inside = ranks(share) <= taken[..., None]
        mass = xp.sum(xp.where(inside, descending(share), xp.zeros_like(share)), axis=-1)
        return _where_captured(mass, valid)


class StudyTop10(_StudyTop):
    """``sort(n)[::-1][:int(len(n) * 0.1)].sum()``."""

    fraction = 0.1
    info = MetricInfo(
        name="attention_concentration_top10",
        summary="mass of the int(0.1 K) strongest patches; use top10_mass or top10_lift",
        unit="1",
        citation=_STUDY,
        bounds=(0.0, 1.0),
    )


class StudyTop25(_StudyTop):
    """``sort(n)[::-1][:int(len(n) * 0.25)].sum()``."""

    fraction = 0.25
    info = MetricInfo(
        name="attention_concentration_top25",
        summary="mass of the int(0.25 K) strongest patches; use top25_mass or top25_lift",
        unit="1",
        citation=_STUDY,
        bounds=(0.0, 1.0),
    )


class StudyCount(Metric):
    """``(a > a.mean()).sum()``."""

    info = MetricInfo(
        name="num_high_attention_patches",
        summary="number of patches above the row's mean; rounding noise on uniform rows; use above_1x",
        unit="key",
        citation=_STUDY,
        bounds=(0.0, float("inf")),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to keys ``(..., query)``."""
        weights, valid = valid_weights(rows)
        xp = namespace(weights)
        mean = xp.sum(weights, axis=-1) / xp.clip(xp.sum(valid, axis=-1), 1, None)
        high = xp.where(valid & (weights > mean[..., None]), xp.ones_like(weights), xp.zeros_like(weights))
        return _where_captured(xp.sum(high, axis=-1), valid)


class StudySpread(Metric):
    """``a.std()``."""

    info = MetricInfo(
        name="attention_spread",
        summary="standard deviation of the raw weights; at most sqrt(K-1)/K; use participation_ratio or gini",
        unit="1",
        citation=_STUDY,
        bounds=(0.0, 0.5),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)``."""
        return spread(*valid_weights(as_float(rows)))


STUDY_METRICS: tuple[type[Metric], ...] = (
    StudyEntropy,
    StudyMax,
    StudyTop10,
    StudyTop25,
    StudyCount,
    StudySpread,
)
