"""Change points, track time and flicker: planted jumps, loops, and how often noise is taken for a jump."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.evolution import Change, _best, aligned, change_points, flicker

RNG = np.random.default_rng(5)


def test_planted_jumps_are_found() -> None:
    series = np.concatenate([np.full(10, 0.2), np.full(8, 0.9), np.full(12, 0.5)]) + 0.02 * RNG.normal(size=30)
    found = change_points(series)
    assert [change.frame for change in found] == [10, 18]
    assert found[0].before == pytest.approx(series[:10].mean())
    assert found[0].after == pytest.approx(series[10:18].mean())
    assert found[1].after == pytest.approx(series[18:].mean())
    assert all(change.p <= 0.05 for change in found)


def test_noise_is_seldom_cut() -> None:
    cut = sum(bool(change_points(RNG.normal(size=20), permutations=199, seed=s)) for s in range(200))
    assert cut / 200 < 0.10  # the level is .05; a binomial of 200 draws stays below .10 with p > .999


def test_the_best_split_against_a_loop() -> None:
    rows = RNG.normal(size=(5, 9))
    gain, cut = _best(rows)
    for row, g, c in zip(rows, gain, cut, strict=True):
        whole = ((row - row.mean()) ** 2).sum()
        falls = {
            k: whole - ((row[:k] - row[:k].mean()) ** 2).sum() - ((row[k:] - row[k:].mean()) ** 2).sum()
            for k in range(2, 8)
        }
        assert c == max(falls, key=lambda k: falls[k])
        assert g == pytest.approx(falls[int(c)])


def test_short_constant_and_unknown() -> None:
    assert change_points(np.ones(40)) == ()
    assert change_points([1.0, 5.0, 1.0]) == ()
    assert change_points([]) == ()
    assert change_points(np.full(9, np.nan)) == ()
    series = np.concatenate([np.zeros(10), [np.nan, np.nan], np.ones(10)])
    found = change_points(series + 1e-3 * RNG.normal(size=22))
    assert [change.frame for change in found] == [12]  # the first known frame after the gap
    with pytest.raises(UsageError, match="one value a frame"):
        change_points(np.ones((2, 3)))


def test_one_odd_frame_is_no_segment() -> None:
    series = 0.01 * RNG.normal(size=20)
    series[0] = 5.0
    assert all(change.frame >= 2 for change in change_points(series))


def test_a_change_is_the_same_with_the_same_seed() -> None:
    series = np.concatenate([RNG.normal(size=12), 1 + RNG.normal(size=12)])
    assert change_points(series, seed=3) == change_points(series, seed=3)
    assert isinstance(change_points(np.r_[np.zeros(9), np.ones(9)] + 0.01 * RNG.normal(size=18))[0], Change)


def test_track_time_against_a_loop() -> None:
    values, start = RNG.random((4, 7)), np.array([0, 3, 6, 2])
    found = aligned(values, start, 4, before=2)
    for track in range(4):
        for k in range(6):
            frame = start[track] + k - 2
            if 0 <= frame < 7:
                assert found[track, k] == values[track, frame]
            else:
                assert np.isnan(found[track, k])
    with pytest.raises(UsageError, match="one start a track"):
        aligned(values, [0], 3)


def test_flicker_is_total_variation() -> None:
    maps = RNG.random((2, 5, 6))
    found = flicker(maps)
    share = maps / maps.sum(-1, keepdims=True)
    for v in range(2):
        for t in range(4):
            assert found[v, t] == pytest.approx(np.abs(share[v, t + 1] - share[v, t]).sum() / 2)
    jump = np.zeros((2, 4))
    jump[0, 0] = jump[1, 3] = 7.0
    assert flicker(jump).tolist() == [1.0]
    assert flicker(np.ones((3, 4))).tolist() == [0.0, 0.0]


def test_flicker_for_each_unit_of_change_in_the_picture() -> None:
    maps = RNG.random((4, 6))
    pictures = 255 * RNG.random((4, 6))
    seen = [np.abs(pictures[t + 1] - pictures[t]).mean() / 255 for t in range(3)]
    np.testing.assert_allclose(flicker(maps, pictures), flicker(maps) / seen)
    still = np.ones((4, 6))
    assert np.isinf(flicker(maps, still)).all()
    assert flicker(still, still).tolist() == [0.0, 0.0, 0.0]


def test_what_flicker_refuses() -> None:
    with pytest.raises(UsageError, match="at least two frames"):
        flicker(np.ones((1, 4)))
    with pytest.raises(UsageError, match="negative"):
        flicker(-np.ones((2, 4)))
    with pytest.raises(UsageError, match="differ in frames or cells"):
        flicker(np.ones((2, 4)), np.ones((3, 4)))
    assert np.isnan(flicker(np.array([[0.0, 0.0], [1.0, 1.0]]))).all()
