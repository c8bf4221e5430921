"""The BCa interval against scipy's implementation and against its own promise (coverage)."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from foveate.stats.intervals import bootstrap_mean, resampled_means


@pytest.mark.parametrize("n", [12, 60])
def test_agrees_with_scipys_bca_on_skewed_values(n):
    values = np.random.default_rng(n).exponential(size=n)
    theirs = bootstrap((values,), np.mean, method="BCa", n_resamples=20000).confidence_interval
    ours = bootstrap_mean(values, resamples=20000)
    width = theirs.high - theirs.low
    assert ours.estimate == pytest.approx(values.mean())
    assert abs(ours.low - theirs.low) < 0.04 * width
    assert abs(ours.high - theirs.high) < 0.04 * width


def test_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    intervals = [bootstrap_mean(rng.exponential(size=40), resamples=1000, seed=i) for i in range(300)]
    covered = np.mean([one.low <= 1.0 <= one.high for one in intervals])
    assert 0.88 <= covered <= 0.98


def test_depends_on_the_seed_only_and_not_on_global_state():
    values = np.random.default_rng(1).normal(size=30)
    first = bootstrap_mean(values, seed=3)
    np.random.seed(99)
    assert bootstrap_mean(values, seed=3) == first
    assert bootstrap_mean(values, seed=4) != first


def test_shifting_and_scaling_carry_over():
    values = np.random.default_rng(2).normal(size=25)
    plain, moved = bootstrap_mean(values), bootstrap_mean(5 + 2 * values)
    np.testing.assert_allclose(moved[:3], 5 + 2 * np.array(plain[:3]))


def test_one_image_has_no_interval():
    one = bootstrap_mean([0.4])
    assert (one.estimate, one.n) == (0.4, 1)
    assert np.isnan(one.low)
    assert np.isnan(one.high)
    assert not one.excludes(0.0)


def test_empty_constant_and_missing_values():
    assert bootstrap_mean([]).n == 0
    assert np.isnan(bootstrap_mean([]).estimate)
    assert bootstrap_mean([2.0, 2.0, 2.0])[:3] == (2.0, 2.0, 2.0)
    assert bootstrap_mean([1.0, np.nan, 3.0]) == bootstrap_mean([1.0, 3.0])


def test_blocks_bound_memory_without_changing_how_many_are_drawn(monkeypatch):
    monkeypatch.setattr("foveate.stats.intervals._BLOCK", 40)
    means = resampled_means(np.arange(10.0), 101, 0)
    assert means.shape == (101,)
    assert abs(means.mean() - 4.5) < 0.5
