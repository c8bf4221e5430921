"""Maps that another tool made, let in on equal terms.

A foreign heatmap is an array and a statement of where it lies: over the model's input or over the original
image. It is moved to the model's cells by area, never interpolated, and from there is scored like any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from foveate.attribution.clips import Frames, frame_count, pool_frames
from foveate.errors import UsageError
from foveate.geometry import CellGrid, regrid
from foveate.interfaces import AttributionMap

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.geometry import Geometry

Space = Literal["input", "original"]
"""``input``: the array spans the model's input. ``original``: it spans the whole original image."""


@dataclass(frozen=True)
class ExternalMaps:
    """One heatmap a sample, by sample id, each ``(y, x)`` of any size over ``space``.

    Of clips ``(frame, y, x)``: one plane for each frame that the model reads, or for each of its frame cells.
    """

    name: str
    maps: Mapping[str, NDArray[Any]]
    space: Space = "original"
    signed: bool | None = None
    info: Mapping[str, Any] = field(default_factory=dict)

    def on_cells(
        self,
        ids: Sequence[str],
        geometry: Sequence[Geometry],
        cells: CellGrid,
        frames: Sequence[Frames] | None = None,
    ) -> AttributionMap:
        """The maps of some samples on the model's cells, ``(sample, y, x)``; samples without a map are NaN.

        ``frames`` are the frame cells of each sample's input frames, where samples are clips: ``(sample, frame,
        y, x)``, NaN after the last of a shorter clip. Raises UsageError where none of the samples has a map, or
        one has a wrong shape or holds nothing finite.
        """
        if not set(ids) & set(self.maps):
            raise UsageError(
                f"external map {self.name!r}: none of the samples is in it (asked for {list(ids)[:3]} ..., "
                f"it has {list(self.maps)[:3]} ...)",
                remedy="name the arrays of the .npz by the run's sample ids",
            )
        room = () if frames is None else (max(map(frame_count, frames), default=0),)
        values = np.full((len(ids), *room, *cells.shape), np.nan, np.float32)
        for row, (i, placed) in enumerate(zip(ids, geometry, strict=True)):
            if i not in self.maps:
                continue
            name = f"{self.name}[{i}]"
            if frames is None:
                values[row] = to_cells(self.maps[i], placed, cells, space=self.space, name=name)
            else:
                planes = _planes(self.maps[i], frames[row], name)
                laid = np.stack([to_cells(p, placed, cells, space=self.space, name=name) for p in planes])
                of_cells = len(laid) == frame_count(frames[row])
                joined = laid if of_cells else pool_frames(laid, frames[row], reduce="mean")
                values[row, : len(joined)] = joined
        signed = bool((values < 0).any()) if self.signed is None else self.signed
        info = {"citation": "external", "space": self.space, "regridding": "area mean", **self.info}
        return AttributionMap(self.name, values, cells, signed=signed, info=info)


def _planes(values: NDArray[Any], frames: Frames, name: str) -> NDArray[Any]:
    """The map of a clip, checked: one plane ``(y, x)`` an input frame or a frame cell."""
    array = np.asarray(values)
    if array.ndim != 3 or len(array) not in (len(frames), frame_count(frames)):
        raise UsageError(
            f"{name}: expected (frame, y, x) with {len(frames)} frames, or {frame_count(frames)} frame cells, "
            f"that the model reads; got shape {array.shape}",
            remedy="one plane for each frame that the model reads (frame_index in the run says which)",
        )
    return array


def to_cells(
    values: ArrayLike, geometry: Geometry, cells: CellGrid, *, space: Space = "original", name: str = "map"
) -> NDArray[np.float64]:
    """A heatmap ``(y, x)`` that evenly covers ``space``, as area means on input cells ``(row, column)``.

    NaN does not count; cells that only NaN (or nothing) covers are NaN. Raises UsageError for other
    shapes, infinities, or a map without one finite value.
    """
    array = np.asarray(values)
    if space not in get_args(Space):
        raise UsageError(f"{name}: space must be one of {', '.join(get_args(Space))}, got {space!r}")
    if array.ndim != 2 or min(array.shape) < 1 or not np.issubdtype(array.dtype, np.number):
        raise UsageError(
            f"{name}: expected a numeric array (y, x), got {array.dtype} of shape {array.shape}",
            remedy="reduce channels yourself (sum, or mean of absolute values) and say which in your text",
        )
    array = array.astype(np.float64)
    if np.isinf(array).any() or not np.isfinite(array).any():
        raise UsageError(f"{name}: {np.isinf(array).sum()} infinite and {np.isfinite(array).sum()} finite values")
    whole = (
        (geometry.input_height, geometry.input_width)
        if space == "input"
        else (geometry.original_height, geometry.original_width)
    )
    grid = CellGrid.regular(*array.shape, height=whole[0], width=whole[1])
    target = cells if space == "input" else geometry.grid_to_original(cells)
    return regrid(array, grid, target, reduce="mean")


def load_external(path: Path | str, *, name: str, ids: Sequence[str], space: Space | None = None) -> ExternalMaps:
    """Read maps from ``.npz`` (one array a sample, named by its id; or ``maps`` and ``ids``) or ``.npy``.

    A ``.npy`` holds ``(sample, y, x)`` (clips: ``(sample, frame, y, x)``) in the order of ``ids``. An
    ``.npz`` may state ``space`` and ``signed``. Nothing is unpickled. Raises UsageError where the file is not of
    this form.
    """
    path = Path(path)
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"external map {name!r}: cannot read {path}: {error}") from error
    if isinstance(loaded, np.ndarray):
        return ExternalMaps(name, _by_order(loaded, ids, path), space or "original")
    try:
        arrays = {key: loaded[key] for key in loaded.files}
    except ValueError as error:
        raise UsageError(f"external map {name!r}: {path} holds objects, not numbers: {error}") from error
    stated = str(arrays.pop("space", "original"))
    signed = bool(arrays.pop("signed")) if "signed" in arrays else None
    chosen: Any = space or stated
    return ExternalMaps(name, _by_name(arrays, ids, path), chosen, signed)


def _by_name(arrays: dict[str, NDArray[Any]], ids: Sequence[str], path: Path) -> Mapping[str, NDArray[Any]]:
    if "maps" not in arrays:
        return arrays
    names = [str(i) for i in arrays["ids"]] if "ids" in arrays else ids
    return _by_order(arrays["maps"], names, path)


def _by_order(maps: NDArray[Any], ids: Sequence[str], path: Path) -> Mapping[str, NDArray[Any]]:
    if maps.ndim not in (3, 4) or len(maps) != len(ids):
        raise UsageError(
            f"{path}: expected maps (sample, y, x) for {len(ids)} samples, got shape {maps.shape}",
            remedy="one map for each sample in the run's order, or an .npz with arrays named by sample id",
        )
    return dict(zip(ids, maps, strict=True))
