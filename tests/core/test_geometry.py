"""Regridding keeps mass and means; geometry maps every point there and back; crops leave NaN."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.geometry import CellGrid, Geometry, regrid, tokens_to_cells
from foveate.interfaces import TokenAxis


def slow_regrid(values, source, target, reduce, window):
    """Loop over every pair of cells and add up the shared area."""
    low_y, low_x, high_y, high_x = window
    out = np.full(target.shape, np.nan)
    for i in range(target.shape[0]):
        for j in range(target.shape[1]):
            total = covered = 0.0
            for k in range(source.shape[0]):
                for m in range(source.shape[1]):
                    h = min(target.y[i + 1], source.y[k + 1], high_y) - max(target.y[i], source.y[k], low_y)
                    w = min(target.x[j + 1], source.x[m + 1], high_x) - max(target.x[j], source.x[m], low_x)
                    if h <= 0 or w <= 0 or not np.isfinite(values[k, m]):
                        continue
                    area = h * w
                    cell = (source.y[k + 1] - source.y[k]) * (source.x[m + 1] - source.x[m])
                    total += values[k, m] * area / (cell if reduce == "sum" else 1.0)
                    covered += area
            if covered > 0:
                out[i, j] = total if reduce == "sum" else total / covered
    return out


def random_grid(rng, rows, columns):
    return CellGrid(
        np.cumsum(rng.uniform(0.2, 3, rows + 1)) - rng.uniform(0, 4),
        np.cumsum(rng.uniform(0.2, 3, columns + 1)) - rng.uniform(0, 4),
    )


@pytest.mark.parametrize("reduce", ["mean", "sum"])
@pytest.mark.parametrize("seed", range(5))
def test_regrid_equals_the_slow_loop(reduce, seed):
    rng = np.random.default_rng(seed)
    source, target = random_grid(rng, 5, 4), random_grid(rng, 3, 6)
    values = rng.normal(size=source.shape)
    values[1, 2] = np.nan
    window = (0.0, 0.5, 6.0, 5.0)
    expected = slow_regrid(values, source, target, reduce, window)
    np.testing.assert_allclose(regrid(values, source, target, reduce=reduce, window=window), expected, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**31))
def test_regrid_keeps_mass_and_constants(rows, columns, finer, seed):
    rng = np.random.default_rng(seed)
    source = CellGrid.regular(rows, columns, height=7.0, width=11.0)
    target = CellGrid.regular(finer, finer + 1, height=7.0, width=11.0)
    values = rng.uniform(size=(2, rows, columns))
    moved = regrid(values, source, target, reduce="sum")
    np.testing.assert_allclose(moved.sum((-2, -1)), values.sum((-2, -1)))
    np.testing.assert_allclose(regrid(np.full((rows, columns), 3.5), source, target), 3.5)


def test_geometry_round_trip_and_visible_region():
    # 1920 x 1080, shortest edge to 336, centre crop 336: 597 wide, 130.5 px cut left and right.
    geometry = Geometry(1080, 1920, 336, 336, 336 / 1080, 597 / 1920, 0.0, -130.0)
    for y, x in [(0.0, 0.0), (540.5, 960.5), (1079.9, 3.3)]:
        np.testing.assert_allclose(geometry.to_original(*geometry.to_input(y, x)), (y, x))
    top, left, bottom, right = geometry.visible
    assert (top, bottom) == (0.0, 1080.0)
    assert left == pytest.approx(130 * 1920 / 597)
    assert right == pytest.approx(466 * 1920 / 597)
    canvas = geometry.to_canvas(
        np.ones((24, 24)), CellGrid.regular(24, 24, height=336, width=336), geometry.canvas()
    )
    assert canvas.shape == (1080, 1920)
    assert np.isnan(canvas[:, : int(left)]).all()
    assert np.isnan(canvas[:, int(right) + 1 :]).all()
    np.testing.assert_allclose(canvas[:, int(left) + 1 : int(right)], 1.0)


def test_padding_is_not_on_the_canvas():
    geometry = Geometry(10, 20, 20, 20, 1.0, 1.0, 5.0, 0.0)  # padded above and below
    assert geometry.visible == (0.0, 0.0, 10.0, 20.0)
    values = np.arange(400.0).reshape(20, 20)
    canvas = geometry.to_canvas(values, CellGrid.regular(20, 20, height=20, width=20), geometry.canvas())
    np.testing.assert_array_equal(canvas, values[5:15])


def test_canvas_is_bounded():
    assert Geometry.identity(10_000, 5_000).canvas(max_side=1000).shape == (1000, 500)


def test_tokens_to_cells_places_every_patch_and_skips_cls():
    tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(3, 5, height=30.0, width=100.0))
    laid, grid = tokens_to_cells(np.arange(16.0), tokens)
    np.testing.assert_array_equal(laid, np.arange(1.0, 16.0).reshape(3, 5))
    assert grid == CellGrid.regular(3, 5, height=30.0, width=100.0)


def test_tokens_to_cells_follows_positions_not_order():
    tokens = TokenAxis.patches(2, 2, height=4.0, width=4.0)
    order = np.array([3, 1, 0, 2])
    shuffled = TokenAxis(
        *(getattr(tokens, n)[order] for n in ("kind", "y", "x", "height", "width", "level", "frame"))
    )
    laid, _ = tokens_to_cells(np.arange(4.0)[order], shuffled)
    np.testing.assert_array_equal(laid, [[0.0, 1.0], [2.0, 3.0]])


def test_two_levels_are_refused():
    tokens = TokenAxis.concat(
        TokenAxis.patches(2, 2, height=4.0, width=4.0), TokenAxis.patches(1, 1, height=4.0, width=4.0, level=1)
    )
    with pytest.raises(ValueError, match="not one grid"):
        tokens_to_cells(np.zeros(5), tokens)


def test_bad_edges_are_refused():
    with pytest.raises(ValueError, match="increasing"):
        CellGrid(np.array([0.0, 0.0, 1.0]), np.array([0.0, 1.0]))
