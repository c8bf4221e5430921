"""Does attention stay on the same things when the picture is resized?

Two maps of one picture, each on cells of its own input, are moved to cells of the original by area (mass is
kept), normalised, and compared by Jensen-Shannon divergence (Lin 1991, IEEE Trans. Inf. Theory 37) over ln 2:
0 for the same map, 1 for maps without common support. Maps of different pictures give what "unrelated" looks like.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.geometry import CellGrid, regrid

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def divergence(a: ArrayLike, b: ArrayLike) -> float:
    """Jensen-Shannon divergence of two maps of one shape over ln 2, in [0, 1].

    Cells that are NaN in either do not count; each map is normalised over the rest. NaN where one has no mass.
    """
    p, q = (np.asarray(values, np.float64).ravel() for values in (a, b))
    both = np.isfinite(p) & np.isfinite(q)
    p, q = p[both], q[both]
    if not (p.sum() > 0 and q.sum() > 0):
        return float("nan")
    p, q = p / p.sum(), q / q.sum()
    mean = (p + q) / 2
    return float(np.clip((_relative(p, mean) + _relative(q, mean)) / 2 / np.log(2), 0.0, 1.0))


def common_cells(a: CellGrid, b: CellGrid) -> CellGrid:
    """The coarser of two grids over the same picture: moving to it invents no detail."""
    return a if a.areas.mean() >= b.areas.mean() else b


def scale_divergence(a: ArrayLike, grid_a: CellGrid, b: ArrayLike, grid_b: CellGrid) -> float:
    """:func:`divergence` of two maps ``(row, column)`` whose grids are in original pixels, on the coarser grid."""
    cells = common_cells(grid_a, grid_b)
    return divergence(_mass(a, grid_a, cells), _mass(b, grid_b, cells))


def _mass(values: ArrayLike, grid: CellGrid, cells: CellGrid) -> NDArray[np.float64]:
    return regrid(values, grid, cells, reduce="sum")


def _relative(p: NDArray[np.float64], m: NDArray[np.float64]) -> float:
    some = p > 0
    return float((p[some] * np.log(p[some] / m[some])).sum())
