"""Whose attention lies on whom: mass of attention maps inside the boxes or masks of objects.

A map's mass is spread evenly over each of its cells; a region gets of every cell the share of the cell's area
that it covers. Regions may overlap, and then each gets the mass they share, so a row can sum to more than 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import CellGrid


def box_shares(grid: CellGrid, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each cell's area inside each box: float64 ``(box, row, column)`` in [0, 1].

    ``boxes`` is ``(box, [top, left, bottom, right])`` in the coordinates of ``grid``; a box with NaN covers
    nothing that is known, and is NaN.
    """
    top, left, bottom, right = (edge[:, None] for edge in np.asarray(boxes, np.float64).reshape(-1, 4).T)
    down = np.clip(np.minimum(grid.y[1:], bottom) - np.maximum(grid.y[:-1], top), 0.0, None) / np.diff(grid.y)
    across = np.clip(np.minimum(grid.x[1:], right) - np.maximum(grid.x[:-1], left), 0.0, None) / np.diff(grid.x)
    return np.asarray(down[:, :, None] * across[:, None, :])


def union_share(grid: CellGrid, boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each cell's area inside any of the boxes, ``(row, column)``; boxes with NaN are left out.

    Exact: cells are cut along every edge, and each piece lies wholly inside or outside each box.
    """
    known = np.asarray(boxes, np.float64).reshape(-1, 4)
    known = known[np.isfinite(known).all(1)]
    y, x = (_cut(edges, known[:, sides]) for edges, sides in ((grid.y, [0, 2]), (grid.x, [1, 3])))
    down, across = ((e[1:] + e[:-1])[None] / 2 for e in (y, x))
    rows = (down > known[:, :1]) & (down < known[:, 2:3])
    columns = (across > known[:, 1:2]) & (across < known[:, 3:])
    inside = np.einsum("by,bx->yx", rows * 1.0, columns * 1.0) > 0
    area = inside * np.outer(np.diff(y), np.diff(x))
    by_row = np.add.reduceat(area, np.searchsorted(y, grid.y[:-1]), axis=0)
    return np.asarray(np.add.reduceat(by_row, np.searchsorted(x, grid.x[:-1]), axis=1) / grid.areas)


def mask_shares(grid: CellGrid, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Share of each cell's area inside each mask: float64 ``(mask, row, column)``.

    ``masks`` is bool ``(mask, y, x)`` in pixels that have the coordinates of ``grid`` (original pixels).
    """
    from foveate.geometry import CellGrid, regrid

    height, width = masks.shape[-2:]
    pixels = CellGrid.regular(height, width, height=height, width=width)
    parts = [np.nan_to_num(regrid(mask.astype(np.float64), pixels, grid, reduce="sum")) for mask in masks]
    return np.array(parts).reshape(len(masks), *grid.shape) / grid.areas


def region_mass(maps: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each map's mass inside each region, ``(map, region)``.

    ``maps`` is non-negative ``(map, row, column)``, ``shares`` comes from :func:`box_shares` or
    :func:`mask_shares`. NaN cells hold no mass; a map without any mass is NaN.
    """
    known = np.nan_to_num(np.asarray(maps, np.float64))
    total = known.sum((1, 2))
    inside = np.einsum("myx,ryx->mr", known, shares)
    return np.asarray(np.where(total[:, None] > 0, inside / np.where(total > 0, total, 1.0)[:, None], np.nan))


def _cut(edges: NDArray[np.float64], further: NDArray[np.float64]) -> NDArray[np.float64]:
    """Edges of a grid with further ones that lie within it, ascending."""
    return np.unique(np.concatenate([edges, np.clip(further.ravel(), edges[0], edges[-1])]))
