"""How an array is cut into chunks, shards and commit batches: arithmetic only.

Reading decides the inner chunk (all heads and keys of a band of queries, one layer, 0.25 to 1.5 MB raw; small
row sets group samples instead). Writing decides the shard: whole samples, so that a shard is written once,
by one commit batch, and no write is ever a read-modify-write.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

MB = 1 << 20
CHUNK_LOW, CHUNK_HIGH = MB // 4, 3 * MB // 2
BATCH_BYTES = 64 * MB
SHARD_HIGH = 256 * MB
BATCH_SAMPLES = 128
"""Most samples of a commit batch: what a killed job computes again at worst."""
BANDED = ("query", "token")
"""Dims that an inner chunk cuts into bands."""
BAND = 64
ONE_AT_A_TIME = ("frame", "window", "track", "position", "layer")
"""Dims along which a reader usually wants one entry."""


@dataclass(frozen=True)
class ArraySpec:
    """An array to allocate: ``dims`` begin with ``sample``; ``dtype`` is numpy's name, or "string"."""

    name: str
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    attrs: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dims[:1] != ("sample",) or len(self.dims) != len(self.shape):
            raise ValueError(
                f"array {self.name!r}: dims {self.dims} and shape {self.shape} must begin with sample"
            )

    @property
    def itemsize(self) -> int:
        """Bytes an element (16 assumed for text)."""
        return 16 if self.dtype == "string" else int(np.dtype(self.dtype).itemsize)

    @property
    def sample_bytes(self) -> int:
        """Raw bytes a sample."""
        return self.itemsize * math.prod(self.shape[1:])


@dataclass(frozen=True)
class Cut:
    """Inner ``chunks`` and ``shards`` (None: not sharded, the chunk is the file)."""

    chunks: tuple[int, ...]
    shards: tuple[int, ...] | None

    @property
    def files(self) -> tuple[int, ...]:
        """Shape of what one file holds."""
        return self.shards or self.chunks


def commit_batch(specs: Iterable[ArraySpec], samples: int) -> int:
    """Samples of one commit batch: a power of two that keeps a batch near 64 MB raw."""
    total = max(1, sum(spec.sample_bytes for spec in specs))
    size = 1 << max(0, (BATCH_BYTES // total).bit_length() - 1)
    return min(size, BATCH_SAMPLES, _power_above(max(1, samples)))


def cut(spec: ArraySpec, batch: int, frames: int | None = None) -> Cut:
    """Chunks and shards of one array whose commit batch is ``batch`` samples (a power of two).

    With ``frames`` a commit is a block of so many frames: no file of an array with a frame axis holds more.
    """
    if spec.dtype == "string":
        return Cut((batch, *(max(1, n) for n in spec.shape[1:])), None)
    chunks = _inner(spec, batch)
    if frames is not None and "frame" in spec.dims:
        i = spec.dims.index("frame")
        block = min(frames, spec.shape[i])
        chunks[i] = max(side for side in range(1, min(chunks[i], block) + 1) if block % side == 0)
    shards = [batch, *(_round_up(n, c) for n, c in zip(spec.shape[1:], chunks[1:], strict=True))]
    if frames is not None and "frame" in spec.dims:
        shards[i] = block
    if "layer" in spec.dims:
        _split_layers(spec, shards)
    return Cut(tuple(chunks), tuple(shards)) if tuple(chunks) != tuple(shards) else Cut(tuple(chunks), None)


def batches(samples: int, batch: int) -> list[slice]:
    """The commit batches of ``samples`` samples."""
    return [slice(start, min(start + batch, samples)) for start in range(0, samples, batch)]


def _inner(spec: ArraySpec, batch: int) -> list[int]:
    chunks = [1, *(_first_size(dim, n) for dim, n in zip(spec.dims[1:], spec.shape[1:], strict=True))]
    banded = [i for i, dim in enumerate(spec.dims) if dim in BANDED]
    for i in banded:
        while chunks[i] > 1 and _bytes(spec, chunks) > CHUNK_HIGH:
            chunks[i] = (chunks[i] + 1) // 2
    for i, dim in enumerate(spec.dims):
        if dim in ONE_AT_A_TIME[:-1]:
            _grow(spec, chunks, i, spec.shape[i])
    _grow(spec, chunks, 0, batch)
    return chunks


def _first_size(dim: str, n: int) -> int:
    if dim in ONE_AT_A_TIME:
        return 1
    return max(1, min(n, BAND) if dim in BANDED else n)


def _grow(spec: ArraySpec, chunks: list[int], i: int, limit: int) -> None:
    """Double one side while the chunk is small."""
    while chunks[i] < limit and _bytes(spec, chunks) < CHUNK_LOW:
        chunks[i] = min(2 * chunks[i], limit)


def _split_layers(spec: ArraySpec, shards: list[int]) -> None:
    """Where even one sample exceeds what a shard should hold, a shard holds fewer layers."""
    i = spec.dims.index("layer")
    while shards[i] > 1 and _bytes(spec, shards) > SHARD_HIGH:
        shards[i] = (shards[i] + 1) // 2


def _bytes(spec: ArraySpec, sides: list[int]) -> int:
    return spec.itemsize * math.prod(sides)


def _round_up(n: int, multiple: int) -> int:
    return max(1, -(-n // multiple)) * multiple


def _power_above(n: int) -> int:
    return 1 << (n - 1).bit_length()
