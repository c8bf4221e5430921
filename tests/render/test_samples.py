"""Which samples a page shows is a seeded function of the data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.render.samples import diverse, extremes, thumbnail


@settings(max_examples=30)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))
def test_diverse_equals_a_slow_farthest_point_search(total: int, count: int, seed: int) -> None:
    points = np.random.default_rng(total).normal(size=(total, 3))
    choice = diverse(points, count, seed=seed)
    chosen = [choice.positions[0]]
    while len(chosen) < min(count, total):
        rest = [i for i in range(total) if i not in chosen]
        nearest = [min(np.linalg.norm(points[i] - points[j]) for j in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(nearest))])
    assert list(choice.positions) == chosen
    assert f"seed {seed}" in choice.rule
    assert f"of {total} samples" in choice.rule


def test_diverse_never_repeats_even_among_equal_samples() -> None:
    choice = diverse(np.zeros((4, 2)), 4)
    assert sorted(choice.positions) == [0, 1, 2, 3]
    assert diverse(np.eye(5), 3, seed=1) == diverse(np.eye(5), 3, seed=1)


def test_extremes_are_highest_and_lowest_with_rank_and_value() -> None:
    choice = extremes([0.5, np.nan, 3.0, -1.0, 2.0, 0.1], 4, name="entropy")
    assert choice.positions == (2, 4, 5, 3)
    assert choice.notes[0] == "rank 1, entropy 3"
    assert choice.notes[-1] == "rank 5, entropy -1"
    assert choice.rule == "the 2 highest and 2 lowest of 5 samples by entropy"


def test_extremes_of_few_samples_do_not_repeat() -> None:
    assert sorted(extremes([1.0, 2.0, 3.0], 10, name="m").positions) == [0, 2]
    assert extremes([1.0], 2, name="m").positions == (0,)


def test_nothing_to_choose_from_is_an_error() -> None:
    with pytest.raises(UsageError, match="0 available"):
        extremes([np.nan], 2, name="m")
    with pytest.raises(UsageError):
        diverse(np.zeros((0, 3)), 2)


def test_a_thumbnail_is_mean_colours() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :, 0] = 255
    np.testing.assert_allclose(thumbnail(image).reshape(8, 8, 3)[:4, :, 0], 1.0)
    assert thumbnail(image).sum() == pytest.approx(32)
