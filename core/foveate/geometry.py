"""Exact maps between the original image, the model's input and cells laid on either.

Resizing, cropping and padding are axis-aligned, so one affine map per axis says everything:
``input = original * scale + offset``, in *edge* coordinates (a pixel ``i`` covers ``[i, i + 1]``).
Values live on rectilinear cells and move between grids by the area of overlap, so that mass is kept
and nothing is interpolated or corner-aligned. What a crop removed is NaN on the canvas, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import TokenAxis

Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class CellGrid:
    """A rectilinear grid: cell ``(i, j)`` covers ``[y[i], y[i+1]] x [x[j], x[j+1]]``.

    ``y`` and ``x`` are increasing edges in pixels, float64, of length rows + 1 and columns + 1.
    """

    y: NDArray[np.float64]
    x: NDArray[np.float64]

    def __post_init__(self) -> None:
        for name in ("y", "x"):
            edges = np.asarray(getattr(self, name), dtype=np.float64)
            if edges.ndim != 1 or edges.size < 2 or not np.all(np.diff(edges) > 0):
                raise ValueError(
                    f"CellGrid.{name}: expected at least two strictly increasing edges, got {edges!r}"
                )
            object.__setattr__(self, name, edges)

    @classmethod
    def regular(cls, rows: int, columns: int, *, height: float, width: float) -> CellGrid:
        """``rows x columns`` equal cells that tile ``[0, height] x [0, width]``."""
        return cls(np.linspace(0.0, height, rows + 1), np.linspace(0.0, width, columns + 1))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.y.size - 1, self.x.size - 1

    @property
    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Cell centres along y (rows,) and x (columns,)."""
        return (self.y[:-1] + self.y[1:]) / 2, (self.x[:-1] + self.x[1:]) / 2

    @property
    def areas(self) -> NDArray[np.float64]:
        """Area of each cell, (rows, columns), in square pixels."""
        return np.outer(np.diff(self.y), np.diff(self.x))

    def clip(self, top: float, left: float, bottom: float, right: float) -> CellGrid:
        """The cells that touch the rectangle, cut at its border. Raises ValueError where none do."""
        y = np.unique(np.clip(self.y, top, bottom))
        x = np.unique(np.clip(self.x, left, right))
        return CellGrid(y, x)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CellGrid):
            return NotImplemented
        return np.array_equal(self.y, other.y) and np.array_equal(self.x, other.x)

    __hash__ = None  # type: ignore[assignment]  # arrays inside


@dataclass(frozen=True)
class Geometry:
    """How one image (or every frame of a clip) became the model's input.

    ``input_y = original_y * scale_y + offset_y`` and likewise for x, in edge coordinates. A crop has a
    negative offset, padding before the image a positive one.
    """

    original_height: int
    original_width: int
    input_height: int
    input_width: int
    scale_y: float
    scale_x: float
    offset_y: float = 0.0
    offset_x: float = 0.0

    @classmethod
    def identity(cls, height: int, width: int) -> Geometry:
        """The input is the image itself."""
        return cls(height, width, height, width, 1.0, 1.0)

    @property
    def visible(self) -> tuple[float, float, float, float]:
        """The part of the original that reached the model: (top, left, bottom, right), original pixels."""
        top, left = self.to_original(0.0, 0.0)
        bottom, right = self.to_original(float(self.input_height), float(self.input_width))
        return (
            max(0.0, top),
            max(0.0, left),
            min(float(self.original_height), bottom),
            min(float(self.original_width), right),
        )

    def to_input(self, y: float, x: float) -> tuple[float, float]:
        """A point of the original, in input pixels (it may lie outside the input)."""
        return y * self.scale_y + self.offset_y, x * self.scale_x + self.offset_x

    def to_original(self, y: float, x: float) -> tuple[float, float]:
        """A point of the input, in original pixels (it may lie in the padding, outside the image)."""
        return (y - self.offset_y) / self.scale_y, (x - self.offset_x) / self.scale_x

    def grid_to_original(self, grid: CellGrid) -> CellGrid:
        """The same cells, measured in original pixels."""
        return CellGrid((grid.y - self.offset_y) / self.scale_y, (grid.x - self.offset_x) / self.scale_x)

    def grid_to_input(self, grid: CellGrid) -> CellGrid:
        """The same cells, measured in input pixels."""
        return CellGrid(grid.y * self.scale_y + self.offset_y, grid.x * self.scale_x + self.offset_x)

    def to_canvas(
        self, values: ArrayLike, grid: CellGrid, canvas: CellGrid, *, reduce: Reduction = "mean"
    ) -> NDArray[np.float64]:
        """Values on input cells ``(..., rows, columns)`` laid on cells of the original image.

        Canvas cells (or parts of them) that the model did not see do not count; a cell it did not see
        at all is NaN.
        """
        top, left, bottom, right = self.visible
        source = self.grid_to_original(grid)
        return regrid(values, source, canvas, reduce=reduce, window=(top, left, bottom, right))

    def canvas(self, max_side: int | None = None) -> CellGrid:
        """Cells of the original image: one a pixel, or coarser so that no side exceeds ``max_side``."""
        rows, columns = self.original_height, self.original_width
        if max_side is not None and max(rows, columns) > max_side:
            shrink = max_side / max(rows, columns)
            rows, columns = max(1, round(rows * shrink)), max(1, round(columns * shrink))
        return CellGrid.regular(rows, columns, height=self.original_height, width=self.original_width)


def regrid(
    values: ArrayLike,
    source: CellGrid,
    target: CellGrid,
    *,
    reduce: Reduction = "mean",
    window: tuple[float, float, float, float] | None = None,
) -> NDArray[np.float64]:
    """Move ``values (..., rows, columns)`` from one grid to another by area of overlap.

    ``mean`` treats values as densities: each target cell gets the area-weighted mean of what covers it.
    ``sum`` treats them as masses spread evenly over their cells: mass inside both grids is kept.
    ``window`` (top, left, bottom, right) cuts the source first. NaN sources do not count; target cells
    that nothing covers are NaN. Returns float64 ``(..., target rows, target columns)``.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape[-2:] != source.shape:
        raise ValueError(f"regrid: values end in {array.shape[-2:]} but the source grid is {source.shape}")
    low_y, low_x, high_y, high_x = window if window is not None else (-np.inf, -np.inf, np.inf, np.inf)
    weight_y = _overlap(source.y, target.y, low_y, high_y)
    weight_x = _overlap(source.x, target.x, low_x, high_x)
    known = np.isfinite(array)
    filled = np.where(known, array, 0.0)
    if reduce == "sum":
        filled = filled / source.areas
    covered = weight_y @ known.astype(np.float64) @ weight_x.T
    total = weight_y @ filled @ weight_x.T
    with np.errstate(invalid="ignore", divide="ignore"):
        result = total if reduce == "sum" else total / covered
    return np.where(covered > 0.0, result, np.nan)


def _overlap(
    source: NDArray[np.float64], target: NDArray[np.float64], low: float, high: float
) -> NDArray[np.float64]:
    """Length shared by each target and each source interval, (target, source)."""
    start = np.maximum(np.maximum(target[:-1, None], source[None, :-1]), low)
    stop = np.minimum(np.minimum(target[1:, None], source[None, 1:]), high)
    shared: NDArray[np.float64] = np.maximum(stop - start, 0.0)
    return shared


def tokens_to_cells(values: ArrayLike, tokens: TokenAxis) -> tuple[NDArray[np.float64], CellGrid]:
    """Lay values over tokens ``(..., key)`` on the cells that the patch tokens tile: ``(..., rows, columns)``.

    Tokens without a place (CLS, registers) are left out. Raises ValueError where the patches of the axis
    are not one rectilinear grid (several pyramid levels or frames: select one first).
    """
    array = np.asarray(values, dtype=np.float64)
    patches = tokens.where("patch")
    if array.shape[-1] != len(tokens):
        raise ValueError(f"tokens_to_cells: {array.shape[-1]} values but {len(tokens)} tokens")
    y, row = np.unique(tokens.y[patches].astype(np.float64), return_inverse=True)
    x, column = np.unique(tokens.x[patches].astype(np.float64), return_inverse=True)
    if patches.size == 0 or y.size * x.size != patches.size:
        raise ValueError(
            f"tokens_to_cells: {patches.size} patches at {y.size} heights and {x.size} widths are not one grid"
        )
    height, width = np.empty(y.size), np.empty(x.size)
    height[row], width[column] = tokens.height[patches], tokens.width[patches]
    grid = CellGrid(_edges(y, height), _edges(x, width))
    laid = np.full((*array.shape[:-1], y.size, x.size), np.nan)
    laid[..., row, column] = array[..., patches]
    return laid, grid


def _edges(centres: NDArray[np.float64], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Borders of adjoining cells: midway between centres of equal cells, by their extents where they differ."""
    ends = [[centres[0] - sizes[0] / 2], [centres[-1] + sizes[-1] / 2]]
    even = bool(np.all(sizes == sizes[0]))
    between = (centres[:-1] + centres[1:]) / 2 if even else centres[:-1] + sizes[:-1] / 2
    return np.concatenate([ends[0], between, ends[1]])
