"""Ranks with ties against brute force over seeded permutations and against scipy where nothing is tied."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from foveate.stats.ranks import descending, midranks, spearman, tie_spans, top_overlap, top_probability

tied_rows = st.lists(st.integers(-3, 3), min_size=3, max_size=12)


def random_order_ranks(values, rng):
    """Ranks 1..n after breaking ties by one random permutation; the slow, literal definition."""
    shuffled = rng.permutation(len(values))
    order = sorted(range(len(values)), key=lambda i: (values[i], shuffled[i]))
    ranks = np.empty(len(values))
    ranks[order] = np.arange(1, len(values) + 1)
    return ranks


@given(tied_rows)
@settings(deadline=None, max_examples=50)
def test_midranks_are_scipys(values):
    np.testing.assert_array_equal(midranks(values), rankdata(values))


def test_spearman_without_ties_is_scipys():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 30))
    expected = [spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(spearman(a, b), expected, atol=1e-12)


def test_spearman_is_the_mean_over_random_tie_breakings():
    rng = np.random.default_rng(1)
    a = np.array([0, 0, 0, 1, 2, 2, 5, 5, 5, 5])
    b = np.array([1, 0, 0, 3, 2, 2, 2, 4, 9, 9])
    draws = [np.corrcoef(random_order_ranks(a, rng), random_order_ranks(b, rng))[0, 1] for _ in range(4000)]
    standard_error = np.std(draws) / np.sqrt(len(draws))
    assert abs(spearman(a, b) - np.mean(draws)) < 4 * standard_error


def test_top_overlap_is_the_mean_over_random_tie_breakings():
    rng = np.random.default_rng(2)
    a = np.array([3, 3, 3, 3, 2, 2, 1, 0, 0, 0])
    b = np.array([3, 1, 3, 1, 3, 3, 0, 0, 9, 0])
    k = 3
    draws = [
        np.sum((random_order_ranks(a, rng) > 10 - k) & (random_order_ranks(b, rng) > 10 - k)) / k
        for _ in range(4000)
    ]
    assert abs(top_overlap(a, b, 0.3) - np.mean(draws)) < 4 * np.std(draws) / np.sqrt(len(draws))


def test_a_uniform_map_agrees_with_nothing_and_overlaps_as_chance_does():
    rng = np.random.default_rng(3)
    other = rng.normal(size=40)
    assert spearman(np.ones(40), other) == 0.0
    assert top_overlap(np.ones(40), other, 0.1) == pytest.approx(0.1)


def test_identical_untied_maps_agree_fully_and_reversed_ones_not_at_all():
    values = np.random.default_rng(4).normal(size=(3, 25))
    np.testing.assert_allclose(spearman(values, values), 1.0)
    np.testing.assert_allclose(spearman(values, -values), -1.0)
    np.testing.assert_allclose(top_overlap(values, values, 0.2), 1.0)
    np.testing.assert_allclose(top_overlap(values, -values, 0.2), 0.0)


def test_nan_cells_do_not_count():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 20))
    hidden = a.copy()
    hidden[[2, 7, 11]] = np.nan
    keep = np.isfinite(hidden)
    assert spearman(hidden, b) == pytest.approx(spearmanr(a[keep], b[keep]).statistic)
    assert top_overlap(hidden, b, 0.2) == pytest.approx(top_overlap(a[keep], b[keep], 0.2))
    assert np.isnan(spearman(np.full(4, np.nan), np.arange(4)))
    assert np.isnan(spearman([1.0, 2.0, np.nan], [1.0, 2.0, 3.0]))  # two common cells have no correlation


def test_float32_rounding_does_not_break_a_tie():
    uniform = np.full(64, 1 / 64) * (1 + 1e-8 * np.random.default_rng(6).normal(size=64))
    first, last = tie_spans(uniform)
    assert set(first) == {0}
    assert set(last) == {63}


def test_small_values_keep_their_order():
    tail = np.array([1.0, 1e-8, 2e-8, 3e-8])
    np.testing.assert_array_equal(midranks(tail), [4, 1, 2, 3])


def test_infinite_values_are_ranked_at_the_ends():
    np.testing.assert_array_equal(midranks([np.inf, 1.0, -np.inf, np.inf]), [3.5, 2, 1, 3.5])


@given(tied_rows, st.integers(0, 2**16))
@settings(deadline=None, max_examples=50)
def test_descending_is_a_permutation_that_sorts(values, seed):
    order = descending(values, np.random.default_rng(seed).random(len(values)))
    assert sorted(order) == list(range(len(values)))
    assert np.all(np.diff(np.asarray(values)[order]) <= 0)


def test_descending_breaks_ties_uniformly_and_puts_unknown_cells_last():
    rng = np.random.default_rng(7)
    values = np.array([1.0, np.nan, 1.0, 1.0, 0.0])
    orders = descending(np.tile(values, (6000, 1)), rng.random((6000, 5)))
    assert np.all(orders[:, 3] == 4)
    assert np.all(orders[:, 4] == 1)
    share = np.bincount(orders[:, 0], minlength=5) / 6000
    np.testing.assert_allclose(share[[0, 2, 3]], 1 / 3, atol=0.03)


@given(tied_rows, st.integers(0, 12))
@settings(deadline=None, max_examples=50)
def test_top_probability_sums_to_the_count(values, count):
    chance = top_probability(values, count)
    assert chance.sum() == pytest.approx(min(count, len(values)))
    assert chance.min() >= 0
    assert chance.max() <= 1


def test_batched_rows_equal_single_rows():
    rng = np.random.default_rng(8)
    a, b = rng.integers(0, 4, (2, 6, 15)).astype(float)
    a[2, 3] = np.nan
    np.testing.assert_array_equal(spearman(a, b), [spearman(x, y) for x, y in zip(a, b, strict=True)])
    np.testing.assert_array_equal(top_overlap(a, b), [top_overlap(x, y) for x, y in zip(a, b, strict=True)])
