"""Masks of tracked objects as they are stored: on a reduced canvas, with boxes and areas, frame by frame.

Pictures and analyses then need neither the model nor the full-size masks. A canvas cell holds the share of its
area inside the track; the canvas spans the whole picture of each sample, whatever its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.labels import Coordinate, as_index
from foveate.data.layout import ArraySpec
from foveate.data.records import EDGES
from foveate.errors import SampleError
from foveate.geometry import CellGrid, Geometry, regrid
from foveate.interfaces import AttentionSource, Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

GROUP = "tracks"
CANVAS_SIDE = 128
"""Cells along the longer side of the canvas, at most."""
BOXES = tuple(f"box_{edge}" for edge in EDGES)
MEANS: Mapping[str, tuple[str, str]] = {
    "mask": ("1", "share of the canvas cell inside the track"),
    **{name: ("pixel", f"{name[4:]} edge of the track in the original picture") for name in BOXES},
    "area": ("1", "share of the picture inside the track"),
}
"""Units and meaning of each array."""


@dataclass(frozen=True)
class TrackFrame:
    """What the samples of a run share: room for ``ranks`` tracks and ``frames`` frames, and the canvas' cells."""

    ranks: int
    frames: int
    canvas: tuple[int, int]

    @classmethod
    def of(cls, geometry: Geometry, ranks: int, frames: int) -> TrackFrame:
        """With a canvas in the shape of the first sample's picture."""
        return cls(ranks, frames, geometry.canvas(CANVAS_SIDE).shape)

    @property
    def attrs(self) -> dict[str, Any]:
        """What the group says of itself."""
        said = f"{self.canvas[0]} x {self.canvas[1]} equal cells over the whole original picture of each sample"
        return {"canvas": said, "frames": "those that the model read: samples/frame_index"}

    def coordinates(self, ids: Sequence[str]) -> dict[str, Coordinate]:
        """Sample and rank; ``predictions/track`` names the track of each rank."""
        return {"sample": as_index("sample", ids), "rank": as_index("rank", range(self.ranks))}

    def specs(self, samples: int) -> list[ArraySpec]:
        """The arrays, allocated for all samples."""
        dims, shape = ("sample", "rank", "frame"), (samples, self.ranks, self.frames)
        told = {name: {"units": units, "long_name": meaning} for name, (units, meaning) in MEANS.items()}
        flat = [ArraySpec(f"{GROUP}/{name}", dims, shape, "float32", told[name]) for name in (*BOXES, "area")]
        mask = ArraySpec(f"{GROUP}/mask", (*dims, "y", "x"), (*shape, *self.canvas), "float16", told["mask"])
        return [mask, *flat]

    def arrays(self, predictions: Sequence[Prediction], frames: int) -> dict[str, NDArray[Any]]:
        """One sample's arrays by path, of its ``frames`` frames as the model read them.

        Raises SampleError where a mask has another number of frames.
        """
        arrays = self.empty(frames)
        for rank, prediction in enumerate(predictions[: self.ranks]):
            if prediction.mask is not None:
                _check(prediction, frames)
                for name, values in drawn(prediction.mask, self.canvas).items():
                    arrays[f"{GROUP}/{name}"][rank] = values
        return arrays

    def empty(self, frames: int) -> dict[str, NDArray[Any]]:
        """Arrays ``(rank, frame, ...)`` by path of a sample without tracks."""
        flat = {f"{GROUP}/{name}": np.full((self.ranks, frames), np.nan, np.float32) for name in (*BOXES, "area")}
        return {f"{GROUP}/mask": np.full((self.ranks, frames, *self.canvas), np.nan, np.float16), **flat}

    def padded(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The same, filled with NaN up to the run's number of frames. Raises SampleError where they overflow."""
        done = {}
        for name, array in arrays.items():
            spare = self.frames - array.shape[1]
            if spare < 0:
                raise SampleError(f"tracks: {array.shape[1]} frames do not fit a capacity of {self.frames}")
            done[name] = np.pad(array, [(0, 0), (0, spare), *[(0, 0)] * (array.ndim - 2)], constant_values=np.nan)
        return done


def gives_tracks(source: AttentionSource, predictions: Sequence[Sequence[Prediction]]) -> bool:
    """Whether a source of clips answers with masks over frames, by its answers or its targets."""
    answered = any(p.mask is not None and p.mask.ndim == 3 for row in predictions for p in row)
    return source.media == "clip" and (answered or "mask" in source.targets)


def drawn(mask: NDArray[np.bool_], canvas: tuple[int, int]) -> dict[str, NDArray[Any]]:
    """A mask (frame, y, x) as what is stored of it: mask (frame, *canvas), boxes and area (frame,)."""
    frames, height, width = mask.shape
    cells = CellGrid.regular(*canvas, height=height, width=width)
    share = np.zeros((frames, *canvas), np.float16)
    boxes = np.full((4, frames), np.nan, np.float32)
    for i, inside in enumerate(mask):
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        if rows.size:
            top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
            boxes[:, i] = top, left, bottom, right
            pixels = CellGrid(np.arange(top, bottom + 1.0), np.arange(left, right + 1.0))
            covered = regrid(inside[top:bottom, left:right], pixels, cells, reduce="sum")
            share[i] = np.nan_to_num(covered) / cells.areas
    area = mask.reshape(frames, -1).mean(1, dtype=np.float64).astype(np.float32)
    return {"mask": share, **dict(zip(BOXES, boxes, strict=True)), "area": area}


def _check(prediction: Prediction, frames: int) -> None:
    mask = prediction.mask
    if mask is not None and (mask.ndim != 3 or len(mask) != frames):
        raise SampleError(
            f"track {prediction.track}: a mask of shape {mask.shape}, but the model read {frames} frames",
            remedy="a mask of a clip is (frame, y, x) over the frames of Batch.per_sample['frame_index']",
        )
