"""Clips in jobs over a run: which samples can share a batch, and what the frame axis of their products means.

A product of clips has an axis ``frame`` of frame cells, as long as the clip with the most; behind the end of a
shorter clip there is NaN.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.attribution.clips import frames_of
from foveate.errors import UsageError
from foveate.faithfulness.replacement import FREEZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.faithfulness.scoring import Scoring
    from foveate.faithfulness.units import Unit
    from foveate.interfaces import AttentionSource, Batch


def cell_counts(run: Run) -> NDArray[np.int64]:
    """Frame cells of every sample ``(sample,)``; 0 for images and for what was not captured."""
    if run.media != "clip":
        return np.zeros(len(run), np.int64)
    cells = run.samples["frame_cell"].values
    return np.asarray(cells.max(axis=1, initial=-1) + 1, np.int64)


def map_shape(run: Run) -> tuple[int, ...]:
    """Shape of a stored map: ``(row, column)``, of clips ``(frame cell, row, column)``, as long as the longest."""
    frames = (max(1, int(cell_counts(run).max(initial=0))),) if run.media == "clip" else ()
    return (*frames, *run.grid.shape)


def frame_coords(run: Run) -> dict[str, Any]:
    """Coordinates of the axis ``frame`` of products of clips; none for images.

    ``frame`` numbers the frame cells. ``frame_first`` and ``frame_last`` ``(sample, frame)`` are frames of the
    sample, ``frame_time`` is their mean time in seconds since the first frame of the file.
    """
    if run.media != "clip":
        return {}
    room = map_shape(run)[0]
    first, last = (np.full((len(run), room), -1, np.int64) for _ in range(2))
    time = np.full((len(run), room), np.nan)
    for i in run.ok:
        cells, index, seconds = run.frame_cells(int(i)), run.frame_index(int(i)), run.times(int(i))
        for cell in np.unique(cells):
            members = cells == cell
            first[i, cell], last[i, cell] = index[members].min(), index[members].max()
            time[i, cell] = seconds[members].mean()
    dims = ("sample", "frame")
    return {
        "frame": ("frame", np.arange(room), {"long_name": "frame cell of the model"}),
        "frame_first": (dims, first, {"long_name": "first frame of the sample in the cell, -1 for none"}),
        "frame_last": (dims, last, {"long_name": "last frame of the sample in the cell, -1 for none"}),
        "frame_time": (dims, time, {"long_name": "mean time of the frames in the cell", "units": "s"}),
    }


def alike(run: Run, positions: Sequence[int] | NDArray[np.integer[Any]]) -> list[list[int]]:
    """Positions in groups that can be encoded together: clips of one length; images are one group."""
    groups: dict[int, list[int]] = {}
    for position in map(int, positions):
        frames = run.frame_index(position).size if run.media == "clip" else 0
        groups.setdefault(frames, []).append(position)
    return list(groups.values())


def check_frames(run: Run, source: AttentionSource, batch: Batch, position: int) -> None:
    """Raise UsageError where the model now groups the frames of a clip otherwise than when it was captured."""
    if run.media != "clip":
        return
    now, then = frames_of(source, batch), tuple(int(cell) for cell in run.frame_cells(position))
    if now != then:
        raise UsageError(
            f"{run.path}: clip {run.samples['id'].values[position]!r} was captured in {len(then)} frames of "
            f"{max(then) + 1} frame cells, but the model now reads {len(now)} of {max(now, default=-1) + 1}",
            remedy="open the model with the options of the run, or capture again",
        )


def check_for_clips(run: Run, scoring: Scoring) -> None:
    """Raise UsageError where images are to vanish in tubes, or to freeze."""
    if run.media == "clip":
        return
    if scoring.unit.kind != "cells" or FREEZE in scoring.protocol.baselines:
        raise UsageError(
            f"{run.path}: units other than cells and the baseline {FREEZE!r} are for clips, these are images",
            remedy="--unit cells --baseline mean",
        )


def product_name(name: str, unit: Unit) -> str:
    """``faithfulness/curves`` of one unit: cells as they are, others in a group of their own."""
    top, _, rest = name.partition("/")
    return name if unit.kind == "cells" else f"{top}/{unit.kind}/{rest}"
