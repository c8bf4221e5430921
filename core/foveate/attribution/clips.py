"""Cells of a clip: the model's patches, once for each of its frame cells.

A video model seldom sees single frames: a tubelet covers two or more, and nothing inside one can be told apart.
So a map of a clip has one plane a *frame cell*, and several input frames may share it
(:meth:`~foveate.interfaces.AttentionSource.frame_cells`). Images have no frame axis at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.errors import PluginError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import AttentionSource, Batch

Frames = tuple[int, ...]
"""The frame cell of each input frame, ascending from 0; empty for images."""


def frames_of(source: AttentionSource, batch: Batch) -> Frames:
    """The frame cell of each input frame of a batch of clips; ``()`` for images.

    Raises PluginError where the source does not number them 0, 0, 1, 1, ... in order.
    """
    if batch.inputs.dim() != 5:
        return ()
    cells = tuple(int(cell) for cell in source.frame_cells(batch))
    length = int(batch.inputs.shape[1])
    if len(cells) != length or list(cells) != sorted(cells) or set(cells) != set(range(frame_count(cells))):
        raise PluginError(
            f"{type(source).__name__}.frame_cells: expected {length} numbers in ascending order, from 0 and "
            f"without gaps, got {cells}",
            remedy="return one frame cell for each input frame, for instance (0, 0, 1, 1) for tubelets of two",
        )
    return cells


def frame_count(frames: Frames) -> int:
    """How many frame cells there are; 0 for images."""
    return max(frames, default=-1) + 1


def map_shape(source: AttentionSource, batch: Batch) -> tuple[int, ...]:
    """Shape of one target's map: ``([frame cell,] row, column)``."""
    frames = frames_of(source, batch)
    return (*((frame_count(frames),) if frames else ()), *source.cells(batch).shape)


def pool_frames(values: ArrayLike, frames: Frames, *, reduce: Literal["mean", "sum"]) -> NDArray[np.float64]:
    """``(..., input frame, y, x)`` to ``(..., frame cell, y, x)``; without ``frames`` (images) the same array.

    ``sum`` adds the frames of a cell, ``mean`` averages them. NaN (a place outside the image) stays NaN.
    """
    array = np.asarray(values, dtype=np.float64)
    if not frames:
        return array
    join = np.mean if reduce == "mean" else np.sum
    parts = [join(array[..., members, :, :], axis=-3) for members in members_of(frames)]
    return np.stack(parts, axis=-3)


def members_of(frames: Frames) -> list[list[int]]:
    """The input frames of each frame cell."""
    return [[i for i, cell in enumerate(frames) if cell == wanted] for wanted in range(frame_count(frames))]


def frame_index(batch: Batch, sample: int) -> Sequence[int]:
    """Which frame of the sample each input frame is; their own numbers where the source does not say."""
    known = batch.per_sample.get("frame_index")
    if known is None:
        return range(int(batch.inputs.shape[1]))
    return [int(i) for i in known[sample]]
