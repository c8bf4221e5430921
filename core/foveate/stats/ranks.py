"""Order statistics of maps whose values may be tied: expected values under random tie breaking.

Explanations are full of ties (occlusion windows, masks, zeros, a uniform map), and an ``argsort`` turns a
tie into a spatial pattern that depends on the sorting algorithm. Here tied cells are exchangeable: an
*order* breaks ties by seeded random numbers, and a *score* is the exact expected value over all ways of
breaking them, which needs no seeds at all. So a uniform map has rank correlation 0 with everything, and
overlaps with any top-k set as much as chance does.

Two values are tied when they differ by less than :data:`TIE_TOLERANCE` of the larger magnitude: rounding
in float32 (pooling, storing) must not turn a tie into an order. Everything works along the last axis; NaN
cells are unknown and do not count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TIE_TOLERANCE = 1e-6


def tie_spans(values: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First and last position (ascending, from 0) that the tie group of each value occupies, ``(..., n)``.

    An untied value has first == last == its rank from 0. NaN gets -1 in both.
    """
    array = np.asarray(values, dtype=np.float64)
    order = np.argsort(array, axis=-1, kind="stable")  # NaN last
    ascending = np.take_along_axis(array, order, axis=-1)
    position = np.broadcast_to(np.arange(array.shape[-1]), array.shape)
    opens = _opens(ascending)
    first = np.maximum.accumulate(np.where(opens, position, 0), axis=-1)
    closes = np.concatenate([opens[..., 1:], np.ones_like(opens[..., :1])], axis=-1)
    last = np.minimum.accumulate(np.where(closes, position, array.shape[-1])[..., ::-1], axis=-1)[..., ::-1]
    unknown = np.isnan(array)
    return _unsorted(first, order, unknown), _unsorted(last, order, unknown)


def midranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, ascending, tied values sharing their mean rank; NaN stays NaN. float64 ``(..., n)``."""
    first, last = tie_spans(values)
    return np.where(first >= 0, (first + last) / 2.0 + 1.0, np.nan)


def descending(values: ArrayLike, noise: ArrayLike) -> NDArray[np.intp]:
    """Positions from the largest value to the smallest; ties in the order of ``noise``, NaN last.

    ``noise`` (broadcast to ``values``) holds seeded random numbers. Returns ``(..., n)``.
    """
    first, _ = tie_spans(values)
    tie_breaker = np.broadcast_to(np.asarray(noise, dtype=np.float64), first.shape)
    return np.lexsort((tie_breaker, -first), axis=-1)


def top_probability(values: ArrayLike, count: ArrayLike) -> NDArray[np.float64]:
    """Chance that each cell is among the ``count`` largest when ties are broken at random, ``(..., n)``.

    ``count`` broadcasts against the leading axes; rows sum to it (or to the number of known cells).
    NaN cells get 0.
    """
    first, last = tie_spans(values)
    known = (first >= 0).sum(axis=-1, keepdims=True)
    above = known - 1 - last
    wanted = np.asarray(count, dtype=np.float64)[..., None]
    chance = np.clip((wanted - above) / (last - first + 1), 0.0, 1.0)
    return np.where(first >= 0, chance, 0.0)


def spearman(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Rank correlation of two maps over the cells that both know, expected under random tie breaking.

    With independent tie breaking the expected rank of a cell is its midrank, and the variance of untied
    ranks is fixed, so E[rho] = 12 sum((r_a - r)(r_b - r)) / (m (m^2 - 1)): Spearman's rho without ties
    (Spearman 1904; Kendall, Rank Correlation Methods, 1948, ch. 3: rho_a). NaN where fewer than 3 cells
    are common. Shapes broadcast; returns the leading shape.
    """
    one, two, known = _common(a, b)
    m = known.sum(axis=-1).astype(np.float64)
    centre = (m[..., None] + 1.0) / 2.0
    rank_a = np.where(known, midranks(one) - centre, 0.0)
    rank_b = np.where(known, midranks(two) - centre, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 12.0 * (rank_a * rank_b).sum(axis=-1) / (m * (m * m - 1.0))
    return np.where(m >= 3, rho, np.nan)


def top_overlap(a: ArrayLike, b: ArrayLike, fraction: float = 0.1) -> NDArray[np.float64]:
    """Share of the top cells that two maps have in common, expected under random tie breaking, in [0, 1].

    The top holds ``ceil(fraction * m)`` of the m cells that both maps know; unrelated maps overlap by
    about ``fraction``. NaN where no cell is common.
    """
    one, two, known = _common(a, b)
    m = known.sum(axis=-1)
    count = np.ceil(fraction * m - 1e-9)
    shared = (top_probability(one, count) * top_probability(two, count)).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(m > 0, shared / count, np.nan)


def _opens(ascending: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether each sorted value begins a new tie group."""
    before, after = ascending[..., :-1], ascending[..., 1:]
    with np.errstate(invalid="ignore"):
        gap = after - before
        tied = np.isfinite(gap) & (gap <= TIE_TOLERANCE * np.maximum(np.abs(before), np.abs(after)))
    tied |= before == after  # equal infinities
    first = np.ones((*ascending.shape[:-1], min(1, ascending.shape[-1])), dtype=bool)
    return np.concatenate([first, ~tied], axis=-1)


def _unsorted(values: NDArray[np.int64], order: NDArray[np.intp], unknown: NDArray[np.bool_]) -> NDArray[np.int64]:
    placed = np.empty(values.shape, dtype=np.int64)
    np.put_along_axis(placed, order, values, axis=-1)
    placed[unknown] = -1
    return placed


def _common(a: ArrayLike, b: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    one, two = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    known = np.isfinite(one) & np.isfinite(two)
    return np.where(known, one, np.nan), np.where(known, two, np.nan), known
