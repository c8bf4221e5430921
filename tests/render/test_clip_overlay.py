"""Frames of a clip as they are shown: every pixel's colour follows from its cell, the scale and the track."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.render.clip_overlay import ClipMap, Overlay, TrackMarks, cell_image, compose, outline
from foveate.render.scale import lift, linear

RNG = np.random.default_rng(1)
HEIGHT, WIDTH, FRAMES = 30, 40, 4
GRID = CellGrid.regular(4, 4, height=16, width=16)
CROPPED = Geometry(HEIGHT, WIDTH, 16, 16, 0.6, 0.6, 0.0, -4.0)  # the right and left of the picture are cut off


def clip() -> list[np.ndarray]:
    return [RNG.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8) for _ in range(FRAMES)]


def laid(values: np.ndarray | None = None, geometry: Geometry | None = None) -> ClipMap:
    made = RNG.random((FRAMES, 4, 4)) if values is None else values
    whole = Geometry(HEIGHT, WIDTH, 16, 16, 16 / HEIGHT, 16 / WIDTH)
    return ClipMap(made, GRID, geometry or whole, np.arange(FRAMES), 1 / 16)


def test_each_pixel_has_the_value_of_the_cell_that_holds_its_centre() -> None:
    values = RNG.random((4, 4))
    found = cell_image(values, GRID, CROPPED, 60, 80)
    for y in range(60):
        for x in range(80):
            v, u = CROPPED.to_input((y + 0.5) / 2, (x + 0.5) / 2)
            if 0 <= v < 16 and 0 <= u < 16:
                assert found[y, x] == values[int(v // 4), int(u // 4)]
            else:
                assert np.isnan(found[y, x])
    assert np.isnan(found).any()


def test_an_outline_lies_inside_its_mask_and_is_as_thick_as_said() -> None:
    mask = np.zeros((6, 8))
    mask[1:5, 2:7] = 1.0
    mask[1, 2] = 0.4  # less than half of the cell
    found = outline(mask, 60, 80, thick=3)
    inside = np.kron(mask >= 0.5, np.ones((10, 10), bool))
    assert not (found & ~inside).any()
    core = np.zeros_like(inside)
    for y in range(60):
        for x in range(80):
            reach = [(y + i, x + j) for i in range(-3, 4) for j in range(-3, 4) if abs(i) + abs(j) <= 3]
            core[y, x] = all(0 <= a < 60 and 0 <= b < 80 and inside[a, b] for a, b in reach)
    np.testing.assert_array_equal(found, inside & ~core)
    assert not outline(np.full((3, 3), np.nan), 30, 30).any()


def test_without_a_map_the_picture_is_as_it_is() -> None:
    frames = clip()
    shown = list(compose(frames, Overlay(lift(), size=WIDTH)))
    for frame, out in zip(frames, shown, strict=True):
        np.testing.assert_array_equal(out[:HEIGHT], frame)


def test_one_scale_over_the_clip() -> None:
    values = np.zeros((FRAMES, 4, 4))
    values[0, 1, 1], values[2, 1, 1] = 0.5, 1.0
    frames = [np.full((HEIGHT, WIDTH, 3), 128, np.uint8)] * FRAMES
    shown = list(compose(frames, Overlay(linear(1.0), laid(values), size=WIDTH)))
    inner = shown[0][9, 12].astype(int), shown[2][9, 12].astype(int)
    expected = []
    for share, rgb in ((0.5, (32.5, 144.8, 140.4)), (1.0, (253.3, 231.1, 36.7))):  # viridis at one half and at one
        alpha = 0.10 + 0.65 * share
        expected.append([128 * (1 - alpha) + c * alpha for c in rgb])
    np.testing.assert_allclose(inner, expected, atol=2.5)


def test_a_frame_without_a_map_shows_the_grey_picture_alone() -> None:
    values = RNG.random((FRAMES, 4, 4))
    values[1] = np.nan
    frames = clip()
    shown = list(compose(frames, Overlay(lift(), laid(values), size=WIDTH)))
    grey = (frames[1] @ np.array([0.299, 0.587, 0.114])).round()
    np.testing.assert_allclose(shown[1][:HEIGHT], np.repeat(grey[..., None], 3, axis=2), atol=1)
    skipped = ClipMap(values, GRID, laid().geometry, np.array([0, -1, 2, 3]), 1 / 16)
    other = list(compose(frames, Overlay(lift(), skipped, size=WIDTH)))
    np.testing.assert_array_equal(other[1], shown[1])


def test_tracks_have_their_own_colour_and_vanish_where_they_are_not() -> None:
    masks = np.zeros((FRAMES, HEIGHT, WIDTH))
    masks[:3, 5:20, 10:30] = 1
    boxes = np.tile([5.0, 10.0, 20.0, 30.0], (FRAMES, 1))
    boxes[3] = np.nan
    frames = [np.full((HEIGHT, WIDTH, 3), 200, np.uint8)] * FRAMES
    track = TrackMarks("7", 1, masks, boxes)
    shown = list(compose(frames, Overlay(lift(), tracks=[track], size=160)))
    assert (shown[0][18 * 4, 10 * 4] == track.colour).all()  # the left border, below the name
    assert (shown[3][: HEIGHT * 4] == 200).all()
    assert TrackMarks("x", 0).colour != track.colour


def test_frames_keep_one_size_with_title_caption_and_scale() -> None:
    overlay = Overlay(
        lift(), laid(), title="swim", caption="a caption that is long enough to be folded " * 4, size=200
    )
    shown = list(compose(clip(), overlay, ["0.0 s", "0.1 s", "0.2 s"]))
    assert len({frame.shape for frame in shown}) == 1
    assert shown[0].shape[1] == 200
    assert shown[0].shape[0] > 150 + 60
    assert not (shown[0] == shown[3])[:18].all()  # one has a time in its title line, the last has none


def test_large_clips_are_reduced_and_small_ones_enlarged_by_whole_numbers() -> None:
    big = [np.zeros((300, 1000, 3), np.uint8)]
    assert next(compose(big, Overlay(lift(), size=500))).shape[1] == 500
    small = [np.arange(HEIGHT * WIDTH * 3, dtype=np.uint8).reshape(HEIGHT, WIDTH, 3)]
    out = next(compose(small, Overlay(lift(), size=130)))
    np.testing.assert_array_equal(out[: 3 * HEIGHT], np.kron(small[0], np.ones((3, 3, 1), np.uint8)))


def test_frames_of_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="frame 1 is"):
        list(compose([clip()[0], np.zeros((8, 8, 3), np.uint8)], Overlay(lift())))
