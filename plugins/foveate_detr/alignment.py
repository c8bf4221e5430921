"""Where the cells of a convolutional feature map look.

A convolution with an odd kernel k, stride s and padding (k - 1) / 2 centres output i on input pixel s i. So does a
stack of them: cell i of a ResNet's map of total stride S has the centre of its receptive field on pixel S i, at
S i + 1/2 in edge coordinates, and not at S (i + 1/2) as if the map tiled the input evenly. Laid out evenly, every
attention map of a DETR lies (S - 1) / 2 pixels too low and too far right: almost half a cell. Here the borders
between cells are midway between the true centres; the outermost cells reach to the borders of the input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.geometry import CellGrid
from foveate.interfaces import TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray

ODD_KERNELS = ("resnet",)
"""Backbones all of whose strided layers are such convolutions (or 1 x 1 shortcuts, which agree with them)."""


def looks_from_corners(config: Any) -> bool:
    """Whether the cells of a model's backbone are centred on pixel S i; False where the backbone is not known."""
    backbone = getattr(config, "backbone_config", None)
    kind = str(getattr(backbone, "model_type", ""))
    named = str(getattr(backbone, "backbone", "")) if kind == "timm_backbone" else kind
    return named.startswith(ODD_KERNELS)


def corner_cells(rows: int, columns: int, *, height: float, width: float, stride: float) -> CellGrid:
    """Cells whose receptive fields are centred on pixels 0, S, 2 S, ...; together they tile the input."""
    return CellGrid(_edges(rows, height, stride), _edges(columns, width, stride))


def grid_tokens(grid: CellGrid, level: int = 0) -> TokenAxis:
    """The cells of a grid as patch tokens, row by row, each with its own extent."""
    rows, columns = grid.shape
    even = TokenAxis.patches(rows, columns, height=1.0, width=1.0, level=level)
    y, x = grid.centres
    axes = np.meshgrid(y, x, indexing="ij"), np.meshgrid(np.diff(grid.y), np.diff(grid.x), indexing="ij")
    (centre_y, centre_x), (height, width) = ([_flat(part) for part in pair] for pair in axes)
    return TokenAxis(even.kind, centre_y, centre_x, height, width, even.level, even.frame)


def _edges(count: int, size: float, stride: float) -> NDArray[np.float64]:
    between = stride * (np.arange(1, count) - 0.5) + 0.5
    return np.concatenate([[0.0], between, [size]])


def _flat(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.ravel().astype(np.float32)
