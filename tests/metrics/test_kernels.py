"""Every row metric against a slow float64 oracle written from its paper, and its properties."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.interfaces import Metric, TokenAxis
from foveate.metrics import concentration, entropy, sparsity
from foveate.metrics import study as legacy

Row = list[float]


def peaked(seed: int, shape: tuple[int, ...], mass: float = 1.0) -> np.ndarray:
    """Softmax of wide normal logits: median row entropy below 0.6 ln K."""
    rng = np.random.default_rng(seed)
    logits = 4.0 * rng.standard_normal(shape)
    rows = np.exp(logits - logits.max(-1, keepdims=True))
    return mass * rows / rows.sum(-1, keepdims=True)


# Oracles: one normalised row as a Python list. Loops on purpose.


def slow_entropy(p: Row) -> float:
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def slow_top(p: Row, k: int) -> float:
    return math.fsum(sorted(p, reverse=True)[:k])


def ceil_share(K: int, percent: int) -> int:
    k = 0
    while 100 * k < percent * K:
        k += 1
    return k


def slow_gini(p: Row) -> float:
    """Mean absolute difference over twice the mean (the definition, not the sorted form)."""
    K = len(p)
    return sum(abs(a - b) for a in p for b in p) / (2 * K * K * (sum(p) / K))


def slow_hoyer(p: Row) -> float:
    root = math.sqrt(len(p))
    return (root - sum(p) / math.sqrt(sum(v * v for v in p))) / (root - 1)


def slow_std(values: Row) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def slow_minmax_std(p: Row) -> float:
    low, high = min(p), max(p)
    return slow_std([(v - low) / (high - low) for v in p])


NORMALISED: dict[type[Metric], Callable[[Row], float]] = {
    entropy.Entropy: slow_entropy,
    entropy.EntropyNormalised: lambda p: slow_entropy(p) / math.log(len(p)),
    entropy.EffectiveNumber: lambda p: math.prod(v**-v for v in p if v > 0),
    concentration.Top10Mass: lambda p: slow_top(p, ceil_share(len(p), 10)),
    concentration.Top25Mass: lambda p: slow_top(p, ceil_share(len(p), 25)),
    concentration.Top10Lift: lambda p: slow_top(p, ceil_share(len(p), 10)) / (ceil_share(len(p), 10) / len(p)),
    concentration.Top25Lift: lambda p: slow_top(p, ceil_share(len(p), 25)) / (ceil_share(len(p), 25) / len(p)),
    concentration.Above1x: lambda p: sum(v > 1 / len(p) for v in p) / len(p),
    concentration.Above2x: lambda p: sum(v > 2 / len(p) for v in p) / len(p),
    concentration.Above5x: lambda p: sum(v > 5 / len(p) for v in p) / len(p),
    concentration.MaxWeight: max,
    concentration.MaxLift: lambda p: len(p) * max(p),
    sparsity.Gini: slow_gini,
    sparsity.Hoyer: slow_hoyer,
    sparsity.ParticipationRatio: lambda p: 1 / sum(v * v for v in p),
    sparsity.SpreadMinMax: slow_minmax_std,
}
METRICS = list(NORMALISED)
ids = [metric.info.name for metric in METRICS]
GRIDS = [10, 30, 49, 64, 101]


def oracle(metric: type[Metric], rows: np.ndarray) -> np.ndarray:
    flat = rows.reshape(-1, rows.shape[-1]).astype(np.float64)
    scaled = flat / flat.sum(-1, keepdims=True)
    values = [NORMALISED[metric](row.tolist()) for row in scaled]
    return np.array(values).reshape(rows.shape[:-1])


@pytest.mark.parametrize("K", GRIDS)
@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_equals_oracle_on_rows_that_lost_mass_to_prefix_tokens(metric: type[Metric], K: int) -> None:
    rows = peaked(K, (2, 3, 4, K), mass=0.37)
    assert np.median(oracle(entropy.EntropyNormalised, rows)) < 0.6
    np.testing.assert_allclose(metric().kernel(rows), oracle(metric, rows), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_torch_equals_numpy(metric: type[Metric]) -> None:
    rows = peaked(1, (2, 3, 4, 49))
    ours = metric().kernel(torch.from_numpy(rows))
    assert isinstance(ours, torch.Tensor)
    np.testing.assert_allclose(ours.numpy(), metric().kernel(rows), rtol=1e-12)


@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_half_precision_is_summed_in_single(metric: type[Metric]) -> None:
    stored = peaked(2, (2, 2, 5, 64)).astype(np.float16)
    expected = oracle(metric, stored.astype(np.float64))
    numpy_result = metric().kernel(stored)
    torch_result = metric().kernel(torch.from_numpy(stored))
    assert torch_result.dtype == torch.float32
    np.testing.assert_allclose(numpy_result, expected, rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(torch_result.numpy(), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_keys_that_are_not_valid_are_as_if_absent(metric: type[Metric]) -> None:
    rows = peaked(3, (2, 6, 40))
    blocked = rows.copy()
    blocked[0, :, 5:17] = np.nan
    blocked[1, :, ::3] = np.nan
    result = metric().kernel(blocked)
    np.testing.assert_allclose(result[0], metric().kernel(np.delete(rows[0], range(5, 17), -1)), rtol=1e-9)
    kept = np.setdiff1d(np.arange(40), np.arange(0, 40, 3))
    np.testing.assert_allclose(result[1], metric().kernel(rows[1][:, kept]), rtol=1e-9)


@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_rows_without_a_distribution_are_nan_and_alone(metric: type[Metric]) -> None:
    rows = peaked(4, (1, 4, 25))
    rows[0, 1] = np.nan  # not captured
    rows[0, 2] = 0.0  # fully masked
    for result in (metric().kernel(rows), metric().kernel(torch.from_numpy(rows)).numpy()):
        assert np.isnan(result[0, 1])
        assert np.isnan(result[0, 2])
        assert np.isfinite(result[0, [0, 3]]).all()


@pytest.mark.parametrize("metric", METRICS, ids=ids)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), K=st.integers(11, 60))
def test_order_and_scale_do_not_matter_and_bounds_hold(metric: type[Metric], seed: int, K: int) -> None:
    rows = peaked(seed, (1, 3, K))
    result = metric().kernel(rows)
    order = np.random.default_rng(seed).permutation(K)
    np.testing.assert_allclose(metric().kernel(rows[..., order]), result, rtol=1e-9)
    np.testing.assert_allclose(metric().kernel(rows * 0.2), result, rtol=1e-9)
    low, high = metric.info.bounds
    assert (result >= low - 1e-9).all()
    assert (result <= high + 1e-9).all()


@pytest.mark.parametrize("metric", METRICS, ids=ids)
def test_no_rows_give_no_numbers(metric: type[Metric]) -> None:
    assert metric().kernel(np.zeros((2, 0, 16))).shape == (2, 0)


@pytest.mark.parametrize(
    ("metric", "uniform", "one"),
    [
        (entropy.Entropy, math.log(40), 0.0),
        (entropy.EntropyNormalised, 1.0, 0.0),
        (entropy.EffectiveNumber, 40.0, 1.0),
        (concentration.Top10Lift, 1.0, 10.0),
        (concentration.Top25Lift, 1.0, 4.0),
        (concentration.Above1x, 0.0, 1 / 40),
        (concentration.Above5x, 0.0, 1 / 40),
        (concentration.MaxLift, 1.0, 40.0),
        (sparsity.Gini, 0.0, 1 - 1 / 40),
        (sparsity.Hoyer, 0.0, 1.0),
        (sparsity.ParticipationRatio, 40.0, 1.0),
        (sparsity.SpreadRaw, 0.0, math.sqrt(39) / 40),
        (sparsity.SpreadMinMax, math.nan, math.sqrt(39) / 40),
    ],
)
def test_extremes(metric: type[Metric], uniform: float, one: float) -> None:
    spike = np.zeros(40, np.float32)
    spike[7] = 1.0
    rows = np.stack([np.full(40, 1 / 40, np.float32), spike])[None]
    np.testing.assert_allclose(metric().kernel(rows)[0], [uniform, one], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "metric",
    [
        entropy.EntropyNormalised,
        entropy.Entropy,
        entropy.EffectiveNumber,
        sparsity.ParticipationRatio,
        sparsity.Gini,
        concentration.Above1x,
        concentration.MaxLift,
        concentration.Top10Lift,
    ],
)
def test_duplicating_every_key(metric: type[Metric]) -> None:
    """Splitting each key in two halves: what is scale free must not move, the rest by a known amount."""
    rows = peaked(5, (1, 4, 60))
    before, after = metric().kernel(rows), metric().kernel(np.repeat(rows / 2, 2, axis=-1))
    H = entropy.Entropy().kernel(rows)
    expected = {
        "entropy": before + math.log(2),
        "entropy_normalised": (H + math.log(2)) / math.log(120),  # not invariant, though between 0 and 1
        "effective_number": 2 * before,
        "participation_ratio": 2 * before,
    }.get(metric.info.name, before)
    np.testing.assert_allclose(after, expected, rtol=1e-9)


def test_uniform_rows_have_nothing_above_uniform_in_single_precision() -> None:
    """1/K rounds: without a tolerance the count on a uniform row is anything between 0 and K."""
    for K in range(3, 300):
        rows = np.full((1, 1, K), 1 / K, np.float32)
        assert concentration.Above1x().kernel(rows).item() == 0.0


def test_entropy_is_differentiable_also_at_zero_weights() -> None:
    rows = torch.tensor([[[0.0, 0.3, 0.7, 0.0]]], dtype=torch.float64, requires_grad=True)
    entropy.Entropy().kernel(rows).sum().backward()
    assert rows.grad is not None
    assert torch.isfinite(rows.grad).all()


# ---------------------------------------------------------------- the study's statistics, from its own lines


def seed_statistics(cls_attn: np.ndarray) -> list[float]:
    """The study's definitions, applied to one float64 row."""
    norm = cls_attn / (cls_attn.sum() + 1e-8)
    ordered = np.sort(norm)[::-1]
    return [
        -(norm * np.log(norm + 1e-10)).sum(),
        cls_attn.max(),
        ordered[: int(len(ordered) * 0.1)].sum(),
        ordered[: int(len(ordered) * 0.25)].sum(),
        (cls_attn > cls_attn.mean()).sum(),
        cls_attn.std(),
    ]


@pytest.mark.parametrize("K", [9, 49, 70, 256, 576])
@pytest.mark.parametrize("mass", [1.0, 0.01])
def test_study_statistics_as_its_code_computes_them(K: int, mass: float) -> None:
    rows = peaked(K, (1, 5, K), mass)
    rows[0, 4] = 0.0
    for metric, expected in zip(
        legacy.STUDY_METRICS, np.array([seed_statistics(row) for row in rows[0]]).T, strict=True
    ):
        np.testing.assert_allclose(metric().kernel(rows)[0], expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            metric().kernel(torch.from_numpy(rows)).numpy()[0], expected, rtol=1e-12, atol=1e-12
        )


def test_study_rounds_the_top_tenth_down_where_ours_rounds_up() -> None:
    rows = np.full((1, 1, 256), 1 / 256)
    assert legacy.StudyTop10().kernel(rows).item() == pytest.approx(25 / 256, abs=1e-7)
    assert concentration.Top10Mass().kernel(rows).item() == pytest.approx(26 / 256)


def test_study_statistics_of_a_row_that_was_not_captured() -> None:
    rows = np.full((1, 1, 16), np.nan)
    assert all(np.isnan(metric().kernel(rows)).all() for metric in legacy.STUDY_METRICS)


def test_study_columns_in_order() -> None:
    assert legacy.COLUMNS[2:] == tuple(metric.info.name for metric in legacy.STUDY_METRICS)


def test_ranks_of_thirty_keys_round_exactly() -> None:
    """ceil(0.1 * 30) is 4 in floating point; three keys are a tenth of thirty."""
    rows = np.arange(1.0, 31.0)[None, None]
    assert concentration.Top10Mass().kernel(rows).item() == pytest.approx((30 + 29 + 28) / rows.sum())


def test_positions_are_optional_for_row_metrics() -> None:
    rows = peaked(6, (1, 4, 9))
    axis = TokenAxis.patches(3, 3, height=24, width=24)
    for metric in METRICS:
        np.testing.assert_array_equal(metric().kernel(rows, key=axis), metric().kernel(rows))
