"""Means over what is known: NaN entries do not count, and nothing known is NaN without a warning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


def mean_known(values: ArrayLike, axis: int | tuple[int, ...] | None = None) -> Any:
    """Mean of what is finite along ``axis``, float64; NaN where nothing is."""
    table = np.asarray(values, np.float64)
    known = np.isfinite(table)
    count = known.sum(axis=axis)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, table, 0.0).sum(axis=axis) / np.where(count > 0, count, np.nan)
