"""Where things are over the frames of a clip: the surest track's path, and what moves, on the cells of a map.

What moves is known where samples have masks of every frame; else it is what the model's own tracks cover while
they change place; else optical flow says. Which of them it was is part of every number's name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import StoreError, UsageError
from foveate.geometry import CellGrid, regrid
from foveate.stats.known import mean_known
from foveate.study.temporal_subject import ClipSubject

if TYPE_CHECKING:
    from numpy.typing import NDArray

Origin = Literal["true masks", "tracks", "optical flow"]
STILL = 0.98
"""IoU of a mask with that of the frame before from which it counts as at rest."""


@dataclass(frozen=True, eq=False)
class Path:
    """A track on a grid of cells by frame cell: ``centre (frame, 2)`` (y, x, in cells), ``size (frame,)``, the
    square root of its area in cells; NaN where it is not there."""

    centre: NDArray[np.float64]
    size: NDArray[np.float64]


def best_track(subject: ClipSubject, place: int) -> str:
    """Name of the surest track of a clip; empty where the model answers with none."""
    answers = subject.run.predictions
    if "track" not in answers:
        return ""
    named = [str(name) for name in answers["track"].values[subject.positions[place]]]
    return next((name for name in named if name), "")


def has_tracks(subject: ClipSubject) -> bool:
    """Whether the run holds masks of tracks."""
    try:
        return "mask" in subject.run.tracks
    except StoreError:
        return False


def track_masks(subject: ClipSubject, place: int, rank: int | None = None) -> NDArray[np.float64]:
    """Stored masks of a clip ``([rank,] frame, y, x)`` on the canvas, NaN where there is no track."""
    position = subject.positions[place]
    stored = subject.run.tracks["mask"].isel(sample=position)
    picked = stored if rank is None else stored.isel(rank=rank)
    frames = subject.run.frame_index(position).size
    return np.asarray(picked.values, np.float64)[..., :frames, :, :]


def path_of(subject: ClipSubject, place: int, grid: CellGrid) -> Path:
    """The surest track's centroid and size on the cells of ``grid`` (regular cells, input pixels).

    A track that dies and is born again has NaN between; a clip without tracks is NaN throughout.
    """
    position, count = subject.positions[place], subject.counts[place]
    y, x = subject.run.track_canvas(position).centres
    share = np.nan_to_num(track_masks(subject, place, 0))
    total = share.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        middle = np.stack([(share.sum(2) @ y) / total, (share.sum(1) @ x) / total], axis=-1)  # original pixels
    inputs = np.array([subject.run.geometry(position).to_input(*point) for point in middle])
    step = np.array([np.diff(grid.y).mean(), np.diff(grid.x).mean()])
    cells = (inputs - [grid.y[0], grid.x[0]]) / step - 0.5
    side = np.where(total > 0, np.sqrt(total), np.nan)  # only ratios matter
    members = subject.run.frame_cells(position)
    by_cell = [np.flatnonzero(members == cell) for cell in range(count)]
    centre = np.stack([mean_known(cells[some], 0) for some in by_cell])
    return Path(centre, np.array([mean_known(side[some]) for some in by_cell], np.float64))


def origin_of(subject: ClipSubject) -> Origin:
    """What says what moves in the clips of this run: one answer for all, so that numbers compare."""
    masks = [subject.sample(place).mask for place in range(len(subject))]
    if all(mask is not None for mask in masks):
        return "true masks"
    return "tracks" if has_tracks(subject) else "optical flow"


def moving_cells(subject: ClipSubject, place: int, grid: CellGrid, origin: Origin) -> NDArray[np.bool_]:
    """What moves ``(frame cell, y, x)`` on ``grid``: cells at least half covered, or the one covered most.

    Empty in frames in which nothing moves. Raises MissingDependencyError where optical flow is not installed.
    """
    position, count = subject.positions[place], subject.counts[place]
    if origin == "tracks":
        stored = np.nan_to_num(track_masks(subject, place))
        shares = np.max([part * displaced_frames(part)[:, None, None] for part in stored], axis=0)
        drawn = subject.run.track_canvas(position)
    else:
        shares, drawn = _seen(subject, place, origin)
    cells = subject.run.geometry(position).grid_to_original(grid)
    laid = np.nan_to_num(regrid(shares, drawn, cells))
    members = subject.run.frame_cells(position)
    covered = np.stack([laid[members == cell].mean(axis=0) for cell in range(count)])
    most = covered.max(axis=(1, 2), keepdims=True)
    return np.asarray((covered >= np.minimum(0.5, most)) & (covered > 0))


def displaced_frames(masks: NDArray[Any]) -> NDArray[np.bool_]:
    """In which frames a mask ``(frame, y, x)`` (shares) is elsewhere than in the frame before; of the first frame,
    than in the next. A frame without it does not count, nor does one whose neighbour lacks it."""
    table = np.nan_to_num(np.asarray(masks, np.float64))
    if len(table) < 2:
        return np.zeros(len(table), np.bool_)
    before = np.concatenate([table[1:2], table[:-1]])
    both, either = (pick(table, before).sum(axis=(1, 2)) for pick in (np.minimum, np.maximum))
    there = (table.sum(axis=(1, 2)) > 0) & (before.sum(axis=(1, 2)) > 0)
    return np.asarray(there & (both < STILL * either), np.bool_)


def _seen(subject: ClipSubject, place: int, origin: Origin) -> tuple[NDArray[np.float64], CellGrid]:
    """True masks that move, or fast pixels, ``(frame, y, x)`` as shares, and the pixels' grid."""
    from foveate.temporal.enrichment import flow_speed, moving_region

    sample = subject.sample(place)
    height, width = sample.pixels.shape[1:3]
    drawn = CellGrid.regular(height, width, height=height, width=width)
    if origin == "true masks":
        if sample.mask is None:
            raise UsageError(f"{sample.id}: no mask", remedy="give every clip of the manifest a mask, or none")
        mask = sample.mask.astype(np.float64)
        return mask * displaced_frames(mask)[:, None, None], drawn
    fast = moving_region(flow_speed(sample.pixels)).astype(np.float64)
    return np.concatenate([fast[:1], fast]), drawn
