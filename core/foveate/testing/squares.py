"""Bright squares painted where a model's patches should be, to find geometry that lies."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.geometry import CellGrid, Geometry, regrid
from foveate.interfaces import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHAPE = (480, 640)
"""Height and width of the picture: so large that a patch of a 37 x 37 grid is a dozen pixels wide."""
DARK, BRIGHT = 90, 255
_SUSPECTS = "geometry (scale, offset) or cells() is wrong"

Square = tuple[float, float, float, float]
"""(top, left, bottom, right) in pixels of the picture."""


def painted(square: Square | None) -> Sample:
    """A plain picture with one bright square, or none."""
    pixels = np.full((*SHAPE, 3), DARK, np.uint8)
    if square is not None:
        top, left, bottom, right = (round(edge) for edge in square)
        pixels[top : max(bottom, top + 1), left : max(right, left + 1)] = BRIGHT
    return Sample("square", pixels)


def visible_cells(geometry: Geometry, grid: CellGrid) -> list[tuple[int, int]]:
    """A few cells that lie wholly inside the picture: the corners and one in between.

    Raises AssertionError where there is none: the geometry puts the picture outside the input.
    """
    top, left, bottom, right = geometry.visible
    original = geometry.grid_to_original(grid)
    rows, columns = _inside(original.y, top, bottom), _inside(original.x, left, right)
    assert rows, f"no row of {grid.shape} cells lies inside the picture: {geometry}"
    assert columns, f"no column of {grid.shape} cells lies inside the picture: {geometry}"
    corners = {(row, column) for row in (rows[0], rows[-1]) for column in (columns[0], columns[-1])}
    return sorted(corners | {(rows[len(rows) // 3], columns[2 * len(columns) // 3])})


def middle(geometry: Geometry, grid: CellGrid, cell: tuple[int, int]) -> Square:
    """The middle half of a cell, in pixels of the picture."""
    original = geometry.grid_to_original(grid)
    (top, bottom), (left, right) = original.y[cell[0] :][:2], original.x[cell[1] :][:2]
    return (3 * top + bottom) / 4, (3 * left + right) / 4, (top + 3 * bottom) / 4, (left + 3 * right) / 4


def assert_lit(
    change: NDArray[np.float64], grid: CellGrid, cell: tuple[int, int], geometry: Geometry, square: Square
) -> None:
    """Assert that what a square changed in the input ``(y, x)`` lies in its cell and where geometry puts it.

    The centre of the change may be off by a quarter of a cell: resampling blurs, but evenly to all sides.
    """
    rows, columns = change.shape
    pixels = CellGrid.regular(rows, columns, height=rows, width=columns)
    lit = np.unravel_index(np.argmax(regrid(change, pixels, grid, reduce="sum")), grid.shape)
    found = tuple(map(int, lit))
    assert found == cell, f"a square painted into cell {cell} of {grid.shape} lights cell {found}: {_SUSPECTS}"
    total = change.sum()
    centre = (change.sum(1) @ pixels.centres[0] / total, change.sum(0) @ pixels.centres[1] / total)
    wanted = geometry.to_input((square[0] + square[2]) / 2, (square[1] + square[3]) / 2)
    sides = (np.diff(grid.y)[cell[0]], np.diff(grid.x)[cell[1]])
    off = max(abs(c - w) / side for c, w, side in zip(centre, wanted, sides, strict=True))
    assert off < 0.25, (
        f"a square in cell {cell} lights the input around (y, x) = ({centre[0]:.1f}, {centre[1]:.1f}), "
        f"but geometry says ({wanted[0]:.1f}, {wanted[1]:.1f}): {_SUSPECTS}"
    )


def _inside(edges: NDArray[np.float64], low: float, high: float) -> list[int]:
    slack = 1e-6 * (high - low)
    return [i for i in range(edges.size - 1) if edges[i] >= low - slack and edges[i + 1] <= high + slack]
