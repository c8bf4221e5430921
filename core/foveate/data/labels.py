"""The vocabulary of dimensions and coordinates, and token tables as coordinates.

One place says what a stored array's axes are called. A :class:`~foveate.interfaces.TokenAxis` becomes eight
coordinates with the axis' name in front (``key_kind``, ``key_y``, ...) and comes back from them unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import StoreError
from foveate.interfaces import TOKEN_KINDS, TokenAxis

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

DIMS: Mapping[str, str] = {
    "sample": "one image or clip of the manifest",
    "frame": "frame of a clip",
    "window": "attention window",
    "track": "tracked object",
    "position": "place at which attention over time runs",
    "layer": "true layer number of the model",
    "head": "attention head",
    "query": "kept rows: tokens that read (or one weighted readout row)",
    "token": "all tokens of the site that read, where a reduction runs over every row",
    "key": "tokens that are read from",
    "rank": "place in a list, best first",
    "point": "sampling point of a deformable row, level by level in the model's order",
    "yx": "coordinate: down, across",
    "place": "coordinate or extent of a reference: y, x, height, width",
    "target": "explained number (class, object)",
    "y": "rows of cells of the model's input",
    "x": "columns of cells of the model's input",
}
"""Every dimension that foveate itself writes, and what it means."""


@dataclass(frozen=True)
class Variable:
    """How one kind of array is stored: its dims after ``sample`` and the site's group dims, dtype, units."""

    dims: tuple[str, ...]
    dtype: str
    description: str
    units: str = "1"
    attention: bool = False


VARIABLES: Mapping[str, Variable] = {
    "attention": Variable(
        ("layer", "head", "query", "key"), "float16", "attention weights of the kept rows", attention=True
    ),
    "entropy": Variable(
        ("layer", "head", "token"), "float32", "Shannon entropy of every row over its keys", "nat"
    ),
    "received": Variable(
        ("layer", "head", "key"), "float32", "mean over all queries of the attention that a key receives"
    ),
    "head_mean": Variable(
        ("layer", "token", "key"), "float16", "attention weights, mean over heads", attention=True
    ),
    "topk_value": Variable(
        ("layer", "head", "token", "rank"), "float32", "largest attention weights of every row, descending"
    ),
    "allowed": Variable(
        ("layer", "query", "key"), "bool", "False where a mask blocks the key for this row in every head"
    ),
    "key_count": Variable(("layer", "token"), "int32", "number of keys that the row may read (masks, padding)"),
    "reader_share": Variable(("layer", "key"), "float32", "share of the queries that may read the key"),
    "topk_index": Variable(("layer", "head", "token", "rank"), "int32", "key positions of topk_value"),
    "location": Variable(
        ("layer", "head", "query", "point", "yx"),
        "float32",
        "sampling points of the kept rows, on the input",
        "pixel",
    ),
    "weight": Variable(("layer", "head", "query", "point"), "float32", "attention weights of the sampling points"),
    "inside": Variable(
        ("layer", "head", "query", "point"), "bool", "whether the sampling point lies on the input"
    ),
    "level": Variable(
        ("layer", "head", "query", "point"),
        "int32",
        "feature map that the point reads: 0 is the first among the keys",
    ),
    "reference": Variable(
        ("layer", "query", "place"),
        "float32",
        "reference point or box of the kept rows, extent 0 for points",
        "pixel",
    ),
}
"""What a site's arrays are; ``attention`` marks those that the plan's dtype applies to."""

COMPONENTS: Mapping[str, tuple[str, ...]] = {"yx": ("y", "x"), "place": ("y", "x", "height", "width")}
"""Dimensions whose entries have names."""

KIND_FLAGS: Mapping[str, object] = {
    "flag_values": list(range(len(TOKEN_KINDS))),
    "flag_meanings": " ".join(TOKEN_KINDS),
}
_TOKEN_FIELDS: Mapping[str, Mapping[str, object]] = {
    "kind": {**KIND_FLAGS, "long_name": "kind of token"},
    "y": {"units": "pixel", "long_name": "centre, down the model's input"},
    "x": {"units": "pixel", "long_name": "centre, across the model's input"},
    "height": {"units": "pixel", "long_name": "extent along y"},
    "width": {"units": "pixel", "long_name": "extent along x"},
    "level": {"long_name": "pyramid level, -1 where there is none"},
    "frame": {"long_name": "frame of the clip, -1 where there is none"},
}


@dataclass(frozen=True, eq=False)
class Coordinate:
    """A coordinate array with its dims and attributes."""

    dims: tuple[str, ...]
    values: NDArray[Any]
    attrs: Mapping[str, object] = field(default_factory=dict)


def as_index(name: str, values: Sequence[Any]) -> Coordinate:
    """The index coordinate of a dimension: text (ids) or whole numbers (layers, heads, ranks)."""
    text = any(isinstance(value, str) for value in values)
    return Coordinate((name,), np.array(values, dtype=object if text else np.int64))


def token_coordinates(axis: str, tokens: TokenAxis | Sequence[TokenAxis]) -> dict[str, Coordinate]:
    """The table behind ``axis`` as coordinates ``<axis>_kind``, ``<axis>_y`` ...

    One TokenAxis labels all samples: dims ``(axis,)``. A sequence of them (all of one length, padded by
    :func:`pad`) labels each sample: dims ``(sample, axis)``.
    """
    shared = isinstance(tokens, TokenAxis)
    tables = [tokens] if isinstance(tokens, TokenAxis) else list(tokens)
    dims = (axis,) if shared else ("sample", axis)
    coordinates = {}
    for name, attrs in _TOKEN_FIELDS.items():
        stacked = np.stack([getattr(table, name) for table in tables])
        coordinates[f"{axis}_{name}"] = Coordinate(dims, stacked[0] if shared else stacked, attrs)
    if any(table.label is not None for table in tables):
        words = np.array([table.label or ("",) * len(table) for table in tables], dtype=object)
        coordinates[f"{axis}_label"] = Coordinate(dims, words[0] if shared else words)
    return coordinates


def tokens_of(dataset: xr.Dataset, axis: str, sample: int | None = None) -> TokenAxis:
    """The table behind ``axis`` of a site, as it was captured. Raises StoreError where there is none.

    Where tokens differ between samples, ``sample`` says whose are wanted.
    """
    if f"{axis}_kind" not in dataset:
        known = sorted({str(name).removesuffix("_kind") for name in dataset.coords if str(name).endswith("_kind")})
        raise StoreError(f"tokens: no axis {axis!r} here", remedy=f"one of {', '.join(known) or 'none'}")
    table = dataset[[name for name in dataset.coords if str(name).startswith(f"{axis}_")]]
    if "sample" in table[f"{axis}_kind"].dims:
        if sample is None:
            raise StoreError(f"tokens: axis {axis!r} differs between samples", remedy="say which: sample=0")
        table = table.isel(sample=sample)
    columns: dict[str, Any] = {name: np.asarray(table[f"{axis}_{name}"].values) for name in _TOKEN_FIELDS}
    label = tuple(map(str, table[f"{axis}_label"].values)) if f"{axis}_label" in table.coords else None
    return TokenAxis(**columns, label=label)


def pad(tokens: TokenAxis, length: int) -> TokenAxis:
    """The same tokens followed by padding up to ``length``. Raises StoreError where they do not fit."""
    if len(tokens) > length:
        raise StoreError(
            f"tokens: {len(tokens)} do not fit a capacity of {length}",
            remedy=f"start a new run with a capacity of at least {len(tokens)}"
            f" (of a tracker: --option max_tracks, {len(tokens) - length} more than it was)",
        )
    return TokenAxis.concat(tokens, TokenAxis.of_kind("padding", length - len(tokens)))


def same_tokens(one: TokenAxis, other: TokenAxis) -> bool:
    """Whether two axes label the same tokens (NaN equals NaN)."""
    if len(one) != len(other) or (one.label or None) != (other.label or None):
        return False
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name in ("y", "x", "height", "width"))
        for name in _TOKEN_FIELDS
    )
