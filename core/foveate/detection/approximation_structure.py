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
    """Mass within ``radius`` cells (of the query's size) along both axes: a window of 2 radius + 1 cells."""
    down, across = _steps(query, key)
    return _share(attention, (down <= radius + 1e-6) & (across <= radius + 1e-6))


def axial_share(attention: ArrayLike, query: TokenAxis, key: TokenAxis) -> Share:
    """Mass on keys in the query's own row or column of cells."""
    down, across = _steps(query, key)
    return _share(attention, (down < 0.5) | (across < 0.5))


def _steps(query: TokenAxis, key: TokenAxis) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance between centres along y and x in cells of the query, ``(query, key)``."""
    if np.isnan(query.y).any():
        raise UsageError("window and axial shares: queries without a place in the picture")
    down = np.abs(query.y[:, None] - key.y[None]) / query.height[:, None]
    across = np.abs(query.x[:, None] - key.x[None]) / query.width[:, None]
    return np.asarray(down, np.float64), np.asarray(across, np.float64)


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
