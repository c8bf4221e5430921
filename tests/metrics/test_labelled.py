"""Labelled metrics: blocks equal the whole, keys that count, labels and what fixes the number."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import UsageError
from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics import labelled
from foveate.metrics.declare import foveate_metrics
from foveate.metrics.entropy import Entropy, EntropyNormalised
from foveate.metrics.received import ReceivedMass

PATCHES = TokenAxis.patches(3, 4, height=24, width=32)
TOKENS = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.of_kind("register", 2), PATCHES)
EVERY = [spec.create() for spec in foveate_metrics()]


def attention(samples: int = 5, layers: int = 3, seed: int = 0, group: tuple[int, ...] = ()) -> xr.DataArray:
    rng = np.random.default_rng(seed)
    n = len(TOKENS)
    logits = 4.0 * rng.standard_normal((samples, *group, layers, 2, n, n))
    rows = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dims = ("sample", *("frame",) * len(group), "layer", "head", "query", "key")
    coords = {"sample": [f"im{i}" for i in range(samples)], "layer": [2, 5, 11][:layers], "head": [0, 1]}
    return xr.DataArray(rows.astype(np.float16), dims=dims, coords=coords)


@settings(max_examples=12, deadline=None)
@given(block_bytes=st.sampled_from([1, 300, 2_000, 9_000, 40_000, 10**9]), seed=st.integers(0, 99))
def test_blocks_equal_the_whole(block_bytes: int, seed: int) -> None:
    rows = attention(seed=seed)
    rows[1] = np.nan  # a sample that failed
    rows[2, :, :, 3:9] = np.nan  # rows that were not captured
    whole = labelled.measure(rows, EVERY, query=TOKENS, key=TOKENS, all_rows=True, block_bytes=10**9)
    parts = labelled.measure(rows, EVERY, query=TOKENS, key=TOKENS, all_rows=True, block_bytes=block_bytes)
    for name in whole:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-5, atol=1e-7, err_msg=str(name))
        assert np.isnan(whole[name][1]).all()


def test_samples_one_by_one_equal_the_batch() -> None:
    rows = attention()
    together = labelled.measure(rows, EVERY, query=TOKENS, key=TOKENS)
    for i in range(5):
        alone = labelled.measure(rows[i], EVERY, query=TOKENS, key=TOKENS)
        xr.testing.assert_allclose(alone, together.isel(sample=i))


def test_patch_keys_are_scaled_and_all_keys_are_not() -> None:
    rows = attention().astype(np.float64)
    expected = scipy.stats.entropy(rows.values[..., 3:], axis=-1)
    by_patch = labelled.measure(rows, [Entropy()], query=TOKENS, key=TOKENS)["entropy"]
    np.testing.assert_allclose(by_patch, expected, rtol=1e-5)
    assert (by_patch.attrs["over_keys"], by_patch.attrs["K"]) == ("patch", 12)
    everything = labelled.measure(rows, [Entropy()], query=TOKENS, key=TOKENS, keys="all")["entropy"]
    np.testing.assert_allclose(everything, scipy.stats.entropy(rows.values, axis=-1), rtol=1e-5)
    assert (everything.attrs["over_keys"], everything.attrs["K"]) == ("all", 15)


def test_labels_and_attributes_survive() -> None:
    result = labelled.measure(attention(group=(2,)), EVERY, query=TOKENS, key=TOKENS)
    assert result["entropy"].dims == ("sample", "frame", "layer", "head", "query")
    assert result["head_diversity"].dims == ("sample", "frame", "layer", "query")
    assert result["received_mass"].dims == ("sample", "frame", "layer", "head", "key")
    assert result["sink_mass"].dims == ("sample", "frame", "layer", "head")
    assert result["entropy"].layer.values.tolist() == [2, 5, 11]
    attrs = result["entropy_normalised"].attrs
    assert attrs["computed_from"] == "stored float16"
    assert (attrs["valid_min"], attrs["valid_max"], attrs["units"]) == (0.0, 1.0, "1")
    assert "Pielou" in attrs["citation"]
    assert result["prefix_mass"].attrs["over_keys"] == "all"
    assert all(result[name].dtype == np.float32 for name in result)


def test_received_over_patches_keeps_the_key_axis_and_hides_the_rest() -> None:
    rows = attention()
    result = labelled.measure(rows, [ReceivedMass()], query=TOKENS, key=TOKENS)["received_mass"]
    assert np.isnan(result[..., :3]).all()
    np.testing.assert_allclose(result[..., 3:], rows.astype(np.float64).mean("query")[..., 3:], rtol=1e-5)


def test_tokens_that_differ_between_samples() -> None:
    """A sample with fewer real keys (padding 0 in the store) has its own K."""
    rows = attention(samples=2)[..., 3:]
    padded = TokenAxis.concat(labelled.take(PATCHES, slice(0, 8)), TokenAxis.of_kind("padding", 4))
    rows[1, ..., 8:] = 0.0
    result = labelled.measure(rows, [EntropyNormalised()], query=TOKENS, key=[PATCHES, padded])[
        "entropy_normalised"
    ]
    alone = labelled.measure(
        rows[1:, ..., :8], [EntropyNormalised()], query=TOKENS, key=labelled.take(PATCHES, slice(0, 8))
    )["entropy_normalised"]
    np.testing.assert_allclose(result[1:], alone, rtol=1e-6)
    assert result.attrs["K"] == "varies"


def test_no_samples() -> None:
    result = labelled.measure(attention(samples=0), EVERY, query=TOKENS, key=TOKENS)
    assert result.sizes["sample"] == 0


class Count(Metric):
    """Sum over queries of the number of keys above a tenth: a metric that adds up."""

    info = MetricInfo(
        "count",
        "how many",
        "key",
        "this test",
        consumes=("head", "query", "key"),
        produces=("bin",),
        accumulate="sum",
    )

    def kernel(self, rows, *, query=None, key=None):  # type: ignore[no-untyped-def]
        return np.stack([(rows > 0.1).sum((-3, -2, -1)), (rows > 0.5).sum((-3, -2, -1))], -1)


class MeanMax(Metric):
    """Mean over heads and queries of the largest weight."""

    info = MetricInfo(
        "mean_max", "mean of maxima", "1", "this test", consumes=("head", "query", "key"), accumulate="mean"
    )

    def kernel(self, rows, *, query=None, key=None):  # type: ignore[no-untyped-def]
        return np.nanmean(np.nanmax(rows, -1), (-2, -1))


def test_a_strangers_accumulators_join_bands() -> None:
    rows = attention(samples=2)
    for metric, rtol in ((Count(), 0), (MeanMax(), 1e-6)):
        whole = labelled.measure(rows, [metric], query=TOKENS, key=TOKENS, block_bytes=10**9)
        bands = labelled.measure(rows, [metric], query=TOKENS, key=TOKENS, block_bytes=500)
        name = metric.info.name
        np.testing.assert_allclose(bands[name], whole[name], rtol=rtol)
        assert (whole[name] > 0).any()


@pytest.mark.parametrize(
    ("name", "pick", "word"),
    [
        ("head_diversity", {"head": [0]}, "heads"),
        ("attention_distance", {"query": [0]}, "place"),
        ("received_mass", {"query": [0, 4]}, "every query"),
    ],
)
def test_what_a_metric_needs_and_does_not_have(name: str, pick: dict[str, list[int]], word: str) -> None:
    rows = attention().isel(pick)
    query = TOKENS
    if "query" in pick:
        query = TokenAxis.concat(*(labelled.take(TOKENS, slice(i, i + 1)) for i in pick["query"]))
    metric = next(m for m in EVERY if m.info.name == name)
    with pytest.raises(UsageError, match=word):
        labelled.measure(rows, [metric], query=query, key=TOKENS)


def test_values_that_are_no_attention_weights() -> None:
    with pytest.raises(UsageError, match="below 0"):
        labelled.measure(attention() - 0.5, [Entropy()], query=TOKENS, key=TOKENS)


def test_no_patches() -> None:
    words = TokenAxis.of_kind("text", 15)
    with pytest.raises(UsageError, match="keys='all'"):
        labelled.measure(attention(), [Entropy()], query=words, key=words)
    result = labelled.measure(attention(), [Entropy()], query=words, key=words, keys="all")
    assert np.isfinite(result["entropy"]).all()
