"""What all samples of a run share at one site: dims, shapes and the labels of every axis.

Most sites have constant axes, labelled once. Where a source declares a stream as ragged (its ``bounds`` give
a capacity), the axes of that stream are padded to the capacity and labelled for each sample: padding is 0
(-1 in indices) inside a captured sample, and its tokens are of kind ``padding``. Frames, tracks and other group
axes have a capacity, too; behind a sample's own end all is NaN (-1, False), for nothing was there to look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.arrays import fill_value
from foveate.data.labels import COMPONENTS, VARIABLES, Coordinate, as_index, pad, same_tokens, token_coordinates
from foveate.data.layout import ArraySpec
from foveate.errors import SampleError, StoreError
from foveate.interfaces import AttentionSource, Site, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.engine import SiteCapture

AXES = ("query", "token", "key")
"""Axes that a token table labels; fields of the same name hold the tables."""
ZERO_WHERE_ABSENT = ("attention", "head_mean")
"""Weights of rows and keys that do not exist; other numbers about them are NaN where tokens come and go."""
RAGGED_AXES = {"query": ("query", "token"), "key": ("key",)}
"""What ``Site.ragged`` names, as axes of stored arrays."""


@dataclass(frozen=True, eq=False)
class SiteFrame:
    """One site of a run. ``dims`` and ``shapes`` (by array) leave out ``sample``; ``ragged`` axes are padded."""

    site: Site
    layers: tuple[int, ...]
    query: TokenAxis
    token: TokenAxis
    key: TokenAxis
    query_index: tuple[int, ...]
    rule: str
    dims: Mapping[str, tuple[str, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    ragged: frozenset[str] = frozenset()

    @property
    def attrs(self) -> dict[str, Any]:
        """What the site's group says of itself."""
        site = self.site
        told = {name: getattr(site, name) for name in ("kind", "form", "normalised_over", "summary", "masks")}
        streams: dict[str, Any] = {
            "query_stream": site.query,
            "key_stream": site.key,
            "ragged": sorted(self.ragged),
        }
        streams |= {"group": list(site.group), "comes_and_goes": list(site.ragged), "optional": site.optional}
        return {**told, **streams, "modules": site.modules, "rows": self.rule, "model_heads": site.heads}

    @property
    def sizes(self) -> dict[str, int]:
        """Size of every dim that occurs."""
        return {
            dim: size for name in self.dims for dim, size in zip(self.dims[name], self.shapes[name], strict=True)
        }

    def coordinates(self, ids: Sequence[str]) -> dict[str, Coordinate]:
        """Labels of every axis that is the same for all samples."""
        sizes = self.sizes
        coordinates = {"sample": as_index("sample", ids), "layer": as_index("layer", self.layers)}
        if "head" in sizes:
            # One entry where the model has more is their mean: no head of the model, hence -1.
            averaged = sizes["head"] == 1 and self.site.heads > 1
            coordinates["head"] = as_index("head", [-1] if averaged else range(sizes["head"]))
        for axis in AXES:
            if axis in sizes and axis not in self.ragged:
                coordinates |= token_coordinates(axis, getattr(self, axis))
        coordinates |= {dim: as_index(dim, names) for dim, names in COMPONENTS.items() if dim in sizes}
        if "query" in sizes and "query" not in self.ragged:
            position = np.array(self.query_index, np.int64)
            told = {"long_name": "position of the kept row, -1 for a weighted readout row"}
            coordinates["query_index"] = Coordinate(("query",), position, told)
        return coordinates

    def token_columns(self) -> dict[str, Coordinate]:
        """The tables of ragged axes, which every sample has for itself: dims ``(sample, axis)``."""
        columns: dict[str, Coordinate] = {}
        for axis in sorted(self.ragged & set(self.sizes) & set(AXES)):
            columns |= token_coordinates(axis, [getattr(self, axis)])
        return columns

    def specs(self, samples: int, dtype: str) -> list[ArraySpec]:
        """Every array of the site that is filled sample by sample; ``dtype`` is for attention weights."""
        root = f"sites/{self.site.id}"
        arrays = [
            ArraySpec(
                f"{root}/{name}",
                ("sample", *self.dims[name]),
                (samples, *shape),
                dtype if VARIABLES[name].attention else VARIABLES[name].dtype,
                {"long_name": VARIABLES[name].description, "units": VARIABLES[name].units},
            )
            for name, shape in self.shapes.items()
        ]
        tables = [
            ArraySpec(f"{root}/{name}", c.dims, (samples, *c.values.shape[1:]), _dtype(c.values), c.attrs)
            for name, c in self.token_columns().items()
        ]
        return arrays + tables

    def nothing(self, name: str, array: NDArray[Any]) -> float:
        """What a token that does not exist has: 0 (-1 in indices), NaN in numbers about those that come and go."""
        if self.site.ragged and array.dtype.kind == "f" and name not in ZERO_WHERE_ABSENT:
            return float("nan")
        return -1 if array.dtype.kind == "i" else 0

    def check(self, capture: SiteCapture) -> None:
        """Raise SampleError where the constant axes or the arrays of a capture are not those of the run."""
        _check_tokens(self, framed(capture, self.site, {}))
        if set(capture.arrays) != set(self.shapes):
            raise SampleError(
                f"site {self.site.id}: arrays {sorted(capture.arrays)}, the run has {sorted(self.shapes)}"
            )

    def fit(self, capture: SiteCapture) -> dict[str, NDArray[Any]]:
        """One batch's arrays ``(sample, ...)`` by path, padded to this frame, with its token tables.

        Raises SampleError where the batch's tokens or shapes are not those of the run.
        """
        sizes = self.sizes
        other = framed(capture, self.site, {axis: sizes[axis] for axis in self.ragged if axis in sizes})
        _check_same(self, other)
        count = len(next(iter(capture.arrays.values()))) if capture.arrays else 0
        padded = {
            name: _padded(array, (count, *self.shapes[name]), len(self.site.group), self.nothing(name, array))
            for name, array in capture.arrays.items()
        }
        tables = {name: np.repeat(c.values, count, axis=0) for name, c in other.token_columns().items()}
        return {f"sites/{self.site.id}/{name}": array for name, array in (padded | tables).items()}


def first_frame(
    source: AttentionSource,
    capture: SiteCapture,
    bounds: Mapping[str, int],
    frames: tuple[int, int] | None = None,
    *,
    stored: Mapping[str, int] | None = None,
    by_blocks: bool = False,
) -> SiteFrame:
    """The frame that the first batch teaches; ``bounds`` are the source's capacities by stream and group axis.

    Of clips, ``frames`` are those that the model read of the first sample and the most that it may read of any:
    where a site has an entry for each frame read, it gets room for the longest clip. ``stored`` sizes of a run
    that is there win. ``by_blocks`` of frames, the rows kept may be others in every block.
    """
    site = next(site for site in source.sites if site.id == capture.site)
    streams = {"token": site.query, "key": site.key}
    capacity = {axis: bounds[name] for axis, name in streams.items() if name in bounds}
    for axis in (axis for name in site.ragged for axis in RAGGED_AXES[name]):
        capacity.setdefault(axis, _room(getattr(capture, axis), frames))
    if "token" in capacity:
        # Kept rows of a ragged stream (objects, tracks) are labelled for each sample, however many they are.
        every = capture.rule == "all" or (by_blocks and capture.query_index != (-1,))
        capacity["query"] = capacity["token"] if every else len(capture.query)
    capacity |= _group_capacity(capture, site, bounds, frames)
    if stored is not None:
        capacity |= {axis: stored[axis] for axis in (*capacity, *site.group) if axis in stored}
    return framed(capture, site, capacity)


def _room(tokens: TokenAxis, frames: tuple[int, int] | None) -> int:
    """For tokens of which the source states no bound: as many as there are, or as there may be frames."""
    by_frame = frames is not None and len(tokens) == frames[0] == len(tokens.where("frame"))
    return max(frames) if frames is not None and by_frame else len(tokens)


def _group_capacity(
    capture: SiteCapture, site: Site, bounds: Mapping[str, int], frames: tuple[int, int] | None
) -> dict[str, int]:
    capacity: dict[str, int] = {axis: bounds[axis] for axis in site.group if axis in bounds}
    if "frame" in site.group and "frame" not in capacity and frames is not None and capture.arrays:
        found = next(iter(capture.arrays.values())).shape[1 + site.group.index("frame")]
        if found == frames[0]:
            capacity["frame"] = max(frames)
    return capacity


def framed(capture: SiteCapture, site: Site, capacity: Mapping[str, int]) -> SiteFrame:
    """A capture's own frame, its ragged axes padded to ``capacity``. Raises SampleError where they overflow."""
    frame = SiteFrame(
        site,
        capture.layers,
        capture.query,
        capture.token,
        capture.key,
        capture.query_index,
        capture.rule,
        {name: (*site.group, *VARIABLES[name].dims) for name in capture.arrays},
        {name: array.shape[1:] for name, array in capture.arrays.items()},
        frozenset(capacity),
    )
    try:
        axes = {axis: pad(getattr(frame, axis), length) for axis, length in capacity.items() if axis in AXES}
    except StoreError as error:
        raise SampleError(f"site {site.id}: {error.message}", remedy=error.remedy) from None
    for axis, size in frame.sizes.items():
        if axis in site.group and size > capacity.get(axis, size):
            raise SampleError(
                f"site {site.id}: {size} {axis}s do not fit a capacity of {capacity[axis]}",
                remedy=f"start a new run with a capacity of at least {size}",
            )
    shapes = {
        name: tuple(capacity.get(dim, size) for dim, size in zip(frame.dims[name], shape, strict=True))
        for name, shape in frame.shapes.items()
    }
    query, token, key = (axes.get(axis, getattr(frame, axis)) for axis in AXES)
    if site.ragged:
        # Tokens that come and go are told apart by name; the first sample may have none that has one.
        query, token, key = (named(tokens) for tokens in (query, token, key))
    return replace(frame, shapes=shapes, query=query, token=token, key=key)


def named(tokens: TokenAxis) -> TokenAxis:
    """The same tokens, all with a name, which may be empty."""
    return tokens if tokens.label is not None else replace(tokens, label=("",) * len(tokens))


def _check_same(first: SiteFrame, other: SiteFrame) -> None:
    _check_tokens(first, other)
    if first.shapes != other.shapes:
        raise SampleError(f"site {first.site.id}: arrays of shape {other.shapes}, the run has {first.shapes}")


def _check_tokens(first: SiteFrame, other: SiteFrame) -> None:
    for axis in set(AXES) - first.ragged:
        ours, theirs = getattr(first, axis), getattr(other, axis)
        if not same_tokens(ours, theirs):
            raise SampleError(
                f"site {first.site.id}: this sample's {axis} tokens ({len(theirs)}) are not those of the run"
                f" ({len(ours)})",
                remedy="capture inputs of one size in a run, or let the source declare the stream in bounds()",
            )


def _padded(array: NDArray[Any], shape: tuple[int, ...], groups: int, nothing: float) -> NDArray[Any]:
    """``(sample, *group, ...)`` filled up to ``shape``: tokens with ``nothing``, group axes with "not there"."""
    if array.shape == shape:
        return array
    margin = [(0, whole - size) for size, whole in zip(array.shape, shape, strict=True)]
    none, ends = [(0, 0)] * len(margin), 1 + groups
    inside = np.pad(array, none[:ends] + margin[ends:], constant_values=nothing)
    outside = fill_value(array.dtype.name)
    padded: NDArray[Any] = np.pad(inside, margin[:ends] + none[ends:], constant_values=outside)
    return padded


def _dtype(values: NDArray[Any]) -> str:
    return "string" if values.dtype.kind == "O" else str(values.dtype.name)
