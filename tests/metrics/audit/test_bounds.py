"""The bounds: no row breaks them, and explicit rows reach them, so that none is looser or tighter than said."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.metrics.audit import bounds
from foveate.metrics.audit.relations import relations


def statistics(a: np.ndarray) -> dict[str, float]:
    """The study's statistics of one row in float64, with loops: (raw) weights a."""
    K, total = len(a), float(a.sum())
    p = sorted((float(v) / total for v in a), reverse=True)
    return {
        "entropy": -math.fsum(v * math.log(v) for v in p if v > 0),
        "entropy_normalised": -math.fsum(v * math.log(v) for v in p if v > 0) / math.log(K),
        "top10": math.fsum(p[: int(K * 0.1)]),
        "top25": math.fsum(p[: int(K * 0.25)]),
        "count": float(sum(v > 1 / K for v in p)),
        "spread": math.sqrt(math.fsum((float(v) - total / K) ** 2 for v in a) / K),
        "max": max(map(float, a)),
    }


def random_row(seed: int, K: int) -> np.ndarray:
    """Rows of every shape: flat, peaked, sparse, few levels, with a part of the mass lost."""
    rng = np.random.default_rng(seed)
    kind = seed % 6
    if kind == 0:
        a = rng.random(K)
    elif kind == 1:
        a = np.exp(rng.uniform(0, 8) * rng.standard_normal(K))
    elif kind == 2:
        a = rng.random(K) ** 20 * (rng.random(K) < 0.3)
    elif kind == 3:
        a = rng.choice([0.0, 1.0, 3.0], size=K)
    elif kind == 4:
        a = np.where(np.arange(K) < rng.integers(1, K + 1), 1.0, rng.random())
    else:
        a = rng.pareto(0.5, K) + 1e-9
    a = a if a.sum() > 0 else np.eye(K)[0]
    return rng.choice([1.0, 0.9, 0.05]) * a / a.sum()


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.sampled_from([2, 5, 10, 16, 49, 100, 256]))
def test_no_row_breaks_any_relation_even_without_slack(seed: int, K: int) -> None:
    row = statistics(random_row(seed, K))
    for relation in relations(K):
        limit = float(relation.bound(np.asarray(row[relation.given or relation.statistic])))
        value = row[relation.statistic]
        beyond = value - limit if relation.side == "<=" else limit - value
        assert beyond <= 1e-9 * (1 + abs(limit)), (relation.formula, relation.given, value, limit)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.sampled_from([10, 16, 49, 100, 256]))
def test_no_row_breaks_the_joint_bound(seed: int, K: int) -> None:
    row = statistics(random_row(seed, K))
    k = int(0.1 * K)
    limit = float(bounds.entropy_given_top_and_count(row["top10"], row["count"], K, k))
    assert row["entropy"] <= limit + 1e-9


def test_rows_that_reach_the_bounds() -> None:
    K, k = 256, 25
    one_hot = statistics(np.eye(K)[3])
    assert one_hot["spread"] == pytest.approx(bounds.spread_at_most(K))
    for weight in (0.01, 0.3, 0.9):
        spike = np.full(K, (1 - weight) / (K - 1))
        spike[5] = weight
        row = statistics(spike)
        assert row["entropy"] == pytest.approx(float(bounds.entropy_given_spread(row["spread"], K)), rel=1e-9)
        assert row["entropy"] == pytest.approx(float(bounds.spike_entropy(weight, K)), rel=1e-9)
    two_levels = np.concatenate([np.full(k, 0.666 / k), np.full(K - k, 0.334 / (K - k))])
    assert statistics(two_levels)["entropy"] == pytest.approx(float(bounds.entropy_given_top(0.666, K, k)))
    above = 1 / K + 1e-12
    for count in (10, 95):
        held = abs(count - k)
        if count > k:
            rest = (1 - 0.666 - held * above) / (K - count)
            levels = [np.full(k, 0.666 / k), np.full(held, above), np.full(K - count, rest)]
        else:
            strong = (0.666 - held / K) / count
            levels = [np.full(count, strong), np.full(held, 1 / K - 1e-12), np.full(K - k, 0.334 / (K - k))]
        row = statistics(np.concatenate(levels))
        assert row["count"] == count
        limit = float(bounds.entropy_given_top_and_count(0.666, count, K, k))
        assert row["entropy"] == pytest.approx(limit, abs=1e-8)


def test_the_weakest_strongest_key_for_a_spread() -> None:
    """max >= K s^2 + 1/K is reached by weight spread evenly over some keys, the rest 0."""
    K = 64
    for keys in (1, 4, 16, 64):
        row = statistics(np.where(np.arange(K) < keys, 1 / keys, 0.0))
        if K * row["spread"] >= 1:
            assert row["max"] == pytest.approx(float(bounds.max_at_least(row["spread"], K)))
    half = statistics(np.where(np.arange(K) < 32, 0.5 / 32, 0.0))  # raw weights, half of the mass lost
    assert half["max"] == pytest.approx(float(bounds.max_at_least(half["spread"], K)))


@pytest.mark.parametrize(
    ("K", "top", "joint", "spread", "spread_at_18"),
    [(256, 4.599, 4.408, 0.0624, 4.530), (576, None, 5.391, 0.0416, 4.285)],
)
def test_figures_of_the_reference(
    K: int, top: float | None, joint: float, spread: float, spread_at_18: float
) -> None:
    """Values worked out by hand for the StreetCLIP table."""
    k = int(0.1 * K)
    if top:
        assert float(bounds.entropy_given_top(0.666, K, k)) == pytest.approx(top, abs=5e-4)
    assert float(bounds.entropy_given_top_and_count(0.666, 95.2, K, k)) == pytest.approx(joint, abs=1e-3)
    assert bounds.spread_at_most(K) == pytest.approx(spread, abs=5e-5)
    assert float(bounds.entropy_given_spread(0.018, K)) == pytest.approx(spread_at_18, abs=5e-4)


def test_mean_ceiling_is_the_concave_envelope() -> None:
    points = np.linspace(0, 1, 201)[:, None]
    values = np.where(points[:, 0] < 0.5, points[:, 0] ** 2, 0.25 - 0.1 * (points[:, 0] - 0.5))
    # between 0 and the kink at 0.5 the envelope is the chord, beyond it the line itself
    assert bounds.mean_ceiling(points, values, [0.2], [0.2]) == pytest.approx(0.1)
    assert bounds.mean_ceiling(points, values, [0.9], [0.9]) == pytest.approx(0.21)
    assert bounds.mean_ceiling(points, values, [0.2], [0.4]) == pytest.approx(0.2)
    assert math.isnan(bounds.mean_ceiling(points, values, [2.0], [3.0]))
    assert math.isnan(bounds.mean_ceiling(points, np.full(201, np.nan), [0.2], [0.2]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), K=st.sampled_from([20, 49, 256]))
def test_bounds_between_means_by_jensen(seed: int, K: int) -> None:
    """Mixtures of very different rows: the means obey what every row obeys."""
    rows = [statistics(random_row(seed + i, K)) for i in range(12)]
    mean = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    for relation in relations(K):
        limit = float(relation.bound(np.asarray(mean[relation.given or relation.statistic])))
        value = mean[relation.statistic]
        beyond = value - limit if relation.side == "<=" else limit - value
        assert beyond <= 1e-9 * (1 + abs(limit)), relation.formula
