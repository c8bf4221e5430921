"""How far a head looks: attention-weighted distance between query and key, in pixels of the model's input.

Only keys that have a place count (the weights are renormalised over them); a query without a place (CLS, an
object query) has no distance. In clips the distance is the one in the picture plane: time is not pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import as_float, like, namespace, normalise

CITATION = "Dosovitskiy et al. 2021, An Image is Worth 16x16 Words, fig. 7 right and app. D.7"


def distances(query: TokenAxis, key: TokenAxis) -> NDArray[np.float64]:
    """Euclidean distance between token centres, (query, key), input pixels; NaN where either has no place."""
    rows = query.y.astype(np.float64)[:, None] - key.y.astype(np.float64)[None, :]
    columns = query.x.astype(np.float64)[:, None] - key.x.astype(np.float64)[None, :]
    return np.hypot(rows, columns)


def diagonal(key: TokenAxis) -> float:
    """Diagonal of the rectangle that the placed keys cover, in input pixels."""
    return float(np.hypot(_extent(key.y, key.height), _extent(key.x, key.width)))


def _extent(centre: NDArray[np.float32], size: NDArray[np.float32]) -> float:
    middle, half = centre.astype(np.float64), size.astype(np.float64) / 2
    return float(np.nanmax(middle + half) - np.nanmin(middle - half))


def mean_distance(rows: Any, query: TokenAxis | None, key: TokenAxis | None) -> Any:
    """sum_j p_ij |x_i - x_j| over the keys that have a place, ``(..., query, key)`` to ``(..., query)``."""
    if query is None or key is None:
        raise UsageError(
            "attention distance: token positions are missing, expected TokenAxis for query and key",
            remedy="pass query= and key= to the kernel (run.tokens(site, 'query' | 'key') gives them)",
        )
    far = distances(query, key)
    weights = as_float(rows)
    xp = namespace(weights)
    nowhere = like(np.where(np.isnan(key.y), np.nan, 0.0), weights)  # NaN: not a valid key here
    p = normalise(weights + nowhere).p
    total = xp.sum(p * like(np.nan_to_num(far), weights), axis=-1)
    return total + like(np.where(np.isnan(query.y), np.nan, 0.0), weights)


class AttentionDistance(Metric):
    """Mean distance between a query and what it attends to, in pixels."""

    info = MetricInfo(
        name="attention_distance",
        summary="attention-weighted mean distance from the query to its keys",
        unit="px",
        citation=CITATION,
        bounds=(0.0, float("inf")),
        needs=("query_positions", "key_positions"),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to input pixels ``(..., query)``."""
        return mean_distance(rows, query, key)


class AttentionDistanceRelative(Metric):
    """The same distance over the diagonal of the key grid: comparable between input sizes."""

    info = MetricInfo(
        name="attention_distance_relative",
        summary="attention-weighted mean distance over the diagonal of the key grid",
        unit="diagonal",
        citation=CITATION,
        bounds=(0.0, 1.0),
        needs=("query_positions", "key_positions"),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to shares of the diagonal ``(..., query)``."""
        total = mean_distance(rows, query, key)
        assert key is not None
        return total / diagonal(key)
