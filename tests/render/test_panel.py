"""Maps lie on the picture to the pixel; what was not seen is never coloured."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest

from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import TokenAxis
from foveate.render.panel import Panel, outline_visible, show_map, show_photo
from foveate.render.scale import lift, linear, signed
from render_fakes import ZOOM, cropped_panel, rendered

HOT = np.array(matplotlib.colormaps["viridis"](1.0)[:3]) * 255
COLD = np.array(matplotlib.colormaps["viridis"](0.0)[:3]) * 255


def near(canvas: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return np.abs(canvas - colour).max(-1) <= 1


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 5), (7, 7), (7, 0)])
def test_one_hot_cell_lights_exactly_the_pixels_of_its_patch(row: int, column: int) -> None:
    values = np.zeros((8, 8))
    values[row, column] = 1.0
    canvas = rendered(lambda axes: show_map(axes, cropped_panel(values), linear(1.0)))
    expected = np.zeros((80, 120), bool)
    expected[row * 10 : row * 10 + 10, 20 + column * 10 : 20 + column * 10 + 10] = True
    expected = np.kron(expected, np.ones((ZOOM, ZOOM), bool))
    np.testing.assert_array_equal(near(canvas, HOT), expected)


def test_what_the_crop_removed_and_what_is_nan_is_grey() -> None:
    values = np.zeros((8, 8))
    values[2, 2] = np.nan
    canvas = rendered(lambda axes: show_map(axes, cropped_panel(values), linear(1.0)))
    grey = np.ptp(canvas.astype(int), axis=-1) == 0
    expected = np.zeros((80, 120), bool)
    expected[:, :20] = expected[:, 100:] = True
    expected[20:30, 40:50] = True
    np.testing.assert_array_equal(grey, np.kron(expected, np.ones((ZOOM, ZOOM), bool)))
    assert near(canvas, COLD)[~grey].all()  # 0 is a value and gets its colour
    assert len(np.unique(canvas[grey][:, 0])) > 5  # hatched, not flat


def test_padding_that_lies_outside_the_picture_is_cut() -> None:
    """A 40 x 80 picture centred in 80 x 80: the first and last two rows of 8 cells are padding."""
    image = np.zeros((40, 80, 3), np.uint8)
    geometry = Geometry(40, 80, 80, 80, 1.0, 1.0, 20.0, 0.0)
    values = np.arange(64.0).reshape(8, 8)
    panel = Panel(image, geometry, values, CellGrid.regular(8, 8, height=80, width=80), 1.0)
    seen, cells = panel.visible_values
    np.testing.assert_array_equal(seen, values[2:6])
    np.testing.assert_allclose(cells.y, [0, 10, 20, 30, 40])
    assert panel.hidden_share == 0


def test_an_overlay_changes_the_photo_only_where_the_model_saw_it() -> None:
    values = np.ones((8, 8)) / 8
    panel = cropped_panel(values)
    photo = rendered(lambda axes: show_photo(axes, panel, grey=True))

    def overlay(axes) -> None:
        show_photo(axes, panel, grey=True)
        show_map(axes, panel, lift(), alpha=True)

    changed = np.any(rendered(overlay) != photo, axis=-1)
    assert not changed[:, : 20 * ZOOM].any()
    assert not changed[:, 100 * ZOOM :].any()
    assert changed[:, 20 * ZOOM : 100 * ZOOM].mean() > 0.98


def test_the_photo_is_shown_pixel_for_pixel() -> None:
    panel = cropped_panel()
    canvas = rendered(lambda axes: show_photo(axes, panel))
    np.testing.assert_array_equal(canvas[2::ZOOM, 2::ZOOM], panel.image)


def test_the_visible_region_is_outlined_only_where_there_is_a_crop() -> None:
    panel = cropped_panel()
    whole = Panel(panel.image, Geometry.identity(80, 120), panel.values, panel.grid, 1.0)
    blank = rendered(lambda axes: show_photo(axes, panel))

    def drawn(which: Panel) -> np.ndarray:
        def draw(axes) -> None:
            show_photo(axes, which)
            outline_visible(axes, which)

        return rendered(draw)

    np.testing.assert_array_equal(drawn(whole), blank)
    changed = np.any(drawn(panel) != blank, axis=-1)
    assert changed[40 * ZOOM, 20 * ZOOM]
    assert changed[40 * ZOOM, 100 * ZOOM]
    assert not changed[40 * ZOOM, 60 * ZOOM]
    assert panel.hidden_share == pytest.approx(1 / 3)


def test_an_attention_row_knows_its_uniform_level_and_what_left_the_picture() -> None:
    patches = TokenAxis.patches(2, 2, height=8, width=8)
    tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), patches, TokenAxis.of_kind("padding", 3))
    row = np.array([0.3, 0.1, 0.2, 0.3, 0.1, 0, 0, 0])
    panel = Panel.attention(np.zeros((8, 8, 3), np.uint8), Geometry.identity(8, 8), row, tokens)
    np.testing.assert_allclose(panel.values, [[0.1, 0.2], [0.3, 0.1]])
    assert panel.uniform == pytest.approx(1 / 5)  # padding is no key
    assert panel.outside == pytest.approx(0.3)


def test_a_map_is_measured_against_its_mean_and_must_fit_its_grid() -> None:
    grid = CellGrid.regular(2, 2, height=8, width=8)
    image, geometry = np.zeros((8, 8, 3), np.uint8), Geometry.identity(8, 8)
    panel = Panel.of_map(image, geometry, [[1.0, 3.0], [np.nan, 2.0]], grid)
    assert panel.uniform == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(2, 2\)"):
        Panel.of_map(image, geometry, np.zeros((3, 2)), grid)


def test_large_photos_are_reduced_by_area_and_keep_their_place() -> None:
    image = np.zeros((2000, 4000, 3), np.uint8)
    image[1000:, 2000:] = 255
    panel = Panel(image, Geometry.identity(2000, 4000), np.ones((1, 1)), CellGrid([0, 2000], [0, 4000]), 1.0)
    canvas = rendered(lambda axes: show_photo(axes, panel), 40, 80)
    expected = np.zeros((200, 400), np.uint8)
    expected[100:, 200:] = 255
    np.testing.assert_array_equal(canvas[..., 0], expected)


def test_a_signed_map_shows_strength_not_sign_in_its_overlay() -> None:
    scale = signed(2.0)
    np.testing.assert_allclose(scale.share([-2.0, -1.0, 0.0, 2.0, np.nan], 1.0)[:4], [1, 0.5, 0, 1])
