"""Metrics from capture's exact reductions: over every row, in float32, without the rows themselves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, TypeGuard

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from foveate.interfaces import Metric, TokenAxis
from foveate.metrics.labelled import BLOCK_BYTES, Keys, Tokens, counted
from foveate.metrics.rows import Reducible


def is_reducible(metric: Metric, site: xr.Dataset, keys: Keys) -> TypeGuard[Reducible]:
    """Whether the site's stored reductions give this metric over these keys."""
    if not isinstance(metric, Reducible) or metric.reduction not in site:
        return False
    return metric.over == "each" or keys == "all"


def reduced_blocks(
    array: xr.DataArray,
    metrics: Sequence[Reducible],
    *,
    key: Tokens,
    keys: Keys,
    allowed: NDArray[np.bool_] | None = None,
    masks: xr.DataArray | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    """Walk a reduction ``(sample, ..., token | key)`` as :func:`foveate.metrics.labelled.blocks` walks rows.

    ``allowed`` (token, key) is False where a causal mask blocks a key. ``masks``, with the dims of ``array``
    but the head, is what other masks leave: of reductions over tokens ``key_count``, the K of each row; of
    those over keys ``reader_share``, by which a mean over all queries becomes one over those that may read the
    key. Rows that may read nothing, and keys that nobody may read, are NaN.
    """
    samples = array.sizes["sample"]
    step = max(1, block_bytes * max(samples, 1) // max(4 * array.size, 1)) if isinstance(key, TokenAxis) else 1
    for start in range(0, max(samples, 1), step):
        part = np.asarray(array[start : start + step].values, dtype=np.float32)
        tokens = key if isinstance(key, TokenAxis) else key[start]
        left = None if masks is None else _beside(masks[start : start + step], array.dims)
        yield start, {metric.info.name: _reduce(metric, part, tokens, keys, allowed, left) for metric in metrics}


def _beside(masks: xr.DataArray, dims: Sequence[Hashable]) -> NDArray[np.float32]:
    """Values of ``masks`` with an axis of size 1 for the head."""
    return np.asarray(masks.expand_dims("head").transpose(*dims).values, dtype=np.float32)


def _reduce(
    metric: Reducible,
    values: NDArray[np.float32],
    key: TokenAxis,
    keys: Keys,
    allowed: NDArray[np.bool_] | None,
    left: NDArray[np.float32] | None,
) -> Any:
    chosen = counted(key, keys)
    if metric.over == "each":
        values = np.where(chosen, values, np.float32(np.nan))
        if left is not None:
            values = (values / np.where(left > 0, left, np.nan)).astype(np.float32)
    count = chosen.sum() if allowed is None else (allowed & chosen).sum(axis=-1)
    if metric.over == "all" and left is not None:
        values = np.where(left > 0, values, np.float32(np.nan)).astype(np.float32)
        count = np.where(left > 0, left, np.float32(1))
    return np.asarray(metric.reduce(values, np.asarray(count, dtype=np.float32)), dtype=np.float32)
