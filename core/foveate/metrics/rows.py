"""Attention rows as numpy or torch arrays: the few operations that every metric starts from.

Rows are ``(..., key)``. A key that is NaN in a row that has other values is *not valid* there (blocked by a
mask, padding) and does not count towards K; a row of NaN was not captured; a row without mass (fully masked)
has no distribution. The last two give NaN. Metrics are therefore right where K differs from row to row.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from foveate.interfaces import Metric

TIE = 1e-5
"""Relative distance from a threshold that float32 rounding can make: such weights do not count as above it."""


class Distribution(NamedTuple):
    """Rows scaled to sum to 1 over their valid keys.

    ``p`` is ``(..., key)``, 0 at keys that are not valid and NaN in rows without a distribution;
    ``count`` is K, ``(...)``, in the dtype of ``p``.
    """

    p: Any
    count: Any


class Reducible(Metric):
    """A metric that capture's exact reductions also give, without the rows.

    ``reduction`` names the stored variable; ``over`` says over which keys it was taken: a result over
    "all" keys cannot be turned into one over patches, a vector over keys ("each") can be selected from.
    """

    reduction: ClassVar[str]
    over: ClassVar[Literal["all", "each"]]

    @abstractmethod
    def reduce(self, values: Any, count: Any) -> Any:
        """The metric from the stored reduction; ``count`` is K."""


def namespace(array: Any) -> Any:
    """``torch`` for tensors, else ``numpy``: the functions used here have the same names in both."""
    if type(array).__module__.partition(".")[0] != "torch":
        return np
    import torch

    return torch


def as_float(array: Any) -> Any:
    """The array in float32 at least: half precision is for storing, not for summing."""
    xp = namespace(array)
    if array.dtype in (xp.float32, xp.float64):
        return array
    return array.astype(np.float32) if xp is np else array.float()


def like(values: Any, reference: Any) -> Any:
    """``values`` (a numpy array or number) as an array of the reference's kind, device and dtype."""
    xp = namespace(reference)
    if xp is np:
        return np.asarray(values, dtype=reference.dtype)
    return xp.as_tensor(values, dtype=reference.dtype, device=reference.device)


def valid_weights(rows: Any) -> tuple[Any, Any]:
    """Weights with 0 at keys that are not valid, and which keys are valid; both ``(..., key)``."""
    xp = namespace(rows)
    rows = as_float(rows)
    valid = ~xp.isnan(rows)
    return xp.where(valid, rows, xp.zeros_like(rows)), valid


def count_keys(valid: Any, dtype: Any) -> Any:
    """K of each row, ``(...)``; NaN for rows that have no valid key."""
    xp = namespace(valid)
    count = xp.sum(valid, axis=-1)
    count = count.astype(dtype) if xp is np else count.to(dtype)
    return xp.where(count > 0, count, xp.full_like(count, float("nan")))


def normalise(rows: Any) -> Distribution:
    """Scale rows to sum to 1 over their valid keys."""
    weights, valid = valid_weights(rows)
    xp = namespace(weights)
    total = xp.sum(weights, axis=-1)
    total = xp.where(total > 0, total, xp.full_like(total, float("nan")))
    return Distribution(weights / total[..., None], count_keys(valid, weights.dtype))


def descending(array: Any) -> Any:
    """Values sorted along the last axis, largest first."""
    xp = namespace(array)
    return -np.sort(-array, axis=-1) if xp is np else xp.sort(array, dim=-1, descending=True).values


def ranks(array: Any) -> Any:
    """1, 2, ... along the last axis, in the dtype of ``array``."""
    return like(np.arange(1, array.shape[-1] + 1), array)


def entropy_of(p: Any) -> Any:
    """Shannon entropy in nats over the last axis, with 0 ln 0 = 0."""
    xp = namespace(p)
    positive = xp.where(p > 0, p, xp.ones_like(p))  # ln 1 = 0, and a finite gradient at p = 0
    # NaN > 0 is false: rows without a distribution must stay NaN
    return -xp.sum(p * xp.log(positive), axis=-1)


def median(array: Any) -> Any:
    """Median over the last axis, ignoring NaN; the mean of the two middle values where their count is even."""
    xp = namespace(array)
    if xp is np:
        with np.errstate(all="ignore"):
            return _numpy_nanmedian(array)
    return xp.nanquantile(array, 0.5, dim=-1)


def _numpy_nanmedian(array: Any) -> Any:
    known = ~np.isnan(array).all(axis=-1)
    filled = np.where(known[..., None], array, 0.0)
    return np.where(known, np.nanmedian(filled, axis=-1), np.nan).astype(array.dtype)


def nanmean(array: Any, axis: int) -> Any:
    """Mean over one axis of what is not NaN; NaN where nothing is."""
    xp = namespace(array)
    known = ~xp.isnan(array)
    total = xp.sum(xp.where(known, array, xp.zeros_like(array)), axis=axis)
    count = xp.sum(known, axis=axis)
    return xp.where(count > 0, total / xp.clip(count, 1, None), xp.full_like(total, float("nan")))
