"""Who becomes whom: how a tracker's rows carry identities from frame to frame.

A tracker row of frame t attends to the segmenter's queries of that frame. If the row's mask then is the mask of
the query it attended to most, attention transported the identity; where the two differ it did not, whatever the
weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Transport:
    """One frame of a tracker; all float64 over ``(track,)``, NaN for tracks that are not there.

    ``own`` is the attention of a track's row on the query whose mask overlaps the track's mask most; ``chance``
    what a uniform row gives (one over the queries); ``overlap`` the IoU of the two masks; ``agrees`` 1 where that
    query also gets the row's largest weight.
    """

    own: NDArray[np.float64]
    chance: float
    overlap: NDArray[np.float64]
    agrees: NDArray[np.float64]


def transport(attention: ArrayLike, track_masks: ArrayLike, query_masks: ArrayLike) -> Transport:
    """``attention (track, query)`` of one frame against bool masks ``(track, y, x)`` and ``(query, y, x)``.

    A track whose mask is empty, or overlaps no query's, has no own query: NaN. Raises UsageError where sizes
    differ.
    """
    rows = np.asarray(attention, np.float64)
    overlap = mask_overlap(track_masks, query_masks)
    if rows.shape != overlap.shape:
        raise UsageError(
            f"transport: attention {rows.shape} for {overlap.shape[0]} tracks and {overlap.shape[1]} queries"
        )
    tracks, queries = rows.shape
    if not queries or not tracks:
        return Transport(np.full(tracks, np.nan), np.nan, np.full(tracks, np.nan), np.full(tracks, np.nan))
    best = overlap.argmax(axis=1)
    most = overlap[np.arange(tracks), best]
    there = (most > 0) & np.isfinite(rows).all(axis=1) & (rows.sum(axis=1) > 0)
    own = np.where(there, rows[np.arange(tracks), best], np.nan)
    top = np.isclose(own, rows.max(axis=1, initial=-np.inf), rtol=1e-6)
    return Transport(own, 1 / queries, np.where(there, most, np.nan), np.where(there, top, np.nan))


def mask_overlap(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Intersection over union of every pair of bool masks ``(n, ...)`` and ``(m, ...)``: ``(n, m)``; 0 for two
    empty ones."""
    one, two = np.asarray(a, bool), np.asarray(b, bool)
    if one.shape[1:] != two.shape[1:]:
        raise UsageError(f"mask_overlap: masks of {one.shape[1:]} and of {two.shape[1:]} pixels")
    flat_one, flat_two = (m.reshape(len(m), int(np.prod(m.shape[1:]))).astype(np.float64) for m in (one, two))
    shared = flat_one @ flat_two.T
    union = flat_one.sum(1)[:, None] + flat_two.sum(1)[None] - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0))


def switches(assigned: ArrayLike) -> NDArray[np.int64]:
    """How often each true object changes the track that covers it: ``assigned (object, frame)`` to ``(object,)``.

    Entries are track numbers, -1 where no track covers the object. A gap is no switch, another track after it is
    one (CLEAR MOT; Bernardin and Stiefelhagen 2008).
    """
    table = np.asarray(assigned, np.int64)
    if table.ndim != 2:
        raise UsageError(f"switches: expected (object, frame), got {table.shape}")
    covered = [row[row >= 0] for row in table]
    return np.array([int((row[1:] != row[:-1]).sum()) for row in covered], np.int64)
