"""Attention between frames: how much of the mass of one frame's queries lies on the keys of another.

``F[t, u] = mean over queries i of frame t of sum over keys j of frame u of A[i, j]`` is a property of the rows and
of how many keys each frame has: uniform attention already puts ``(T - 1) / T`` of its mass on other frames. So
every number here stands beside what uniform rows would give. Mass between frames does not show that motion is
used: in tiny space-time models it was .75 to .78 for tasks of colour, of direction and of both (docs/video.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import UsageError
from foveate.stats.known import mean_known

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class FrameMass:
    """Mass between frames, all float64.

    ``mass`` is ``(..., frame, frame)``: query frame, then key frame; a query frame without any query is NaN.
    ``uniform`` is ``(frame,)``: what a uniform row puts on each key frame. ``elsewhere`` is ``(..., frame)``: what
    lies on keys without a frame (CLS, registers, text).
    """

    mass: NDArray[np.float64]
    uniform: NDArray[np.float64]
    elsewhere: NDArray[np.float64]

    @property
    def frames(self) -> int:
        """Number of frames."""
        return int(self.uniform.size)

    @property
    def lift(self) -> NDArray[np.float64]:
        """``mass`` over ``uniform``, ``(..., frame, frame)``; 1 is what uniform rows give, NaN where no key is."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.uniform > 0, self.mass / self.uniform, np.nan)

    @property
    def cross(self) -> NDArray[np.float64]:
        """Share of the mass on frames that lies on other frames, mean over query frames, ``(...)``."""
        within = np.diagonal(self.mass, axis1=-2, axis2=-1)
        total = self.mass.sum(axis=-1)
        return np.asarray(mean_known((total - within) / np.where(total > 0, total, np.nan), -1))

    @property
    def uniform_cross(self) -> float:
        """:attr:`cross` of uniform rows."""
        uniform = FrameMass(np.broadcast_to(self.uniform, (self.frames,) * 2), self.uniform, 1 - self.uniform)
        return float(uniform.cross)


def frame_mass(attention: ArrayLike, query_frame: ArrayLike, key_frame: ArrayLike, frames: int) -> FrameMass:
    """Mass between ``frames`` frames of ``attention (..., query, key)``.

    ``query_frame`` ``(query,)`` and ``key_frame`` ``(key,)`` are frame numbers, negative for tokens of no frame.
    Keys that are NaN (not captured, removed as sinks) do not count. Raises UsageError where sizes do not fit, a
    frame number is too large, or no query or no key has a frame.
    """
    rows = np.asarray(attention, dtype=np.float64)
    queries, keys = np.asarray(query_frame, np.int64), np.asarray(key_frame, np.int64)
    _check(rows, queries, keys, frames)
    to_key = _indicator(keys, frames)
    to_query = _indicator(queries, frames)
    counts = to_query.sum(axis=0)
    filled = np.nan_to_num(rows, nan=0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        averaged = np.where(counts > 0, to_query / counts, np.nan).T  # (frame, query), NaN for an empty frame
    mass = averaged @ (filled @ to_key)
    elsewhere = (averaged @ filled[..., keys < 0]).sum(axis=-1)
    return FrameMass(np.asarray(mass), to_key.sum(axis=0) / keys.size, np.asarray(elsewhere))


def lag_profile(mass: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Mean mass at each lag ``u - t``: lags from ``-(T - 1)`` (the past) to ``T - 1``, and ``(..., lag)``.

    The mean is over the query frames that have a key frame at this lag; NaN frames do not count. Far lags rest on
    few pairs of frames: ``T - |lag|`` of them.
    """
    table = np.asarray(mass, dtype=np.float64)
    frames = table.shape[-1]
    if table.ndim < 2 or table.shape[-2] != frames:
        raise UsageError(f"lag_profile: expected (..., frame, frame), got {table.shape}")
    lags = np.arange(-(frames - 1), frames)
    parts = [mean_known(np.diagonal(table, offset=int(lag), axis1=-2, axis2=-1), -1) for lag in lags]
    return lags, np.stack(parts, axis=-1)


def horizon(mass: ArrayLike) -> NDArray[np.float64]:
    """Effective horizon in frames ``(...)``: mean over query frames t of ``sum |u - t| F[t, u] / sum F[t, u]``.

    0 where every frame reads itself alone. NaN frames do not count.
    """
    table = np.asarray(mass, dtype=np.float64)
    place = np.arange(table.shape[-1])
    distance = np.abs(place[:, None] - place[None, :])
    total = table.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(mean_known((table * distance).sum(axis=-1) / np.where(total > 0, total, np.nan), -1))


def past_share(mass: ArrayLike) -> NDArray[np.float64]:
    """Share of the mass on other frames that lies on earlier ones, ``(...)``; .5 is even, NaN without any."""
    table = np.nan_to_num(np.asarray(mass, dtype=np.float64), nan=0.0)
    past = np.tril(table, -1).sum(axis=(-2, -1))
    both = past + np.triu(table, 1).sum(axis=(-2, -1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(both > 0, past / both, np.nan))


def _check(rows: NDArray[Any], queries: NDArray[Any], keys: NDArray[Any], frames: int) -> None:
    if rows.ndim < 2 or rows.shape[-2:] != (queries.size, keys.size):
        raise UsageError(
            f"frame_mass: attention {rows.shape} does not end in {queries.size} queries and {keys.size} keys"
        )
    if frames < 1 or max(queries.max(initial=-1), keys.max(initial=-1)) >= frames:
        raise UsageError(f"frame_mass: frame numbers up to {max(queries.max(), keys.max())}, but {frames} frames")
    if (queries < 0).all() or (keys < 0).all():
        side = "query" if (queries < 0).all() else "key"
        raise UsageError(
            f"frame_mass: no {side} belongs to a frame",
            remedy="mass between frames is defined for space-time and temporal attention only",
        )


def _indicator(frame: NDArray[np.int64], frames: int) -> NDArray[np.float64]:
    """(token, frame), 1 where the token is of the frame."""
    return np.asarray(frame[:, None] == np.arange(frames)[None, :], dtype=np.float64)
