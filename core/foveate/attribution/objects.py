"""Where the detector itself put the object: the maps that an explanation of a detection has to beat.

Whoever paints an object's predicted box evenly has explained nothing about the model, and yet such a map often
does well under deletion, since objects are where boxes are. A method explains only what it shows beyond that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from foveate.attribution.clips import Frames, frames_of, map_shape
from foveate.attribution.objective import Objective
from foveate.attribution.padding import covered
from foveate.attribution.pixels import Cost
from foveate.attribution.reference import clip_share, mask_share
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import Geometry
    from foveate.interfaces import AttentionSource, Batch, BoundTarget, Prediction, TargetRow

Box = tuple[float, float, float, float]
Filler = Callable[["Geometry", CellGrid, Frames], "NDArray[np.float64]"]


def own_predictions(source: AttentionSource, batch: Batch, bound: BoundTarget) -> list[Prediction | None]:
    """The model's present answer for the object of each row; None where there is no object or no answer."""
    answers: dict[int, list[Prediction]] = {}
    size = Objective(source, batch, bound).rows(grad=False)
    samples = sorted({row.sample for row in bound.rows})
    for start in range(0, len(samples), size):
        block = samples[start : start + size]
        part = batch.replace(batch.inputs.detach()[block], block)
        with torch.no_grad():
            answers.update(zip(block, source.predictions(source.forward(part), part), strict=True))
    return [own_prediction(answers[row.sample], row) for row in bound.rows]


def own_prediction(answers: Sequence[Prediction], row: TargetRow) -> Prediction | None:
    """The answer that belongs to a row's object (query), among one sample's."""
    if row.object is None:
        return None
    return next((answer for answer in answers if answer.object == row.object), None)


def of_objects(bound: BoundTarget) -> bool:
    """Whether the targets are objects of a detector."""
    return any(row.object is not None for row in bound.rows)


@dataclass(frozen=True)
class OwnBox(Attribution):
    """The object's predicted box, filled evenly: the share of each cell that it covers.

    Cells outside the image are NaN, and so is the map of a row without a box. Raises UsageError where no row
    has one.
    """

    name: ClassVar[str] = "own_box"
    citation: ClassVar[str] = "control: the model's own box"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """One forward pass a sample."""
        found = own_predictions(source, batch, bound)
        boxes = [None if one is None else one.box for one in found]
        if not any(box is not None for box in boxes):
            raise UsageError("own_box: the explained targets are not objects with a box")
        return _filled(self, source, batch, bound, [_box_filler(box) for box in boxes])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward pass."""
        return Cost(1)


@dataclass(frozen=True)
class OwnMask(Attribution):
    """The object's predicted mask, filled evenly: the share of each cell under it; else as :class:`OwnBox`.

    Of a track, its mask in every frame.
    """

    name: ClassVar[str] = "own_mask"
    citation: ClassVar[str] = "control: the model's own mask"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """One forward pass a sample."""
        masks = [None if one is None else one.mask for one in own_predictions(source, batch, bound)]
        if not any(mask is not None for mask in masks):
            raise UsageError("own_mask: the explained targets are not objects with a mask")
        return _filled(self, source, batch, bound, [_mask_filler(mask) for mask in masks])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward pass."""
        return Cost(1)


def own_share(
    one: Prediction | None, geometry: Geometry, grid: CellGrid, frames: Frames = ()
) -> NDArray[np.float64]:
    """Share of each input cell under an object's box, or under its mask where it has none; NaN without both.

    ``frames`` are a clip's frame cells: a track has a mask ``(frame, y, x)``, its share ``(frame cell, y, x)``.
    """
    if frames:
        fill = None if one is None else _mask_filler(one.mask)
        return np.full((max(frames) + 1, *grid.shape), np.nan) if fill is None else fill(geometry, grid, frames)
    if one is not None and one.box is not None:
        return box_share(one.box, geometry, grid)
    if one is not None and one.mask is not None:
        return mask_share(one.mask, geometry, grid)
    return np.full(grid.shape, np.nan)


def box_share(box: Box, geometry: Geometry, grid: CellGrid) -> NDArray[np.float64]:
    """Share of each input cell's visible part under a box (top, left, bottom, right; original pixels), ``(y, x)``.

    What of the box lies outside the image does not count. NaN for cells outside the image, and everywhere for
    a box that is not finite.
    """
    cells = geometry.grid_to_original(grid)
    height, width = float(geometry.original_height), float(geometry.original_width)
    image = covered((0.0, 0.0, height, width), cells)
    if not np.isfinite(box).all():
        return np.full(cells.shape, np.nan)
    top, bottom = np.clip((box[0], box[2]), 0.0, height)
    left, right = np.clip((box[1], box[3]), 0.0, width)
    inside = covered((float(top), float(left), float(bottom), float(right)), cells)
    return np.asarray(np.divide(inside, image, out=np.full(cells.shape, np.nan), where=image > 0))


def _box_filler(box: Box | None) -> Filler | None:
    if box is None:
        return None

    def fill(geometry: Geometry, grid: CellGrid, frames: Frames) -> NDArray[np.float64]:
        share = box_share(box, geometry, grid)
        return np.broadcast_to(share, (max(frames) + 1, *grid.shape)) if frames else share

    return fill


def _mask_filler(mask: NDArray[np.bool_] | None) -> Filler | None:
    if mask is None:
        return None

    def fill(geometry: Geometry, grid: CellGrid, frames: Frames) -> NDArray[np.float64]:
        return clip_share(mask, geometry, grid, frames) if frames else mask_share(mask, geometry, grid)

    return fill


def _filled(
    method: Attribution,
    source: AttentionSource,
    batch: Batch,
    bound: BoundTarget,
    fillers: Sequence[Filler | None],
) -> AttributionMap:
    grid, frames, shape = source.cells(batch), frames_of(source, batch), map_shape(source, batch)
    maps = [
        np.full(shape, np.nan) if fill is None else fill(batch.geometry[row.sample], grid, frames)
        for fill, row in zip(fillers, bound.rows, strict=True)
    ]
    info = {"citation": method.citation, **({"frame_cells": frames} if frames else {})}
    return AttributionMap(method.name, np.stack(maps).astype(np.float32), grid, info=info)
