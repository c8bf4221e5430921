"""Metrics that need token tables, several heads or all rows: distance, diversity, prefix, received, sinks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foveate.errors import UsageError
from foveate.interfaces import TokenAxis
from foveate.metrics.distance import AttentionDistance, AttentionDistanceRelative
from foveate.metrics.diversity import HeadDivergence, HeadDiversity
from foveate.metrics.entropy import Entropy
from foveate.metrics.prefix import PrefixMass, SelfMass
from foveate.metrics.received import ReceivedMass
from foveate.metrics.sinks import SinkCount, SinkMass, SinkScore, artefact_tokens, is_sink, robust_z

PATCHES = TokenAxis.patches(4, 6, height=64, width=96)  # 16 px patches
PREFIXED = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.of_kind("register", 2), PATCHES)


def peaked(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = np.exp(4.0 * rng.standard_normal(shape))
    return rows / rows.sum(-1, keepdims=True)


def slow_distance(row: np.ndarray, i: int, query: TokenAxis, key: TokenAxis) -> float:
    total = mass = 0.0
    for j in range(len(key)):
        if math.isnan(key.y[j]):
            continue
        total += float(row[j]) * math.dist((query.y[i], query.x[i]), (key.y[j], key.x[j]))
        mass += float(row[j])
    return total / mass


def test_distance_equals_oracle_and_leaves_prefix_tokens_out() -> None:
    n = len(PREFIXED)
    rows = peaked(0, (2, 3, n, n))
    result = AttentionDistance().kernel(rows, query=PREFIXED, key=PREFIXED)
    assert np.isnan(result[..., :3]).all()
    for sample in range(2):
        for i in range(3, n):
            expected = slow_distance(rows[sample, 1, i], i, PREFIXED, PREFIXED)
            assert result[sample, 1, i] == pytest.approx(expected, rel=1e-9)
    relative = AttentionDistanceRelative().kernel(rows, query=PREFIXED, key=PREFIXED)
    np.testing.assert_allclose(relative, result / math.hypot(64, 96), rtol=1e-9)
    as_torch = AttentionDistance().kernel(torch.from_numpy(rows), query=PREFIXED, key=PREFIXED)
    np.testing.assert_allclose(as_torch.numpy(), result, rtol=1e-9)


def test_distance_of_known_rows() -> None:
    """Attending to oneself is 0 px, to the next column one patch, to the far corner nearly the diagonal."""
    rows = np.zeros((1, 3, 24))
    rows[0, 0, 0] = rows[0, 1, 1] = rows[0, 2, 23] = 1.0
    first = TokenAxis.patches(1, 1, height=16, width=16)
    query = TokenAxis.concat(first, first, first)
    result = AttentionDistance().kernel(rows, query=query, key=PATCHES)
    np.testing.assert_allclose(result[0], [0, 16, math.hypot(48, 80)], rtol=1e-6)


def test_distance_needs_positions() -> None:
    with pytest.raises(UsageError, match="positions"):
        AttentionDistance().kernel(np.ones((1, 2, 24)))


def slow_divergence(heads: np.ndarray) -> float:
    """Mean Kullback-Leibler divergence from each head to the mean head: the other form of the definition."""
    p = heads / heads.sum(-1, keepdims=True)
    mean = p.mean(0)
    return float(np.mean([sum(a * math.log(a / b) for a, b in zip(row, mean, strict=True) if a > 0) for row in p]))


@pytest.mark.parametrize("heads", [2, 5])
def test_diversity_equals_oracle(heads: int) -> None:
    rows = peaked(1, (2, heads, 4, 24))
    gap = HeadDivergence().kernel(rows)
    assert gap.shape == (2, 4)
    for sample in range(2):
        for i in range(4):
            assert gap[sample, i] == pytest.approx(slow_divergence(rows[sample, :, i]), rel=1e-9)
    np.testing.assert_allclose(HeadDiversity().kernel(rows), gap / math.log(heads))
    np.testing.assert_allclose(HeadDiversity().kernel(torch.from_numpy(rows)).numpy(), gap / math.log(heads))
    entropy_of_mean = Entropy().kernel(rows.mean(1, keepdims=True))[:, 0]
    np.testing.assert_allclose(gap, entropy_of_mean - Entropy().kernel(rows).mean(1), rtol=1e-9)


def test_diversity_extremes_and_order_of_heads() -> None:
    alike = np.repeat(peaked(2, (1, 1, 3, 24)), 4, axis=1)
    np.testing.assert_allclose(HeadDiversity().kernel(alike), 0.0, atol=1e-12)
    disjoint = np.zeros((1, 4, 1, 24))
    disjoint[0, range(4), 0, [0, 5, 9, 20]] = 1.0
    np.testing.assert_allclose(HeadDiversity().kernel(disjoint), 1.0)
    more_heads_than_keys = np.eye(2)[[0, 1, 0, 1]][None, :, None]
    np.testing.assert_allclose(HeadDiversity().kernel(more_heads_than_keys), 1.0)
    rows = peaked(3, (1, 5, 2, 24))
    np.testing.assert_allclose(HeadDiversity().kernel(rows[:, ::-1]), HeadDiversity().kernel(rows))
    assert np.isnan(HeadDiversity().kernel(rows[:, :1])).all()


def test_prefix_and_self_mass() -> None:
    n = len(PREFIXED)
    rows = peaked(4, (1, 2, n, n))
    prefix = PrefixMass().kernel(rows, query=PREFIXED, key=PREFIXED)
    np.testing.assert_allclose(prefix, rows[..., :3].sum(-1))
    own = SelfMass().kernel(rows, query=PREFIXED, key=PREFIXED)
    np.testing.assert_allclose(own[..., 0], rows[..., 0, 0])
    np.testing.assert_allclose(own[..., 3:], np.einsum("shii->shi", rows)[..., 3:])
    assert np.isnan(own[..., 1:3]).all()  # two registers without a place cannot be told apart


def test_self_mass_follows_the_token_and_not_the_position() -> None:
    rows = peaked(5, (1, 1, 2, 24))
    last_two = TokenAxis(
        *(getattr(PATCHES, name)[-2:] for name in ("kind", "y", "x", "height", "width", "level", "frame"))
    )
    np.testing.assert_allclose(
        SelfMass().kernel(rows, query=last_two, key=PATCHES)[0, 0], [rows[0, 0, 0, 22], rows[0, 0, 1, 23]]
    )
    stranger = TokenAxis.of_kind("readout", 2)
    assert np.isnan(SelfMass().kernel(rows, query=stranger, key=PATCHES)).all()


def test_received_mass_is_the_column_mean_over_captured_queries() -> None:
    rows = peaked(6, (2, 3, 24, 24))
    np.testing.assert_allclose(ReceivedMass().kernel(rows), rows.mean(2))
    np.testing.assert_allclose(ReceivedMass().kernel(rows).mean(-1), 1 / 24)
    rows[0, 0, :10] = np.nan
    np.testing.assert_allclose(ReceivedMass().kernel(rows)[0, 0], rows[0, 0, 10:].mean(0))
    np.testing.assert_allclose(ReceivedMass().kernel(torch.from_numpy(rows)).numpy(), ReceivedMass().kernel(rows))


def planted(share: float) -> np.ndarray:
    """Random rows of which every one also gives ``share`` to key 7."""
    rows = peaked(7, (1, 2, 24, 24)) * (1 - share)
    rows[..., 7] += share
    return rows


def test_a_planted_sink_is_found_alone_and_weighed() -> None:
    rows = planted(0.6)
    received = rows.mean(2)
    assert is_sink(received).nonzero()[-1].tolist() == [7, 7]
    np.testing.assert_allclose(SinkMass().kernel(rows), received[..., 7])
    np.testing.assert_array_equal(SinkCount().kernel(rows), [[1, 1]])
    assert (SinkScore().kernel(rows)[..., 7] > 3.5).all()
    np.testing.assert_array_equal(SinkMass().kernel(planted(0.0)), [[0, 0]])
    np.testing.assert_allclose(SinkMass().kernel(torch.from_numpy(rows)).numpy(), SinkMass().kernel(rows))


def test_robust_z_by_its_definition() -> None:
    values = np.random.default_rng(0).gamma(1.0, size=51)
    middle = sorted(values)[25]
    mad = sorted(abs(values - middle))[25]
    np.testing.assert_allclose(robust_z(values), (values - middle) / (1.4826 * mad))
    np.testing.assert_allclose(robust_z(torch.from_numpy(values)).numpy(), robust_z(values))
    gaps = np.concatenate([values, [np.nan, np.nan]])
    np.testing.assert_allclose(robust_z(gaps)[:51], robust_z(values))
    assert np.isnan(robust_z(gaps)[51:]).all()


def test_robust_z_where_the_median_deviation_is_zero() -> None:
    one_peak = np.array([1.0] * 9 + [2.0])
    assert robust_z(one_peak)[-1] == pytest.approx(1 / (1.2533 * 0.1))
    np.testing.assert_array_equal(robust_z(np.ones(5)), np.zeros(5))
    assert np.isnan(robust_z(np.full(5, np.nan))).all()


def test_artefacts_need_both_received_mass_and_norm_where_norms_are_known() -> None:
    received = planted(0.6).mean(2)[0, 0]
    norms = np.random.default_rng(1).normal(20, 1, 24)
    assert artefact_tokens(received).nonzero()[0].tolist() == [7]
    assert not artefact_tokens(received, norms).any()
    norms[7] = 150.0
    assert artefact_tokens(received, norms).nonzero()[0].tolist() == [7]


def test_sinks_of_nothing_captured_are_unknown() -> None:
    rows = np.full((1, 1, 4, 24), np.nan)
    assert np.isnan(SinkMass().kernel(rows)).all()
    assert np.isnan(SinkCount().kernel(rows)).all()
