"""Cells of a ResNet lie where their receptive fields are centred, and still tile the input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.geometry import CellGrid, tokens_to_cells
from foveate_detr.alignment import corner_cells, grid_tokens, looks_from_corners


@torch.no_grad()
def averaging(module: nn.Module) -> None:
    """Every layer a plain mean of its window, so that a cell's gradient is centred where its window is."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d):
            child.weight.fill_(1.0 / child.weight[0].numel())
        elif isinstance(child, nn.MaxPool2d):  # ties of a maximum all go to one corner
            setattr(module, name, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        elif type(child).__name__.endswith("BatchNorm2d"):
            setattr(module, name, nn.Identity())
        else:
            averaging(child)


def receptive_centre(source: object, row: int, column: int, side: int) -> tuple[float, float]:
    """Centre of mass of the gradient of one cell of the feature map, edge coordinates of the input."""
    backbone = source._backbone()
    pixels = torch.ones(1, 3, side, side, requires_grad=True)
    features = backbone(pixels, torch.ones(1, side, side))[-1][0]
    features[0, :, row, column].sum().backward()
    mass = pixels.grad[0].sum(0).double().numpy()
    at = np.arange(side) + 0.5
    return float(mass.sum(1) @ at / mass.sum()), float(mass.sum(0) @ at / mass.sum())


def test_a_cell_lies_where_the_network_looks() -> None:
    source = tiny("Conditional DETR", image_size=320)
    averaging(source._backbone())
    batch = source.encode(photos((320, 320)))
    grid = source.cells(batch)
    stride = 32
    assert grid.shape == (10, 10)
    for cell in (4, 5):  # far enough from the borders for a whole window
        y, x = receptive_centre(source, cell, cell + 1, 320)
        assert y == pytest.approx(stride * cell + 0.5, abs=0.05)
        assert x == pytest.approx(stride * (cell + 1) + 0.5, abs=0.05)
        assert grid.centres[0][cell] == pytest.approx(y, abs=0.05)
        assert grid.centres[1][cell + 1] == pytest.approx(x, abs=0.05)


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"), [(12, 12, 96, 96), (3, 5, 65, 160), (1, 2, 20, 64)]
)
def test_cells_tile_the_input(rows: int, columns: int, height: int, width: int) -> None:
    stride = 8 if rows == 12 else 32
    grid = corner_cells(rows, columns, height=height, width=width, stride=stride)
    assert (grid.y[0], grid.y[-1], grid.x[0], grid.x[-1]) == (0, height, 0, width)
    assert grid.shape == (rows, columns)
    assert grid.areas.sum() == pytest.approx(height * width)
    inner = grid.centres[1][1:-1]
    np.testing.assert_allclose(inner, stride * np.arange(1, columns - 1) + 0.5)


def test_tokens_of_unequal_cells_are_laid_back_on_them() -> None:
    rng = np.random.default_rng(0)
    grid = CellGrid(np.array([0.0, 4.5, 12.5, 24.0]), np.array([0.0, 4.5, 12.5, 20.5, 32.0]))
    tokens = grid_tokens(grid)
    values = rng.random((2, 12))
    laid, found = tokens_to_cells(values, tokens)
    np.testing.assert_array_equal(laid, values.reshape(2, 3, 4))
    np.testing.assert_allclose(found.y, grid.y)
    np.testing.assert_allclose(found.x, grid.x)
    order = rng.permutation(12)
    again, _ = tokens_to_cells(values[:, order], tokens.take(order.tolist()))
    np.testing.assert_array_equal(again, laid)


def test_only_known_backbones_are_shifted() -> None:
    assert looks_from_corners(tiny("DETR").module.config)
    assert not looks_from_corners(tiny("RF-DETR").module.config)
    assert not looks_from_corners(tiny("MaskFormer").module.config)
    assert not looks_from_corners(object())


def test_levels_of_a_pyramid_look_half_a_cell_higher_than_they_are_laid() -> None:
    """Measured, and said in the docs: cell i of stride S looks at pixel S i, and lies at S (i + 1/2).

    Deformable attention samples in the model's own coordinates, in which levels tile the input; so they are laid.
    """
    side = 512
    source = tiny("Deformable DETR", image_size=side)
    base = source.module.model  # type: ignore[attr-defined]
    averaging(base.backbone)
    averaging(base.input_proj)
    for projection in base.input_proj:
        projection[1] = nn.Identity()  # group norm looks everywhere
    pixels = torch.ones(1, 3, side, side, requires_grad=True)
    found = base.backbone(pixels, torch.ones(1, side, side))
    maps = [one[0] for one in (found[0] if isinstance(found, tuple) else found)]
    levels = [base.input_proj[i](one) for i, one in enumerate(maps)]
    levels.append(base.input_proj[len(maps)](maps[-1]))
    strides = [side // level.shape[-1] for level in levels]
    assert strides == [8, 16, 32, 64]
    tokens = source._tokens(source.encode(photos((side, side))))  # type: ignore[attr-defined]
    for number, (level, stride) in enumerate(zip(levels, strides, strict=True)):
        cell = level.shape[-1] // 2
        (gradient,) = torch.autograd.grad(level[0, :, cell, cell - 1].sum(), pixels, retain_graph=True)
        mass, at = gradient[0].sum(0).double().numpy(), np.arange(side) + 0.5
        y, x = float(mass.sum(1) @ at / mass.sum()), float(mass.sum(0) @ at / mass.sum())
        assert (y, x) == pytest.approx((stride * cell + 0.5, stride * (cell - 1) + 0.5), abs=0.01)
        here = tokens.level == number
        laid = (
            tokens.y[here].reshape(level.shape[-2:])[cell, 0],
            tokens.x[here].reshape(level.shape[-2:])[0, cell - 1],
        )
        assert (laid[0] - y, laid[1] - x) == pytest.approx(((stride - 1) / 2, (stride - 1) / 2), abs=0.01)
