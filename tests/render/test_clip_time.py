"""Figures over frames: what they draw is what they were given, and what cannot be drawn is said."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.render.clip_overlay import ClipMap, Overlay, TrackMarks
from foveate.render.clip_time import Band, cues, evolution, film_strip, frame_matrices, importance, ribbon
from foveate.render.scale import lift
from foveate.render.style import Picture
from foveate.stats.intervals import Interval, bootstrap_mean

RNG = np.random.default_rng(6)
SOURCE = "tests/tiny · decoder.cross"


def thumbnails(count: int) -> list[np.ndarray]:
    return [RNG.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(count)]


def mesh(picture: Picture) -> QuadMesh:
    return next(c for axis in picture.figure.axes for c in axis.collections if isinstance(c, QuadMesh))


def test_a_ribbon_holds_the_log_of_every_lift_and_leaves_absent_frames_white(tmp_path: Path) -> None:
    lifts = np.exp(RNG.normal(size=(2, 5)))
    lifts[1, 3] = np.nan
    picture = ribbon(
        lifts, ["layer 0", "layer 1"], thumbnails(5), title="t", source=SOURCE, times=np.arange(5) / 5
    )
    values = np.ma.getdata(mesh(picture).get_array()).reshape(2, 5)
    known = np.isfinite(lifts)
    np.testing.assert_allclose(values[known], np.log2(lifts)[known])
    assert np.ma.getmaskarray(mesh(picture).get_array()).reshape(2, 5)[1, 3]
    assert "white: the track is not there" in picture.caption
    assert SOURCE in picture.caption
    below = picture.figure.axes[1]
    assert [label.get_text() for label in below.get_xticklabels()] == ["0.00", "0.20", "0.40", "0.60", "0.80"]
    assert picture.save(tmp_path / "ribbon.png").stat().st_size > 2000


def test_a_long_ribbon_shows_some_frames_and_says_so() -> None:
    picture = ribbon(np.ones((1, 40)), ["layer 0"], thumbnails(40), title="t", source=SOURCE)
    assert "12 of 40 frames shown above" in picture.caption
    assert picture.figure.axes[0].images[0].get_array().shape[1] == 12 * 30


def test_ribbons_that_do_not_fit() -> None:
    for table, names, count in (
        (np.ones((2, 3)), ["a"], 3),
        (np.ones((1, 3)), ["a"], 4),
        (np.ones((0, 0)), [], 0),
    ):
        with pytest.raises(UsageError, match="ribbon"):
            ribbon(table, names, thumbnails(count), title="t", source=SOURCE)


def test_matrices_share_one_fixed_scale() -> None:
    tables = {f"layer {i}": np.exp(RNG.normal(size=(4, 4))) for i in range(5)}
    picture = frame_matrices(tables, title="t", source=SOURCE, n=7)
    images = [axis.images[0] for axis in picture.figure.axes if axis.images]
    assert len(images) == 5
    for image, table in zip(images, tables.values(), strict=True):
        np.testing.assert_allclose(np.asarray(image.get_array()), np.log2(table))
        assert image.get_clim() == (-3, 5)
    assert "7 videos" in picture.caption
    assert "does not show use of motion" in picture.caption
    with pytest.raises(UsageError, match="square"):
        frame_matrices({"a": np.ones((2, 3))}, title="t", source=SOURCE, n=1)
    with pytest.raises(UsageError, match="square"):
        frame_matrices({}, title="t", source=SOURCE, n=1)


def test_bands_are_bootstrap_intervals() -> None:
    values = RNG.random((9, 3))
    values[2, 1] = np.nan
    band = Band.over("x", values, seed=4)
    for k in range(3):
        span = bootstrap_mean(values[:, k], seed=4)
        assert (band.mean[k], band.low[k], band.high[k]) == (span.estimate, span.low, span.high)


def test_importance_beside_deletion() -> None:
    own, random = Band.over("readout", RNG.random((5, 4))), Band.over("random", RNG.random((5, 5)), control=True)
    picture = importance([own], [own, random], title="t", source=SOURCE)
    left, right = picture.figure.axes
    np.testing.assert_array_equal(left.lines[0].get_ydata(), own.mean)
    np.testing.assert_allclose(right.lines[1].get_xdata(), np.linspace(0, 1, 5))
    assert right.lines[1].get_linestyle() == ":"
    assert len(importance([own], title="t", source=SOURCE).figure.axes) == 1
    with pytest.raises(UsageError, match="no line"):
        importance([], title="t", source=SOURCE)


def test_change_points_are_drawn_between_frames() -> None:
    band = Band.over("entropy", RNG.random((5, 8)))
    picture = evolution([band], title="t", source=SOURCE, unit="nat", changes=[3])
    assert picture.figure.axes[0].lines[1].get_xdata()[0] == 2.5
    assert "1 change point" in picture.caption
    assert "no change point" in evolution([band], title="t", source=SOURCE, unit="nat").caption


def test_a_film_strip_of_a_track() -> None:
    grid = CellGrid.regular(2, 3, height=20, width=30)
    laid = ClipMap(RNG.random((15, 2, 3)), grid, Geometry.identity(20, 30), np.arange(15), 1 / 90)
    track = TrackMarks("0 fish", 0, np.ones((15, 4, 6)), np.tile([2.0, 3.0, 18.0, 27.0], (15, 1)))
    picture = film_strip(thumbnails(15), Overlay(lift(), laid, [track]), title="t", source=SOURCE)
    shown = [axis for axis in picture.figure.axes if axis.images]
    assert len(shown) == 12
    assert [int(re.findall(r"\d+", axis.get_title(loc="left"))[0]) for axis in shown][::11] == [0, 14]
    assert "12 of 15 frames" in picture.caption
    assert "one scale over the clip" in picture.caption
    plain = film_strip(thumbnails(2), Overlay(lift()), title="t", source=SOURCE)
    assert "scale" not in plain.caption
    with pytest.raises(UsageError, match="no frame"):
        film_strip([], Overlay(lift()), title="t", source=SOURCE)


def test_cues_with_their_verdicts() -> None:
    effects = {
        "colour": {"appearance": Interval(0.5, 0.4, 0.6, 20), "motion": Interval(0.0, -0.1, 0.1, 20)},
        "xor": {"appearance": Interval(0.1, -0.2, 0.3, 20), "motion": Interval(0.2, 0.1, 0.3, 20)},
    }
    picture = cues(effects, {"colour": "appearance", "xor": "inconclusive"}, title="t", source=SOURCE)
    left, right = picture.figure.axes
    assert [label.get_text() for label in left.get_yticklabels()] == ["colour (n = 20)", "xor (n = 20)"]
    dots = [line for line in left.lines if line.get_marker() == "o"]
    assert [line.get_xdata()[0] for line in dots] == [0.5, 0.1]
    assert [line.get_markerfacecolor() == "w" for line in dots] == [False, True]
    assert [text.get_text() for text in right.texts] == ["appearance", "inconclusive"]
    with pytest.raises(UsageError, match="verdicts of"):
        cues(effects, {"colour": "appearance"}, title="t", source=SOURCE)
