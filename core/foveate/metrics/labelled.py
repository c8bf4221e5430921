"""Metrics on labelled attention: which keys count, block by block, with everything that fixes the number.

``keys="patch"`` (the default) looks at patch keys only, scaled to sum to 1, so that models with and without CLS
or registers compare; ``keys="all"`` takes every key but padding. Keys that do not count are NaN to the kernels.
Blocks are bounded in bytes and give exactly what the whole array would.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, Metric, MetricInfo, TokenAxis

Keys = Literal["patch", "all"]
Tokens = TokenAxis | Sequence[TokenAxis]
"""One axis for all samples, or one a sample where they differ."""

BLOCK_BYTES = 64 * 1024**2
_PATCH, _PADDING = TOKEN_KINDS.index("patch"), TOKEN_KINDS.index("padding")


def measure(
    attention: xr.DataArray,
    metrics: Iterable[Metric],
    *,
    query: Tokens,
    key: Tokens,
    keys: Keys = "patch",
    all_rows: bool | None = None,
    allowed: NDArray[np.bool_] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> xr.Dataset:
    """One variable a metric, labelled as the attention is.

    ``attention`` is ``(sample, *group, layer, head, query, key)`` (``sample`` and ``head`` may be absent).
    ``all_rows`` says that every query of the site is there; by default, where there are as many as keys.
    ``allowed`` (query, key) is False where a mask (causal) blocks a key: it does not count towards K then.
    Attributes of each variable: unit, bounds, citation, K, keys and what it was computed from.
    Raises UsageError where a metric needs what is not there, or the values are no attention weights.
    """
    chosen = list(metrics)
    rows = standard(attention)
    complete = all_rows if all_rows is not None else rows.sizes["query"] == rows.sizes["key"]
    for metric in chosen:
        if reason := unmet(metric.info, rows, query, key, all_rows=complete):
            raise UsageError(
                f"metric {metric.info.name!r}: {reason}", remedy="capture what it needs, or leave it out"
            )
    options: dict[str, Any] = {"keys": keys, "allowed": allowed, "block_bytes": block_bytes}
    parts = [block for _, block in blocks(rows, chosen, query=query, key=key, **options)]
    source = f"stored {attention.dtype}"
    variables = {
        metric.info.name: labelled(
            np.concatenate([part[metric.info.name] for part in parts]),
            metric.info,
            rows,
            describe(
                metric.info,
                keys=keys,
                count=key_count(key, keys_of(metric.info, keys), allowed),
                computed_from=source,
            ),
        )
        for metric in chosen
    }
    dataset = xr.Dataset(variables)
    return dataset if "sample" in attention.dims else dataset.isel(sample=0)


def standard(attention: xr.DataArray) -> xr.DataArray:
    """The array with a ``sample`` and a ``head`` axis, rows and keys last."""
    for name in ("sample", "head"):
        if name not in attention.dims:
            attention = attention.expand_dims(name)
    last = ("head", "query", "key")
    return attention.transpose("sample", *(d for d in attention.dims if d not in ("sample", *last)), *last)


def unmet(info: MetricInfo, rows: xr.DataArray, query: Tokens, key: Tokens, *, all_rows: bool) -> str:
    """Why the metric cannot be had from these rows; empty where it can."""
    missing = {
        "query_positions": not _placed(query) and "no query has a place in the picture",
        "key_positions": not _placed(key) and "no key has a place in the picture",
        "heads": rows.sizes["head"] < 2 and "it compares heads, and only one (or their mean) was kept",
        "all_rows": not all_rows and "it needs every query's row (capture with rows='all', or the reduction)",
    }
    return "; ".join(str(missing[need]) for need in info.needs if missing.get(need))


def _placed(tokens: Tokens) -> bool:
    axes = [tokens] if isinstance(tokens, TokenAxis) else tokens
    return any(bool(np.isfinite(axis.y).any()) for axis in axes)


def keys_of(info: MetricInfo, keys: Keys) -> Keys:
    """Which keys a metric really uses: some only make sense over all."""
    return "all" if "all_keys" in info.needs else keys


def counted(key: TokenAxis, keys: Keys) -> NDArray[np.bool_]:
    """Which keys count, (key,). Raises UsageError where patches are asked for and there are none."""
    if keys == "all":
        return np.asarray(key.kind != _PADDING)
    patches = np.asarray(key.kind == _PATCH)
    if not patches.any() and len(key):
        kinds = sorted({TOKEN_KINDS[code] for code in key.kind})
        raise UsageError(f"keys='patch': no patch among the keys ({', '.join(kinds)})", remedy="use keys='all'")
    return patches


def key_count(key: Tokens, keys: Keys, allowed: NDArray[np.bool_] | None = None) -> int | str:
    """K, or "varies" where samples (or, under a mask, rows) differ."""
    axes = [key] if isinstance(key, TokenAxis) else key
    counts = {int(counted(axis, keys).sum()) for axis in axes}
    return counts.pop() if len(counts) == 1 and allowed is None else "varies"


def blocks(
    rows: xr.DataArray,
    metrics: Sequence[Metric],
    *,
    query: Tokens,
    key: Tokens,
    keys: Keys = "patch",
    allowed: NDArray[np.bool_] | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, dict[str, NDArray[np.float32]]]]:
    """Walk along ``sample``: (position of the first sample, results of the block by metric name).

    ``rows`` is in the order of :func:`standard`. At least one sample a block; within a sample that exceeds
    ``block_bytes`` layers and queries are taken in turn.
    """
    samples = rows.sizes["sample"]
    one_sample = 4 * rows.size // max(samples, 1)
    ragged = not (isinstance(query, TokenAxis) and isinstance(key, TokenAxis))
    step = 1 if ragged else max(1, block_bytes // max(one_sample, 1))
    for start in range(0, max(samples, 1), step):
        part = rows.isel(sample=slice(start, start + step))
        axes = _axis(query, start), _axis(key, start)
        by_layer = [
            _reduce(piece, metrics, *axes, keys, allowed, block_bytes) for piece in _layers(part, block_bytes)
        ]
        axis = rows.dims.index("layer")
        yield start, {name: np.concatenate([piece[name] for piece in by_layer], axis) for name in by_layer[0]}


def _axis(tokens: Tokens, sample: int) -> TokenAxis:
    return tokens if isinstance(tokens, TokenAxis) else tokens[sample]


def _layers(part: xr.DataArray, block_bytes: int) -> Iterator[xr.DataArray]:
    layers = part.sizes["layer"]
    step = layers if 4 * part.size <= block_bytes else 1
    return (part.isel(layer=slice(start, start + step)) for start in range(0, max(layers, 1), max(step, 1)))


def _reduce(
    piece: xr.DataArray,
    metrics: Sequence[Metric],
    query: TokenAxis,
    key: TokenAxis,
    keys: Keys,
    allowed: NDArray[np.bool_] | None,
    block_bytes: int,
) -> dict[str, NDArray[np.float32]]:
    values = np.asarray(piece.values)
    if values.size and np.nanmin(values, initial=0.0) < 0:
        raise UsageError(f"metrics: values below 0 ({np.nanmin(values)}) are no attention weights")
    masked = {option: _mask(values, key, option, allowed) for option in {keys_of(m.info, keys) for m in metrics}}
    return {
        metric.info.name: np.asarray(
            _by_query(metric, masked[keys_of(metric.info, keys)], query, key, block_bytes), dtype=np.float32
        )
        for metric in metrics
    }


def _mask(values: NDArray[Any], key: TokenAxis, keys: Keys, allowed: NDArray[np.bool_] | None) -> NDArray[Any]:
    """In float32 at least, NaN at keys that do not count."""
    wide = values.astype(np.promote_types(values.dtype, np.float32))
    wide[..., ~counted(key, keys)] = np.nan
    if allowed is not None:
        wide[..., ~allowed] = np.nan
    return wide


def _by_query(metric: Metric, rows: NDArray[Any], query: TokenAxis, key: TokenAxis, block_bytes: int) -> Any:
    """One kernel call, or several over bands of queries whose results are joined as the metric declares."""
    queries = rows.shape[-2]
    splits = "query" not in metric.info.consumes or metric.info.accumulate != "rows"
    step = max(1, block_bytes * queries // max(rows.nbytes, 1)) if splits else queries
    if step >= queries:
        return metric.kernel(rows, query=query, key=key)
    bands = [slice(start, start + step) for start in range(0, queries, step)]
    parts = [metric.kernel(rows[..., band, :], query=take(query, band), key=key) for band in bands]
    return _join(metric.info, parts, [rows[..., band, :] for band in bands])


def _join(info: MetricInfo, parts: list[Any], bands: list[NDArray[Any]]) -> Any:
    if info.accumulate == "rows":
        kept = [dim for dim in ("head", "query", "key") if dim not in info.consumes]
        return np.concatenate(parts, axis=kept.index("query") - len(kept) - len(info.produces))
    if info.accumulate == "sum":
        return np.sum(parts, axis=0)
    weights = np.stack([_queries_seen(info, band) for band in bands]).astype(np.float64)
    total = weights.sum(0)
    weighted = np.where(weights > 0, np.stack(parts) * weights, 0.0).sum(0)
    return np.where(total > 0, weighted / np.maximum(total, 1), np.nan)


def _queries_seen(info: MetricInfo, band: NDArray[Any]) -> NDArray[np.intp]:
    """How many captured queries each result of a band is a mean over."""
    seen = (~np.isnan(band)).sum(axis=-2)  # (..., head, key)
    if "key" in info.consumes:
        seen = seen.max(axis=-1)
    if "head" in info.consumes:
        seen = seen.max(axis=-1 if "key" in info.consumes else -2)
    return np.asarray(seen.reshape(seen.shape + (1,) * len(info.produces)))


def take(tokens: TokenAxis, band: slice) -> TokenAxis:
    """Some of the tokens of an axis."""
    return replace(
        tokens,
        kind=tokens.kind[band],
        y=tokens.y[band],
        x=tokens.x[band],
        height=tokens.height[band],
        width=tokens.width[band],
        level=tokens.level[band],
        frame=tokens.frame[band],
        label=tokens.label[band] if tokens.label is not None else None,
    )


def result_dims(info: MetricInfo, dims: Sequence[Any]) -> tuple[str, ...]:
    """Dims of the metric's result from those of the rows."""
    return (*(str(dim) for dim in dims if dim not in info.consumes), *info.produces)


def labelled(values: NDArray[Any], info: MetricInfo, rows: xr.DataArray, attrs: Mapping[str, Any]) -> xr.DataArray:
    """A result as a DataArray with the coordinates of the rows that still apply."""
    dims = result_dims(info, rows.dims)
    coords = {name: coord for name, coord in rows.coords.items() if set(coord.dims) <= set(dims)}
    return xr.DataArray(values, dims=dims, coords=coords, name=info.name, attrs=dict(attrs))


def describe(info: MetricInfo, *, keys: Keys, count: int | str, computed_from: str) -> dict[str, Any]:
    """The attributes that go with every number: what it is and what fixes it."""
    limits = zip(("valid_min", "valid_max"), info.bounds, strict=True)
    return {
        "long_name": info.summary,
        "units": info.unit,
        **{name: value for name, value in limits if np.isfinite(value)},
        "better": info.better,
        "citation": info.citation,
        "over_keys": keys_of(info, keys),  # not "keys": xarray takes an object with .keys for a mapping
        "K": count,
        "computed_from": computed_from,
    }
