"""Metrics from capture's exact reductions: over every row, in float32, without the rows themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    """Walk a reduction ``(sample, ..., token | key)`` as :func:`foveate.metrics.labelled.blocks` walks rows.

    ``allowed`` (token, key) is False where a mask blocks a key.
    """
    samples = array.sizes["sample"]
    step = max(1, block_bytes * max(samples, 1) // max(4 * array.size, 1)) if isinstance(key, TokenAxis) else 1
    for start in range(0, max(samples, 1), step):
        part = np.asarray(array[start : start + step].values, dtype=np.float32)
        tokens = key if isinstance(key, TokenAxis) else key[start]
        yield start, {metric.info.name: _reduce(metric, part, tokens, keys, allowed) for metric in metrics}


def _reduce(
    metric: Reducible,
    values: NDArray[np.float32],
    key: TokenAxis,
    keys: Keys,
    allowed: NDArray[np.bool_] | None,
) -> Any:
    chosen = counted(key, keys)
    if metric.over == "each":
        values = np.where(chosen, values, np.float32(np.nan))
    count = chosen.sum() if allowed is None else (allowed & chosen).sum(axis=-1)
    return np.asarray(metric.reduce(values, np.asarray(count, dtype=np.float32)), dtype=np.float32)
