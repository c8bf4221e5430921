"""Mass in boxes and masks against a count over very fine pieces."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.detection.mass import box_shares, mask_shares, region_mass, union_share
from foveate.geometry import CellGrid

FINE = 60  # pieces a unit of length


def uneven() -> CellGrid:
    return CellGrid(np.array([0.0, 2.0, 3.0, 7.0]), np.array([1.0, 2.5, 6.0, 7.0, 10.0]))


def random_boxes(seed: int, count: int = 5) -> np.ndarray:
    """Edges on multiples of 1/60, some outside of the grid."""
    rng = np.random.default_rng(seed)
    y = np.sort(rng.integers(-FINE, 8 * FINE, (count, 2)), axis=1)
    x = np.sort(rng.integers(-FINE, 11 * FINE, (count, 2)), axis=1)
    return np.stack([y[:, 0], x[:, 0], y[:, 1], x[:, 1]], 1) / FINE


def slow_inside(grid: CellGrid, boxes: np.ndarray) -> np.ndarray:
    """Share of each cell inside any of the boxes, by counting pieces of 1/60 x 1/60."""
    out = np.zeros(grid.shape)
    for row, column in np.ndindex(grid.shape):
        y = np.arange(grid.y[row] * FINE, grid.y[row + 1] * FINE) / FINE + 0.5 / FINE
        x = np.arange(grid.x[column] * FINE, grid.x[column + 1] * FINE) / FINE + 0.5 / FINE
        inside = np.zeros((y.size, x.size), bool)
        for top, left, bottom, right in boxes:
            inside |= ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))[None]
        out[row, column] = inside.mean()
    return out


@pytest.mark.parametrize("seed", range(4))
def test_shares_of_boxes_and_of_their_union_are_those_counted(seed: int) -> None:
    grid, boxes = uneven(), random_boxes(seed)
    shares = box_shares(grid, boxes)
    assert shares.shape == (5, *grid.shape)
    for box, share in zip(boxes, shares, strict=True):
        np.testing.assert_allclose(share, slow_inside(grid, box[None]), atol=1e-9)
    np.testing.assert_allclose(union_share(grid, boxes), slow_inside(grid, boxes), atol=1e-9)
    assert (union_share(grid, boxes) >= shares.max(0) - 1e-12).all()


def test_no_box_and_a_box_that_is_not_a_number() -> None:
    grid = uneven()
    assert box_shares(grid, np.empty((0, 4))).shape == (0, *grid.shape)
    assert (union_share(grid, np.empty((0, 4))) == 0).all()
    boxes = np.array([[0.0, 0.0, 9.0, 9.0], [np.nan] * 4])
    assert np.isnan(box_shares(grid, boxes)[1]).all()
    np.testing.assert_array_equal(union_share(grid, boxes), union_share(grid, boxes[:1]))


def test_a_mask_that_is_a_box_has_the_shares_of_the_box() -> None:
    rng = np.random.default_rng(0)
    grid = CellGrid(np.array([0.0, 2.0, 5.0, 7.0]), np.array([0.0, 4.0, 6.0, 9.0]))
    masks = np.zeros((3, 7, 9), bool)
    boxes = np.empty((3, 4))
    for mask, box in zip(masks, boxes, strict=True):
        (top, bottom), (left, right) = (np.sort(rng.choice(size + 1, 2, replace=False)) for size in (7, 9))
        mask[top:bottom, left:right] = True
        box[:] = top, left, bottom, right
    np.testing.assert_allclose(mask_shares(grid, masks), box_shares(grid, boxes))


def test_mass_is_shared_by_area_and_nothing_is_lost() -> None:
    rng = np.random.default_rng(1)
    grid, boxes = uneven(), random_boxes(1)
    maps = rng.random((3, *grid.shape))
    regions = np.concatenate([box_shares(grid, boxes[:1]), 1 - box_shares(grid, boxes[:1])])
    mass = region_mass(maps, regions)
    np.testing.assert_allclose(mass.sum(1), 1.0)
    expected = [(m * regions[0]).sum() / m.sum() for m in maps]
    np.testing.assert_allclose(mass[:, 0], expected)
    np.testing.assert_allclose(region_mass(maps * 7, regions), mass)


def test_a_map_without_mass_is_unknown_and_cells_not_captured_hold_none() -> None:
    grid = uneven()
    maps = np.zeros((2, *grid.shape))
    maps[1, 0] = np.nan
    maps[1, 1] = 2.0
    top = np.zeros((1, *grid.shape))
    top[0, 1, :2] = 1.0
    np.testing.assert_allclose(region_mass(maps, top), [[np.nan], [0.5]])
