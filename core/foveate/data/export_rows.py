"""Which row of attention a table is about, and reading that row for every captured image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import xarray as xr

from foveate.data.labels import tokens_of
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, TokenAxis
from foveate.metrics.labelled import Keys, counted, standard, take

HEAD_MEAN = "mean"
_ROWS_AT_ONCE = 1024
_READ_FROM = ("readout", "pool", "cls")
"""Kinds of query that an answer is read from, the surest first."""


@dataclass(frozen=True)
class Selection:
    """Which row of attention a table is about. ``layer`` is the true number; ``head`` a number or "mean"."""

    site: str
    layer: int
    head: int | str
    query: int
    row: str
    """What the chosen query is, in words."""


def select(
    run: Run, *, site: str | None = None, layer: int = -1, head: int | str = HEAD_MEAN, query: int | None = None
) -> Selection:
    """Settle which row is meant: by default the last layer, the mean over heads, the row the answer is read from.

    ``layer`` is a true number, or counts from the end where negative; ``query`` is a position among the stored
    rows. Raises UsageError naming what exists, StoreError where no image was captured.
    """
    run.check_captured()
    name = site or _first_site(run)
    dataset = run.site(name)
    if "attention" not in dataset:
        raise UsageError(f"{run.path}: site {name} holds no attention rows", remedy="capture with --rows readout")
    position = _query_position(dataset, query)
    tokens = tokens_at(dataset, "query")
    words = f"{TOKEN_KINDS[int(tokens.kind[position])]} ({dataset.attrs.get('rows', 'rows')})"
    return Selection(name, _layer(dataset, layer), _head(dataset, head), position, words)


def rows_of(run: Run, selection: Selection) -> Iterator[tuple[xr.DataArray, TokenAxis, TokenAxis]]:
    """Blocks of the chosen row of captured images, (sample, layer, head, query, key) with one layer and query."""
    dataset = run.site(selection.site)
    attention = standard(dataset["attention"]).sel(layer=[selection.layer]).isel(query=[selection.query])
    spare = [dim for dim in attention.dims if dim not in ("sample", "layer", "head", "query", "key")]
    if spare:
        raise UsageError(f"site {selection.site}: a table needs one row an image, this site has {spare}")
    ragged = any("sample" in dataset[f"{axis}_kind"].dims for axis in ("query", "key"))
    step = 1 if ragged else _ROWS_AT_ONCE
    for start in range(0, run.ok.size, step):
        positions = run.ok[start : start + step]
        at = int(positions[0])
        query, key = (tokens_at(dataset, axis, at) for axis in ("query", "key"))
        yield attention.isel(sample=positions), take(query, slice(selection.query, selection.query + 1)), key


def one_head(rows: xr.DataArray, head: int | str) -> xr.DataArray:
    """The chosen head, or the mean of the weights over heads, as a head axis of one."""
    if head == HEAD_MEAN:
        return rows.astype(np.float32).mean("head", keepdims=True)
    return rows.isel(head=[int(head)])


def count_keys(run: Run, selection: Selection, keys: Keys) -> int:
    """K of the chosen row (of the first captured image, where images differ)."""
    dataset = run.site(selection.site)
    first = int(run.ok[0]) if run.ok.size else 0
    return int(counted(tokens_at(dataset, "key", first), keys).sum())


def tokens_at(dataset: xr.Dataset, axis: str, sample: int = 0) -> TokenAxis:
    """The tokens of an axis; those of one sample where samples differ."""
    return tokens_of(dataset, axis, sample if "sample" in dataset[f"{axis}_kind"].dims else None)


def _first_site(run: Run) -> str:
    for name in run.site_ids:
        dataset = run.site(name)
        if "attention" in dataset and (dataset["key_kind"].values == TOKEN_KINDS.index("patch")).any():
            return name
    raise UsageError(
        f"{run.path}: no site holds attention rows over patches", remedy="capture with --rows readout"
    )


def _layer(dataset: xr.Dataset, layer: int) -> int:
    have = [int(number) for number in dataset["layer"].values]
    if -len(have) <= layer < 0:
        return have[layer]
    if layer not in have:
        raise UsageError(f"no layer {layer}", remedy=f"layers that were kept: {', '.join(map(str, have))}")
    return layer


def _head(dataset: xr.Dataset, head: int | str) -> int | str:
    heads = standard(dataset["attention"]).sizes["head"]
    if head == HEAD_MEAN:
        return head
    if not isinstance(head, int) or not 0 <= head < heads:
        raise UsageError(f"no head {head!r}", remedy=f"'mean', or 0 to {heads - 1}")
    return head


def _query_position(dataset: xr.Dataset, query: int | None) -> int:
    count = dataset.sizes["query"]
    if query is not None:
        if not 0 <= query < count:
            raise UsageError(f"no query {query}", remedy=f"stored rows are 0 to {count - 1}")
        return query
    tokens = tokens_at(dataset, "query")
    for kind in _READ_FROM:
        if tokens.where(kind).size == 1:
            return int(tokens.where(kind)[0])
    if count == 1:
        return 0
    raise UsageError(
        f"{count} rows are stored and none is the row that the answer is read from",
        remedy="say which with --query, or capture with --rows readout",
    )
