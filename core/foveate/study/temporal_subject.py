"""What the analyses over time look at: a run of clips, its videos, and rows by the frames of their keys.

Attention is read one layer and head at a time, so that a video transformer of thousands of tokens fits in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, AttentionSource, Sample, TokenAxis

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.render.style import Picture
    from foveate.study.detection import Finding

OWN_DIMS = ("sample", "layer", "head", "query", "key")
PADDING = TOKEN_KINDS.index("padding")


@dataclass(eq=False)
class Outcome:
    """What an analysis found: numbers, arrays for the run by product name, and figures by file name."""

    findings: list[Finding] = field(default_factory=list)
    products: dict[str, xr.Dataset] = field(default_factory=dict)
    figures: dict[str, Picture] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    """Site (or part) -> why it has no numbers here."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one head ``(query, key)``, padding and rows that do not exist left out, with the frames of both.

    ``even`` are rows of the same support with equal weights on every key that the row may read.
    """

    weights: NDArray[np.float64]
    even: NDArray[np.float64]
    query_frame: NDArray[np.int64]
    key_frame: NDArray[np.int64]


@dataclass(eq=False)
class ClipSubject:
    """One run of clips. ``at_most`` clips, the first of the run; ``seed`` fixes every draw.

    Raises UsageError for a run of images, where nothing was captured, and where every clip is a single frame.
    """

    run: Run
    at_most: int | None = None
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options with which the model is opened again, for instance ``device``."""

    def __post_init__(self) -> None:
        if self.run.media != "clip":
            raise UsageError(
                f"{self.run.path}: a run of images has no frames",
                remedy="capture clips: foveate capture MODEL clips/",
            )
        self.positions = [int(i) for i in self.run.ok[: self.at_most]]
        if not self.positions:
            raise UsageError(
                f"{self.run.path}: no sample was captured", remedy="foveate validate says what failed"
            )
        if self.frames < 2:
            raise UsageError(
                f"{self.run.path}: every clip is one frame (cell) to the model, so nothing changes over time",
                remedy="capture clips of more frames (--frames, --window)",
            )

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def ids(self) -> list[str]:
        """Names of the clips, in the order of every finding's values."""
        return [str(self.run.samples["id"].values[i]) for i in self.positions]

    @property
    def videos(self) -> list[str]:
        """The recording of each clip: the unit of statistics."""
        return [
            str(self.run.samples["video"].values[i]) or name
            for i, name in zip(self.positions, self.ids, strict=True)
        ]

    @cached_property
    def counts(self) -> list[int]:
        """Frame cells of each clip."""
        return [int(self.run.frame_cells(i).max()) + 1 for i in self.positions]

    @property
    def frames(self) -> int:
        """Frame cells of the longest clip."""
        return max(self.counts)

    @cached_property
    def source(self) -> AttentionSource:
        """The model, opened again."""
        return self.run.open_source(**self.overrides)

    def sample(self, place: int) -> Sample:
        """One clip, decoded again and cut to the frames that the model read."""
        position = self.positions[place]
        whole, index = self.run.load_sample(position), self.run.frame_index(position)
        mask = None if whole.mask is None else whole.mask[index]
        times = None if whole.times is None else whole.times[index]
        return replace(whole, pixels=whole.pixels[index], mask=mask, times=times)

    # ------------------------------------------------------------------------------- attention

    def sites(self) -> Iterator[tuple[str, xr.Dataset]]:
        """Sites with stored rows. Raises UsageError where there is none."""
        kept = [(name, self.run.site(name)) for name in self.run.site_ids]
        found = [(name, site) for name, site in kept if "attention" in site]
        if not found:
            raise UsageError(f"{self.run.path}: no attention rows were kept", remedy="capture with --rows all")
        return iter(found)

    def rows(self, name: str, site: xr.Dataset, place: int, layer: int, head: int) -> Iterator[Rows]:
        """Rows of one layer and head, by positions; one entry for each group (track, cell) that has any row."""
        position = self.positions[place]
        query, key = (self.run.tokens(name, axis, position) for axis in ("query", "key"))
        groups = group_dims(site)
        picked = site["attention"].isel(sample=position, layer=layer, head=head)
        weights = np.asarray(picked.transpose(*groups, "query", "key").values, np.float64)
        allowed = self._allowed(site, position, layer, groups, weights.shape)
        keep = [np.flatnonzero(axis.kind != PADDING) for axis in (query, key)]
        shape = (-1, *weights.shape[-2:])
        for rows, may in zip(weights.reshape(shape), allowed.reshape(shape), strict=True):
            there = keep[0][np.nan_to_num(rows[keep[0]]).sum(axis=1) > 0]
            if there.size:
                may_here = may[there][:, keep[1]].astype(np.float64)
                even = may_here / np.maximum(may_here.sum(axis=1, keepdims=True), 1.0)
                frames = (query.frame[there].astype(np.int64), key.frame[keep[1]].astype(np.int64))
                yield Rows(rows[there][:, keep[1]], even, *frames)

    def _allowed(
        self, site: xr.Dataset, position: int, layer: int, groups: list[str], shape: tuple[int, ...]
    ) -> NDArray[np.bool_]:
        """Which keys a row may read, ``(*group, query, key)``; all where no mask was stored."""
        if "allowed" not in site:
            return np.ones(shape, np.bool_)
        stored = site["allowed"]
        at = {name: value for name, value in {"sample": position, "layer": layer}.items() if name in stored.dims}
        some = stored.isel(at)
        some = some.transpose(*(dim for dim in (*groups, "query", "key") if dim in some.dims))
        return np.broadcast_to(np.asarray(some.values, bool), shape)

    # ------------------------------------------------------------------------------- products

    def whole(self, values: NDArray[Any]) -> NDArray[Any]:
        """``(clip, ...)`` as ``(sample, ...)`` of the whole run, NaN for clips that were not analysed."""
        table = np.full((len(self.run), *values.shape[1:]), np.nan, np.float32)
        table[self.positions] = values
        return table


def group_dims(site: xr.Dataset) -> list[str]:
    """The axes of a site's rows besides those that every site has: frame, track, window."""
    return [str(dim) for dim in site["attention"].dims if dim not in OWN_DIMS]


def refusal(name: str, site: xr.Dataset, key: TokenAxis) -> str:
    """Why a site says nothing of frames; empty where it does."""
    if "frame" in group_dims(site):
        return f"{name} attends within each frame: no row reads two frames"
    placed = key.frame[key.kind != PADDING]
    if (placed < 0).all():
        return f"{name}: its keys belong to no frame"
    if np.unique(placed[placed >= 0]).size < 2:
        return f"{name}: its keys are of one frame"
    return ""


def there(subject: ClipSubject) -> NDArray[np.bool_]:
    """Which frame cells a clip has, ``(clip, frame cell)``."""
    return np.arange(subject.frames) < np.array(subject.counts)[:, None]


def dataset(variables: Mapping[str, tuple[tuple[str, ...], NDArray[Any], str]], **coords: Any) -> xr.Dataset:
    """A labelled product: name -> (dims, values, what it is)."""
    import xarray as xr

    return xr.Dataset(
        {name: (dims, v, {"long_name": told}) for name, (dims, v, told) in variables.items()}, coords
    )
