"""The common ground of two models: against a literal pixel count, and what may not change a map."""

import numpy as np
import pytest

from foveate.compare.canvas import common_window, lay, meet
from foveate.compare.maps import MapRule, MapSet
from foveate.geometry import CellGrid, Geometry

RULE = MapRule("readout", "last", "mean")


def maps(values, geometry, side, rule=RULE, labels=None):
    values = np.asarray(values, float)
    grid = CellGrid.regular(*values.shape[1:], height=side, width=side)
    n = len(values)
    return MapSet("m", rule, values, grid, tuple(geometry), labels or ("",) * n, np.zeros(n))


def whole(height=48, width=48, side=24):
    return Geometry(height, width, side, side, side / height, side / width)


def centre_crop(height, width, side):
    """Shortest side to ``side``, centre crop."""
    scale = side / min(height, width)
    return Geometry(
        height, width, side, side, scale, scale, -(height * scale - side) / 2, -(width * scale - side) / 2
    )


def slow_lay(values, geometry, cells, window, fine=8):
    """Sample every original pixel finely: mean value per common cell, and the mass that is left."""
    rows, columns = values.shape
    ys = (np.arange(geometry.original_height * fine) + 0.5) / fine
    xs = (np.arange(geometry.original_width * fine) + 0.5) / fine
    total, weight = np.zeros((cells.y.size - 1, cells.x.size - 1)), np.zeros((cells.y.size - 1, cells.x.size - 1))
    for y in ys:
        for x in xs:
            iy, ix = geometry.to_input(y, x)
            if not (0 <= iy < geometry.input_height and 0 <= ix < geometry.input_width):
                continue
            if not (window[0] <= y < window[2] and window[1] <= x < window[3]):
                continue
            r, c = np.searchsorted(cells.y, y, "right") - 1, np.searchsorted(cells.x, x, "right") - 1
            if 0 <= r < total.shape[0] and 0 <= c < total.shape[1]:
                total[r, c] += values[
                    int(iy / geometry.input_height * rows), int(ix / geometry.input_width * columns)
                ]
                weight[r, c] += 1
    with np.errstate(invalid="ignore"):
        return total / weight


def test_densities_are_those_of_a_literal_pixel_count():
    values = np.random.default_rng(0).random((4, 4))
    geometry = centre_crop(12, 20, 16)
    cells = CellGrid.regular(3, 5, height=12, width=20)
    window = (0.0, 4.0, 12.0, 16.0)
    laid = lay(values, CellGrid.regular(4, 4, height=16, width=16), geometry, cells, window)
    slow = slow_lay(values, geometry, cells, window)
    seen = np.isfinite(laid.density)
    assert seen.sum() == 9  # columns 4..16 cover the three middle cells
    np.testing.assert_allclose(laid.density[seen], slow[seen], atol=1e-9)
    assert laid.lost == pytest.approx(0.0, abs=1e-12)


def test_the_same_map_on_two_grids_and_crops_is_the_same_on_common_ground():
    """A smooth function of the original picture, seen through two preprocessings."""

    def picture(geometry, n):
        edges = np.linspace(0, geometry.input_height, n + 1)
        y, x = (edges[:-1] + edges[1:]) / 2, (edges[:-1] + edges[1:]) / 2
        oy, ox = np.meshgrid(
            (y - geometry.offset_y) / geometry.scale_y, (x - geometry.offset_x) / geometry.scale_x, indexing="ij"
        )
        return 0.5 + oy / 100 + 2 * ox / 100  # linear, so that cell means are centre values

    g1, g2 = whole(40, 80, 32), centre_crop(40, 80, 48)
    a = maps([picture(g1, 4)], [g1], 32)
    b = maps([picture(g2, 12)], [g2], 48)
    meeting = meet(a, b)
    assert meeting.coarser == "a"
    assert meeting.shape == (4, 4)
    both = np.isfinite(meeting.a[0])
    assert both.sum() == 8  # the crop sees columns 20..60 of 80: two of four cell columns
    np.testing.assert_array_equal(both, np.isfinite(meeting.b[0]))
    np.testing.assert_allclose(meeting.a[0][both], meeting.b[0][both], atol=1e-9)
    assert meeting.shared[0] == pytest.approx(0.5)


def test_lost_mass_is_what_lies_outside_the_other_models_view():
    values = np.zeros((1, 4, 4))
    values[0, 0, 0], values[0, 2, 2] = 3.0, 1.0
    a, b = maps(values, [whole(40, 40, 32)], 32), maps(np.ones((1, 2, 2)), [centre_crop(40, 40, 16)], 16)
    assert meet(a, b).lost_a[0] == pytest.approx(0.0)
    narrow = Geometry(40, 40, 16, 16, 0.8, 0.8, -16, -16)  # sees the lower right quarter
    meeting = meet(a, maps(np.ones((1, 2, 2)), [narrow], 16))
    assert meeting.lost_a[0] == pytest.approx(0.75)
    assert meeting.lost_b[0] == pytest.approx(0.0)


def test_cells_that_are_mostly_hidden_do_not_count_and_their_mass_is_lost():
    a = maps(np.ones((1, 2, 2)), [whole(40, 40, 32)], 32)
    crop = Geometry(40, 40, 16, 16, 16 / 26, 16 / 26, 0.0, 0.0)  # sees 26 of 40: cells of 20 are 30 % covered
    meeting = meet(a, maps(np.ones((1, 4, 4)), [crop], 16))
    np.testing.assert_array_equal(np.isfinite(meeting.a[0].reshape(2, 2)), [[True, False], [False, False]])
    assert meeting.lost_a[0] == pytest.approx(0.75)
    assert meeting.lost_b[0] == pytest.approx(1 - (20 / 26) ** 2)


def test_no_common_part_is_all_lost():
    left = Geometry(40, 40, 16, 16, 0.8, 0.8, 0.0, 0.0)
    right = Geometry(40, 40, 16, 16, 0.8, 0.8, 0.0, -16.0)
    assert common_window(left, right) is None
    meeting = meet(maps(np.ones((1, 2, 2)), [left], 16), maps(np.ones((1, 2, 2)), [right], 16))
    assert np.isnan(meeting.a).all()
    assert meeting.lost_a[0] == 1.0
    assert meeting.shared[0] == 0.0


def test_padding_holds_no_picture_and_its_mass_is_lost():
    padded = Geometry(20, 40, 32, 32, 0.8, 0.8, 8.0, 0.0)  # 16 rows of picture between two bands of 8
    a = maps(np.ones((1, 4, 4)), [padded], 32)
    meeting = meet(a, maps(np.ones((1, 4, 4)), [Geometry(20, 40, 16, 16, 0.8, 0.4)], 16))
    assert meeting.lost_a[0] == pytest.approx(0.5)


def test_singles_equal_the_batch_and_swapping_sides_swaps_the_result():
    rng = np.random.default_rng(3)
    shapes = [(40, 60), (60, 40), (50, 50)]
    a = maps(rng.random((3, 4, 4)), [whole(h, w, 32) for h, w in shapes], 32)
    b = maps(rng.random((3, 6, 6)), [centre_crop(h, w, 48) for h, w in shapes], 48)
    together = meet(a, b)
    assert together.coarser == "a"
    for i in range(3):
        alone = meet(a.take([i]), b.take([i]))
        np.testing.assert_array_equal(alone.a[0], together.a[i])
        np.testing.assert_array_equal(alone.b[0], together.b[i])
    swapped = meet(b, a)
    assert swapped.coarser == "b"
    np.testing.assert_array_equal(swapped.b, together.a)
