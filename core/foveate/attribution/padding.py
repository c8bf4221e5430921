"""Which pixels and cells of the model's input show the image, and which only pad it.

Detectors pad images of different shapes to one canvas. Padding is no evidence: it is not replaced when a picture
is perturbed, its colour does not count in a baseline, and its cells come last in every order, the random ones
included, or a method would gain by knowing where the picture ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.geometry import CellGrid, regrid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foveate.geometry import Geometry


def visible_pixels(inputs: torch.Tensor, geometry: Sequence[Geometry]) -> torch.Tensor | None:
    """Pixels whose centre lies on the image, bool ``(sample, 1, y, x)`` (``(sample, 1, 1, y, x)`` for clips).

    None where all do, which is the usual case.
    """
    height, width = inputs.shape[-2:]
    planes = [np.outer(*_inside(placed, height, width)) for placed in geometry]
    if all(plane.all() for plane in planes):
        return None
    stacked = torch.as_tensor(np.stack(planes), device=inputs.device)
    return stacked.reshape(len(planes), *(1,) * (inputs.dim() - 3), height, width)


def visible_share(geometry: Geometry, grid: CellGrid) -> NDArray[np.float64]:
    """Share of each input cell that shows the image and not padding, ``(y, x)``."""
    cells = geometry.grid_to_original(grid)
    whole = (0.0, 0.0, float(geometry.original_height), float(geometry.original_width))
    return np.asarray(covered(whole, cells) / cells.areas)


def covered(box: tuple[float, float, float, float], cells: CellGrid) -> NDArray[np.float64]:
    """Area of each cell under a box (top, left, bottom, right), in square pixels, ``(y, x)``."""
    top, left, bottom, right = box
    if not (bottom > top and right > left):
        return np.zeros(cells.shape)
    whole = CellGrid(np.array([top, bottom]), np.array([left, right]))
    return np.nan_to_num(regrid([[(bottom - top) * (right - left)]], whole, cells, reduce="sum"))


def _inside(placed: Geometry, height: int, width: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Rows and columns of pixels whose centres lie on the image."""
    top, left = placed.to_input(0.0, 0.0)
    bottom, right = placed.to_input(float(placed.original_height), float(placed.original_width))
    y, x = np.arange(height) + 0.5, np.arange(width) + 0.5
    return (y > top) & (y < bottom), (x > left) & (x < right)
