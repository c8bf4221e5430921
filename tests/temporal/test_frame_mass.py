"""Mass between frames against loops over every query and key, and what uniform rows must give."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.frame_mass import frame_mass, horizon, lag_profile, past_share

RNG = np.random.default_rng(0)


def rows(*shape: int) -> np.ndarray:
    made = RNG.exponential(size=shape) ** 3
    return made / made.sum(-1, keepdims=True)


def slow(attention: np.ndarray, query: list[int], key: list[int], frames: int) -> np.ndarray:
    table = np.full((frames, frames), np.nan)
    for t in range(frames):
        mine = [i for i, f in enumerate(query) if f == t]
        for u in range(frames):
            if mine:
                table[t, u] = np.mean([sum(attention[i, j] for j, f in enumerate(key) if f == u) for i in mine])
    return table


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_against_loops(frames: int) -> None:
    query = [-1, *RNG.integers(0, frames, 9).tolist()]
    key = [-1, -1, *RNG.integers(0, frames, 12).tolist()]
    attention = rows(2, 3, len(query), len(key))
    found = frame_mass(attention, query, key, frames)
    for index in np.ndindex(2, 3):
        np.testing.assert_allclose(found.mass[index], slow(attention[index], query, key, frames), atol=1e-13)
    known = np.isfinite(found.elsewhere)
    np.testing.assert_allclose((found.mass.sum(-1) + found.elsewhere)[known], 1.0, atol=1e-12)


def test_uniform_rows_have_lift_one_and_the_share_of_other_frames() -> None:
    frame = np.repeat(np.arange(4), 6)
    found = frame_mass(np.full((24, 24), 1 / 24), frame, frame, 4)
    np.testing.assert_allclose(found.lift, 1.0)
    assert found.cross == pytest.approx(0.75)
    assert found.uniform_cross == pytest.approx(0.75)


def test_uniform_share_with_uneven_frames_and_a_cls_token() -> None:
    key = np.array([-1, 0, 0, 0, 1])
    found = frame_mass(np.full((2, 5), 0.2), [0, 1], key, 2)
    np.testing.assert_allclose(found.uniform, [0.6, 0.2])
    np.testing.assert_allclose(found.elsewhere, 0.2)
    assert found.uniform_cross == pytest.approx(np.mean([0.25, 0.75]))


def test_lag_profile_and_horizon_against_loops() -> None:
    mass = rows(3, 6, 6)
    lags, profile = lag_profile(mass)
    assert lags.tolist() == list(range(-5, 6))
    for k, lag in enumerate(lags):
        pairs = [mass[:, t, t + lag] for t in range(6) if 0 <= t + lag < 6]
        np.testing.assert_allclose(profile[:, k], np.mean(pairs, axis=0))
    far = [[sum(abs(u - t) * m[t, u] for u in range(6)) for t in range(6)] for m in mass]
    np.testing.assert_allclose(horizon(mass), np.mean(far, axis=1))
    before = [[m[t, u] for t in range(6) for u in range(t)] for m in mass]
    after = [[m[t, u] for t in range(6) for u in range(t + 1, 6)] for m in mass]
    np.testing.assert_allclose(past_share(mass), np.sum(before, 1) / (np.sum(before, 1) + np.sum(after, 1)))


def test_extremes() -> None:
    assert horizon(np.eye(5)) == 0
    assert horizon(np.eye(1)) == 0
    assert np.isnan(past_share(np.eye(3)))
    lags, profile = lag_profile(np.eye(1))
    assert lags.tolist() == [0]
    assert profile.tolist() == [1.0]
    shifted = np.roll(np.eye(4), -1, axis=1)  # each frame reads the one before, the first reads the last
    assert lag_profile(shifted)[1][2] == 1.0  # lag -1


def test_permuting_tokens_changes_nothing() -> None:
    query, key = RNG.integers(0, 3, 8), RNG.integers(-1, 3, 11)
    attention = rows(8, 11)
    p, q = RNG.permutation(8), RNG.permutation(11)
    one = frame_mass(attention, query, key, 3)
    other = frame_mass(attention[p][:, q], query[p], key[q], 3)
    np.testing.assert_allclose(one.mass, other.mass)


def test_a_frame_without_queries_is_unknown_and_does_not_count() -> None:
    found = frame_mass(rows(4, 6), [0, 0, 2, 2], [0, 0, 1, 1, 2, 2], 3)
    assert np.isnan(found.mass[1]).all()
    assert np.isfinite(found.mass[[0, 2]]).all()
    assert np.isfinite(horizon(found.mass))
    assert np.isfinite(found.cross)


def test_removed_keys_do_not_count() -> None:
    attention = rows(4, 4)
    attention[:, 0] = np.nan
    found = frame_mass(attention, [0, 0, 1, 1], [0, 0, 1, 1], 2)
    np.testing.assert_allclose(found.mass[0, 0], attention[:2, 1].mean())


@pytest.mark.parametrize(
    ("query", "key", "frames", "words"),
    [
        ([0, 1], [0, 1, 1], 2, "does not end in"),
        ([0, 0, 1, 4], [0, 1, 1], 2, "frame numbers up to 4"),
        ([-1, -1, -1, -1], [0, 1, 1], 2, "no query belongs"),
        ([0, 0, 1, 1], [-1, -1, -1], 2, "no key belongs"),
    ],
)
def test_what_cannot_be_measured(query: list[int], key: list[int], frames: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        frame_mass(rows(4, 3), query, key, frames)
