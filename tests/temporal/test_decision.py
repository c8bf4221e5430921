"""Decision times, frames removed in order, and the thirds of a clip."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.decision import FrameCurve, decision_time, phase_mass, phases, removal_order

RNG = np.random.default_rng(8)


def slow_time(labels: list[int]) -> int:
    for start in range(len(labels)):
        if all(label == labels[-1] for label in labels[start:]):
            return start + 1
    raise AssertionError


def test_decision_time_against_a_loop() -> None:
    table = RNG.integers(0, 2, (60, 6))
    assert decision_time(table).tolist() == [slow_time(row) for row in table.tolist()]


def test_decision_time_of_clear_cases() -> None:
    table = np.array([[3, 3, 3], [1, 3, 3], [3, 1, 3], [-1, -1, 3]])
    assert decision_time(table).tolist() == [1, 2, 3, 3]
    assert decision_time(np.array([[4]])).tolist() == [1]
    for bad in (np.ones((2, 3)), np.ones(3, int), np.ones((2, 0), int)):
        with pytest.raises(UsageError, match="integer labels"):
            decision_time(bad)


def test_order_breaks_ties_by_the_seed_and_puts_unknown_frames_last() -> None:
    importance = np.array([[0.1, 0.9, np.nan, 0.5]])
    assert removal_order(importance).tolist() == [[1, 3, 0, 2]]
    tied = np.ones((200, 4))
    first = np.bincount(removal_order(tied, seed=1)[:, 0], minlength=4)
    assert first.min() > 25  # each of four frames comes first about 50 times
    assert (removal_order(tied, seed=1) == removal_order(tied, seed=1)).all()


def test_area_is_the_trapezoid_rule_over_the_share_removed() -> None:
    curve = RNG.random((3, 5))
    found = FrameCurve(np.zeros((3, 4), np.intp), curve).area
    steps = [[(row[k] + row[k + 1]) / 2 * 0.25 for k in range(4)] for row in curve]
    np.testing.assert_allclose(found, np.sum(steps, axis=1))
    np.testing.assert_allclose(FrameCurve(np.zeros((1, 4), np.intp), np.full((1, 5), 0.7)).area, 0.7)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 7, 16])
def test_even_importance_gives_thirds_whatever_the_length(frames: int) -> None:
    np.testing.assert_allclose(phase_mass(np.ones((1, frames))), 1 / 3)


def test_phase_mass_against_fine_sampling() -> None:
    importance = RNG.random((3, 5))
    fine = np.repeat(importance, 300, axis=1)
    expected = fine.reshape(3, 3, 500).sum(-1) / fine.sum(1, keepdims=True)
    np.testing.assert_allclose(phase_mass(importance), expected)


def test_phase_mass_of_nothing() -> None:
    assert np.isnan(phase_mass(np.zeros((1, 4)))).all()
    with pytest.raises(UsageError, match="non-negative"):
        phase_mass(-np.ones((1, 4)))


def test_verdicts() -> None:
    late = np.tile([0.0, 0.0, 0.1, 0.2, 0.5, 0.9], (20, 1)) + 0.01 * RNG.random((20, 6))
    assert phases(late).verdict == "late"
    assert phases(late[:, ::-1]).verdict == "early"
    assert phases(1 + 0.01 * RNG.random((20, 6))).verdict == "even"
    assert phases(RNG.random((4, 6)) ** 6).verdict == "inconclusive"
    assert phases(np.array([[1.0, 2.0, 3.0]])).verdict == "inconclusive"  # one video has no interval


def test_a_third_hardly_ahead_of_another_is_no_verdict() -> None:
    """Middle and late hold as much; that both hold more than a third does not make one of them the answer."""
    noise = np.random.default_rng(4).normal(0, 0.03, 12)
    shares = np.stack([np.full(12, 0.1), 0.452 + noise, 0.448 - noise], axis=1)
    found = phases(shares)
    assert found.middle.low > 1 / 3
    assert found.verdict == "inconclusive"
