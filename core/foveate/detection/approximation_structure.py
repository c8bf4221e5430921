"""Would fixed patterns do: the mass that a local window, or the query's own row and column, already holds.

Windows (Liu et al. 2021, Swin, ICCV) and axial attention (Wang et al. 2020, Axial-DeepLab, ECCV) see only these
keys. Each share stands beside that of uniform attention over the same grid, which depends on window and place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import TokenAxis


class Share(NamedTuple):
    """Mean over queries of the mass in a pattern, ``(...,)``, and of the pattern's share of the keys."""

    mass: NDArray[np.float64]
    uniform: float


def window_share(attention: ArrayLike, query: TokenAxis, key: TokenAxis, radius: float) -> Share:
    """Mass within ``radius`` cells along both axes: a window of 2 radius + 1 cells."""
    down, across = _steps(query, key)
    return _share(attention, (down <= radius + 1e-6) & (across <= radius + 1e-6))


def axial_share(attention: ArrayLike, query: TokenAxis, key: TokenAxis) -> Share:
    """Mass on keys in the query's own row or column of cells."""
    down, across = _steps(query, key)
    return _share(attention, (down < 0.5) | (across < 0.5))


def _steps(query: TokenAxis, key: TokenAxis) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance along y and x in rows and columns of the query's own grid, ``(query, key)``.

    Cells of one grid need not be equal, so their numbers are compared; cells of another level lie between them.
    """
    if np.isnan(query.y).any():
        raise UsageError("window and axial shares: queries without a place in the picture")
    down, across = (np.empty((len(query), len(key))) for _ in range(2))
    for level in np.unique(query.level):
        own = query.level == level
        for steps, of_query, of_key in ((down, query.y, key.y), (across, query.x, key.x)):
            lines = np.unique(of_query[own])
            numbers = (np.interp(place, lines, np.arange(lines.size)) for place in (of_query[own], of_key))
            first, second = numbers
            steps[own] = np.abs(first[:, None] - second[None])
    return down, across


def _share(attention: ArrayLike, pattern: NDArray[np.bool_]) -> Share:
    rows = np.nan_to_num(np.asarray(attention, np.float64))
    if rows.shape[-2:] != pattern.shape:
        raise UsageError(f"attention {rows.shape} does not fit a pattern {pattern.shape}")
    total = rows.sum(-1)
    inside = (rows * pattern).sum(-1)
    known = total > 0
    share = np.where(known, inside / np.where(known, total, 1.0), 0.0).sum(-1)
    count = known.sum(-1)
    return Share(np.where(count > 0, share / np.maximum(count, 1), np.nan), float(pattern.mean()))
