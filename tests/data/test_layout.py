"""Chunks and shards follow the rules for any shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.data.layout import MB, SHARD_HIGH, ArraySpec, batches, commit_batch, cut

ATTENTION = ("sample", "layer", "head", "query", "key")


def attention(samples, layers, heads, queries, keys):
    return ArraySpec("attention", ATTENTION, (samples, layers, heads, queries, keys), "float16")


sides = st.integers(1, 30)
specs = st.builds(attention, st.integers(1, 3000), sides, sides, st.integers(1, 900), st.integers(1, 900))


@given(specs)
def test_every_shard_belongs_to_one_commit_batch(spec):
    batch = commit_batch([spec], spec.shape[0])
    layout = cut(spec, batch)
    assert layout.files[0] == batch
    assert batch & (batch - 1) == 0
    parts = batches(spec.shape[0], batch)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(spec.shape[0]))
    if layout.shards is not None:
        assert all(shard % chunk == 0 for shard, chunk in zip(layout.shards, layout.chunks, strict=True))


@given(specs)
def test_sizes_stay_in_bounds(spec):
    batch = commit_batch([spec], spec.shape[0])
    layout = cut(spec, batch)
    chunk, row = 2 * math.prod(layout.chunks), 2 * spec.shape[2] * spec.shape[4]
    assert chunk <= max(1.5 * MB, row)
    assert layout.chunks[1:3] == (1, spec.shape[2])
    assert layout.chunks[4] == spec.shape[4]
    assert batch == 1 or batch * spec.sample_bytes <= 64 * MB
    assert 2 * math.prod(layout.files) <= max(SHARD_HIGH, 4 * spec.sample_bytes / spec.shape[1])


def test_the_cases_that_were_measured():
    full = attention(50, 24, 16, 577, 577)
    assert commit_batch([full], 50) == 1
    assert cut(full, 1).chunks == (1, 1, 16, 64, 577)
    readout = attention(50_000, 24, 16, 1, 577)
    assert commit_batch([readout], 50_000) == 128
    assert cut(readout, 128).chunks == (16, 1, 16, 1, 577)
    assert cut(readout, 128).shards == (128, 24, 16, 1, 577)


def test_a_few_samples_make_one_small_batch():
    assert commit_batch([attention(5, 2, 3, 17, 17)], 5) == 8


def test_windows_are_grouped_into_chunks():
    spec = ArraySpec("a", ("sample", "window", "layer", "head", "query", "key"), (10, 64, 2, 3, 49, 49), "float16")
    assert cut(spec, 8).chunks == (1, 32, 1, 3, 49, 49)


def test_dims_must_begin_with_sample():
    with pytest.raises(ValueError, match="begin with sample"):
        ArraySpec("a", ("layer", "sample"), (1, 2), "float32")
