"""Pixels to cells and back, against loops over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.attribution.pooling import cell_numbers, feature_mask, pool_pixels
from foveate.errors import UsageError
from foveate.geometry import CellGrid


@pytest.mark.parametrize("pooling", ["signed", "abs"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_pooling_equals_a_loop(pooling, reduce):
    values = torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = CellGrid(np.array([0.0, 4.0, 12.0]), np.array([0.0, 2.0, 4.0, 8.0]))
    got = pool_pixels(values, grid, pooling=pooling, reduce=reduce)
    for n in range(2):
        for i, (top, bottom) in enumerate([(0, 4), (4, 12)]):
            for j, (left, right) in enumerate([(0, 2), (2, 4), (4, 8)]):
                part = values[n, :, top:bottom, left:right].numpy()
                part = abs(part) if pooling == "abs" else part
                want = part.sum() if reduce == "sum" else part.mean()
                assert got[n, i, j] == pytest.approx(want, rel=1e-12)


def test_sum_keeps_completeness_on_cells_that_cut_pixels():
    values = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = CellGrid.regular(3, 3, height=10, width=10)
    assert pool_pixels(values, grid, pooling="signed", reduce="sum").sum() == pytest.approx(float(values.sum()))


def test_absolute_values_are_taken_before_anything_is_added():
    values = torch.tensor([1.0, -1.0, 0.0])[:, None, None].expand(3, 2, 2)[None]
    grid = CellGrid.regular(1, 1, height=2, width=2)
    assert pool_pixels(values, grid, pooling="signed", reduce="sum")[0, 0, 0] == 0.0
    assert pool_pixels(values, grid, pooling="abs", reduce="sum")[0, 0, 0] == 8.0


def test_clip_frames_stay_apart():
    values = torch.arange(2.0)[None, :, None, None, None].expand(1, 2, 3, 4, 4)
    grid = CellGrid.regular(2, 2, height=4, width=4)
    got = pool_pixels(values, grid, pooling="signed", reduce="mean")
    assert got.shape == (1, 2, 2, 2)
    np.testing.assert_array_equal(got[0, :, 0, 0], [0.0, 1.0])


@pytest.mark.parametrize(("rows", "columns", "height", "width"), [(4, 4, 32, 32), (3, 5, 14, 17), (1, 1, 3, 2)])
def test_cell_numbers_equal_a_loop(rows, columns, height, width):
    grid = CellGrid.regular(rows, columns, height=height, width=width)
    got = cell_numbers(grid, height, width)
    for y in range(height):
        for x in range(width):
            row = next(i for i in range(rows) if grid.y[i] <= y + 0.5 < grid.y[i + 1])
            column = next(j for j in range(columns) if grid.x[j] <= x + 0.5 < grid.x[j + 1])
            assert got[y, x] == row * columns + column


def test_pixels_beyond_the_patches_join_the_nearest_cell():
    got = cell_numbers(CellGrid.regular(2, 2, height=8, width=8), 10, 9)
    assert (got[8:] == got[7]).all()
    assert (got[:, 8] == got[:, 7]).all()


def test_feature_mask_numbers_every_frame_by_itself():
    grid = CellGrid.regular(2, 2, height=4, width=4)
    image = feature_mask(torch.zeros(5, 3, 4, 4), grid)
    assert image.shape == (1, 3, 4, 4)
    assert (image == image[:, :1]).all()
    assert sorted(image.unique().tolist()) == [0, 1, 2, 3]
    clip = feature_mask(torch.zeros(5, 2, 3, 4, 4), grid)
    assert clip.shape == (1, 2, 3, 4, 4)
    assert sorted(clip.unique().tolist()) == list(range(8))
    assert (clip[0, 1] - clip[0, 0] == 4).all()


def test_bad_input():
    with pytest.raises(UsageError, match="do not each hold a pixel"):
        cell_numbers(CellGrid.regular(8, 8, height=4, width=4), 4, 4)
    with pytest.raises(UsageError, match="pooling"):
        pool_pixels(
            torch.zeros(1, 3, 4, 4), CellGrid.regular(2, 2, height=4, width=4), pooling="max", reduce="sum"
        )
