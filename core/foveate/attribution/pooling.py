"""From numbers a pixel and channel to numbers a cell, and back to a mask of cells over pixels.

Signed and absolute pooling answer different questions (which way, how much) and change rankings, so the
choice is part of a method's name and is recorded; nothing is rectified or normalised on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from foveate.attribution.clips import Frames, pool_frames
from foveate.errors import UsageError
from foveate.geometry import CellGrid, regrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

Pooling = Literal["signed", "abs"]


def pool_pixels(
    values: torch.Tensor,
    grid: CellGrid,
    *,
    pooling: Pooling,
    reduce: Literal["sum", "mean"],
    frames: Frames = (),
) -> NDArray[np.float64]:
    """``(..., [frame,] channel, y, x)`` over input pixels to ``(..., [frame cell,] row, column)`` over cells.

    ``abs`` takes the absolute value of every channel of every pixel before anything is added. ``sum``
    adds channels and pixels of a cell (keeps completeness: cells add up to what pixels added up to);
    ``mean`` averages them (for methods that give all pixels of a cell the same number). Frames of a clip are
    pooled in the same way over ``frames``, their frame cells; without, each stays by itself.
    """
    if pooling not in ("signed", "abs"):
        raise UsageError(f"pooling: expected 'signed' or 'abs', got {pooling!r}")
    array = values.detach().double().cpu().numpy()
    array = np.abs(array) if pooling == "abs" else array
    plane = array.sum(-3) if reduce == "sum" else array.mean(-3)
    return pool_frames(regrid(plane, pixel_grid(*plane.shape[-2:]), grid, reduce=reduce), frames, reduce=reduce)


def pixel_grid(height: int, width: int) -> CellGrid:
    """One cell a pixel."""
    return CellGrid.regular(height, width, height=height, width=width)


def cell_numbers(grid: CellGrid, height: int, width: int) -> NDArray[np.int64]:
    """For each pixel the number of the cell that holds its centre, row by row, ``(y, x)``.

    Pixels beyond the last cell (an input that the patches do not tile) belong to the nearest one.
    Raises UsageError where a cell holds no pixel centre: it could not be perturbed.
    """
    rows, columns = grid.shape
    row = np.clip(np.searchsorted(grid.y, np.arange(height) + 0.5, side="right") - 1, 0, rows - 1)
    column = np.clip(np.searchsorted(grid.x, np.arange(width) + 0.5, side="right") - 1, 0, columns - 1)
    if np.unique(row).size != rows or np.unique(column).size != columns:
        raise UsageError(f"cells: {rows} x {columns} cells do not each hold a pixel of a {height} x {width} input")
    return np.asarray(row[:, None] * columns + column[None, :], dtype=np.int64)


def feature_mask(inputs: torch.Tensor, grid: CellGrid, frames: Frames = ()) -> torch.Tensor:
    """Captum's mask: the cell number of every input element, int64 ``(1, [frame,] channel, y, x)``.

    Cells of a clip are numbered frame cell after frame cell; without ``frames`` every frame is one.
    """
    height, width = inputs.shape[-2:]
    numbers = torch.as_tensor(cell_numbers(grid, height, width), device=inputs.device)
    mask = numbers.expand(inputs.shape[-3], height, width)
    if inputs.dim() == 5:
        frame = torch.as_tensor(frames or range(inputs.shape[1]), device=inputs.device)[:, None, None, None]
        mask = mask + frame * grid.areas.size
    return mask[None].contiguous()
