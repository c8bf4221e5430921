"""How sparse a row is: Gini, Hoyer, participation ratio, and two forms of the plain spread.

``spread_raw`` is the study's standard deviation. It depends on the number of keys (at most sqrt(K-1)/K) and on the
mass that went to prefix tokens, so it is kept for comparison only. ``spread_minmax`` is the spread of the row
scaled to [0, 1] as heat maps are drawn; published "spreads" above sqrt(K-1)/K can only be of that kind.
"""

from __future__ import annotations

from typing import Any

from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import descending, namespace, normalise, ranks, valid_weights


class Gini(Metric):
    """G = (K + 1 - 2 sum_j j p_[j]) / K with p_[1] >= p_[2] >= ..."""

    info = MetricInfo(
        name="gini",
        summary="Gini index, 0 = uniform, at most 1 - 1/K",
        unit="1",
        citation="Hurley and Rickard 2009, IEEE Trans. Inf. Theory 55, 4723-4741, sec. II-A",
        bounds=(0.0, 1.0),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to G, ``(..., query)``."""
        p, count = normalise(rows)
        mean_rank = namespace(p).sum(descending(p) * ranks(p), axis=-1)
        return (count + 1 - 2 * mean_rank) / count


class Hoyer(Metric):
    """(sqrt K - |p|_1 / |p|_2) / (sqrt K - 1): 0 = uniform, 1 = one key. NaN where K is 1."""

    info = MetricInfo(
        name="hoyer",
        summary="Hoyer's sparseness, 0 = uniform, 1 = one key",
        unit="1",
        citation="Hoyer 2004, JMLR 5, 1457-1469, sec. 3.1",
        bounds=(0.0, 1.0),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to sparseness, ``(..., query)``."""
        p, count = normalise(rows)
        xp = namespace(p)
        root = xp.sqrt(count)
        several = xp.where(count > 1, root - 1, xp.full_like(root, float("nan")))
        return (root - 1 / xp.sqrt(xp.sum(p * p, axis=-1))) / several


class ParticipationRatio(Metric):
    """1 / sum_j p_j^2."""

    info = MetricInfo(
        name="participation_ratio",
        summary="inverse Simpson index, 1 / sum p^2 (Hill number of order 2), from 1 to K",
        unit="key",
        citation="Bell and Dean 1970, Discuss. Faraday Soc. 50, 55-61; Hill 1973, Ecology 54, 427-432",
        bounds=(1.0, float("inf")),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to keys, ``(..., query)``."""
        p = normalise(rows).p
        return 1 / namespace(p).sum(p * p, axis=-1)


def spread(weights: Any, valid: Any) -> Any:
    """Population standard deviation over the valid keys, ``(..., key)`` to ``(...)``; NaN where there are none."""
    xp = namespace(weights)
    count = xp.sum(valid, axis=-1)
    known = count > 0
    count = xp.clip(count, 1, None)
    centred = xp.where(valid, weights - (xp.sum(weights, axis=-1) / count)[..., None], xp.zeros_like(weights))
    deviation = xp.sqrt(xp.sum(centred * centred, axis=-1) / count)
    return xp.where(known, deviation, xp.full_like(deviation, float("nan")))


class SpreadRaw(Metric):
    """Standard deviation of the weights as they are, not renormalised."""

    info = MetricInfo(
        name="spread_raw",
        summary="standard deviation of the raw weights; at most sqrt(K-1)/K",
        unit="1",
        citation="the StreetCLIP study's attention_spread",
        bounds=(0.0, 0.5),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)``."""
        return spread(*valid_weights(rows))


class SpreadMinMax(Metric):
    """Standard deviation of the row scaled to [0, 1] by its own minimum and maximum. NaN for constant rows."""

    info = MetricInfo(
        name="spread_minmax",
        summary="standard deviation after scaling the row to [0, 1] by its own extremes",
        unit="1",
        citation="the min-max scaling of the StreetCLIP study's heat maps",
        bounds=(0.0, 0.5),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)``."""
        weights, valid = valid_weights(rows)
        xp = namespace(weights)
        infinite = xp.full_like(weights, float("inf"))
        largest = xp.amax(xp.where(valid, weights, -infinite), axis=-1)
        width = largest - xp.amin(xp.where(valid, weights, infinite), axis=-1)
        # a width within rounding of the weights themselves is no width: the row is constant
        width = xp.where(width > 1e-6 * largest, width, xp.full_like(width, float("nan")))
        return spread(weights, valid) / width
