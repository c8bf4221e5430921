"""Does a map stay where it was from frame to frame, more than maps of other videos would?

Consecutive maps resemble each other for reasons that say nothing of the video: a sink token in every frame (two
independent maps that share one of mass .3 have Pearson's r = .97), and every positional habit of the model. So
sinks are removed first (:mod:`foveate.metrics.artefacts`), rank and transport measures stand in place of Pearson's
r, and what counts is the excess over the same pair of frames taken from *different* videos. A map that follows a
moving object is punished by every fixed-place measure: :func:`displaced` moves it back along the motion first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.agreement import JS_DIVERGENCE, SPEARMAN, Measure, agreement
from foveate.stats.known import mean_known

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

COARSE = 8
"""Cells a side on which transport is computed: it solves a linear programme of their number squared."""


@dataclass(frozen=True, eq=False)
class Consistency:
    """One measure over videos: ``own`` and ``null`` are ``(video,)``, means over pairs of consecutive frames.

    ``pairs`` ``(video, frame - 1)`` are the single values of ``own``. ``null`` compares frame t of a video with
    frame t + 1 of others; NaN with one video. ``excess`` is positive where maps stay closer than that.
    """

    measure: str
    pairs: NDArray[np.float64]
    own: NDArray[np.float64]
    null: NDArray[np.float64]
    lower_is_closer: bool

    @property
    def excess(self) -> NDArray[np.float64]:
        """How much closer than across videos, ``(video,)``."""
        difference = self.own - self.null
        return -difference if self.lower_is_closer else difference


def consistency(
    maps: ArrayLike, measure: Measure, *, videos: Sequence[object] | None = None, seed: int = 0
) -> Consistency:
    """Consecutive frames of ``maps (video, frame, cell)`` compared by ``measure``.

    ``videos`` names the recording of each row where some are windows of one: the null takes others only.

    Cells that are NaN (removed sinks, what a crop hides) do not count; a frame that is NaN throughout (the track
    is not there) leaves its pairs out. Raises UsageError where there are fewer than two frames.
    """
    values = np.asarray(maps, dtype=np.float64)
    if values.ndim != 3 or values.shape[1] < 2:
        raise UsageError(
            f"consistency: expected maps (video, frame, cell) of at least two frames, got {values.shape}",
            remedy="one frame has no next: give clips of two frames or more",
        )
    return compared(values[:, :-1], values[:, 1:], measure, videos=videos, seed=seed)


def compared(
    first: ArrayLike, second: ArrayLike, measure: Measure, *, videos: Sequence[object] | None = None, seed: int = 0
) -> Consistency:
    """Maps ``(video, step, cell)`` against what is held to be the same map one step later.

    As :func:`consistency`, where the later map was brought back in place (:func:`warped`).
    """
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.ndim != 3 or one.shape != two.shape:
        raise UsageError(f"compared: expected two arrays (video, step, cell), got {one.shape} and {two.shape}")
    steps = [agreement(one[:, t], two[:, t], measure, groups=videos, seed=seed + t) for t in range(one.shape[1])]
    own = np.stack([step.own for step in steps], axis=1)
    null = np.stack([step.null for step in steps], axis=1)
    return Consistency(measure.name, own, mean_known(own, -1), mean_known(null, -1), measure.lower_is_closer)


def transport(shape: tuple[int, int]) -> Measure:
    """Earth mover's distance of maps on ``shape`` cells, in shares of the grid's diagonal.

    Rubner, Tomasi and Guibas, IJCV 40, 2000: least work to turn one distribution into the other, with Euclidean
    distance between cell centres. Grids finer than :data:`COARSE` cells a side are pooled first.
    """
    return Measure("emd", _transport_on(shape), lower_is_closer=True)


def pearson(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Pearson's r over the cells that both know. Shown only to be compared: a shared sink alone gives .97."""
    one, two = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
    known = np.isfinite(one) & np.isfinite(two)
    count = known.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        left = np.where(known, one - np.where(known, one, 0).sum(-1, keepdims=True) / count, 0.0)
        right = np.where(known, two - np.where(known, two, 0).sum(-1, keepdims=True) / count, 0.0)
        spread = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
        return np.asarray(np.where(spread > 0, (left * right).sum(-1) / spread, np.nan))


def measures(shape: tuple[int, int]) -> tuple[Measure, ...]:
    """The measures that are reported, Pearson's r last and as a warning."""
    return JS_DIVERGENCE, SPEARMAN, transport(shape), Measure("pearson", pearson)


def displaced(maps: ArrayLike, shift: ArrayLike, scale: ArrayLike | None = None) -> NDArray[np.float64]:
    """Maps moved along a motion, so that what follows an object stays in place.

    ``maps`` ``(..., frame, y, x)``; ``shift`` ``(..., frame, 2)`` is where the object's centre is in each frame
    (y, x, in cells); ``scale`` ``(..., frame)`` its size. Every frame is sampled so that the object lies where it
    lies, and as large as it is, in the first frame that knows it. Values are interpolated between cells and not
    invented outside the picture (NaN); each frame is then scaled back to the mass that it had. Frames where the
    centre is NaN (the object is not there) are NaN.
    """
    values, centre = np.asarray(maps, np.float64), np.asarray(shift, np.float64)
    size = np.ones(centre.shape[:-1]) if scale is None else np.asarray(scale, np.float64)
    if centre.shape != (*values.shape[:-2], 2) or size.shape != values.shape[:-2]:
        raise UsageError(
            f"displaced: maps {values.shape} need centres {(*values.shape[:-2], 2)} and sizes "
            f"{values.shape[:-2]}, got {centre.shape} and {size.shape}"
        )
    moved = np.full(values.shape, np.nan)
    for place in np.ndindex(values.shape[:-3]):
        known = np.flatnonzero(np.isfinite(centre[place]).all(-1) & (size[place] > 0))
        for t in known:
            home, grow = centre[place][known[0]], size[place][t] / size[place][known[0]]
            moved[place][t] = _sampled(values[place][t], centre[place][t], home, grow)
    return moved


def warped(maps: ArrayLike, flow: ArrayLike) -> NDArray[np.float64]:
    """Later maps brought back along the flow: ``(..., y, x)`` sampled at ``p + flow(p)``.

    ``flow`` ``(..., 2, y, x)`` in cells (y, x): what is at ``p`` now is at ``p + flow`` in the later map. Outside
    the picture there is nothing (NaN); the total is that of the later map.
    """
    values, motion = np.asarray(maps, np.float64), np.asarray(flow, np.float64)
    if motion.shape != (*values.shape[:-2], 2, *values.shape[-2:]):
        raise UsageError(f"warped: maps {values.shape} and flow {motion.shape} do not fit")
    moved = np.empty_like(values)
    grid = np.mgrid[0 : values.shape[-2], 0 : values.shape[-1]].astype(np.float64)
    for place in np.ndindex(values.shape[:-2]):
        moved[place] = _at(values[place], grid + motion[place])
    return moved


def _sampled(
    values: NDArray[np.float64], centre: NDArray[np.float64], home: NDArray[np.float64], grow: float
) -> NDArray[np.float64]:
    y, x = np.mgrid[0 : values.shape[0], 0 : values.shape[1]].astype(np.float64)
    return _at(values, np.stack([centre[0] + (y - home[0]) * grow, centre[1] + (x - home[1]) * grow]))


def _at(values: NDArray[np.float64], places: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values (y, x)`` at ``places (2, y, x)``, interpolated, scaled to the same total; NaN outside."""
    from scipy.ndimage import map_coordinates

    rows, columns = values.shape
    known = np.isfinite(values)
    limit = np.array([rows - 1, columns - 1], np.float64)[:, None, None]
    inside = ((places >= -0.5) & (places <= limit + 0.5)).all(axis=0)
    weight = map_coordinates(known.astype(np.float64), places, order=1, mode="nearest")
    total = map_coordinates(np.where(known, values, 0.0), places, order=1, mode="nearest")
    with np.errstate(invalid="ignore", divide="ignore"):
        moved = np.where(inside & (weight > 1e-9), total / weight, np.nan)
    mass = np.nansum(moved)
    return moved * (np.nansum(values) / mass) if mass > 0 else moved


def _transport_on(shape: tuple[int, int]) -> Callable[[ArrayLike, ArrayLike], NDArray[np.float64]]:
    def score(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
        one, two = np.broadcast_arrays(np.asarray(a, np.float64), np.asarray(b, np.float64))
        if one.shape[-1] != shape[0] * shape[1]:
            raise UsageError(f"emd: maps of {one.shape[-1]} cells are not {shape[0]} x {shape[1]}")
        rows = zip(one.reshape(-1, one.shape[-1]), two.reshape(-1, two.shape[-1]), strict=True)
        found = [_emd(p, q, shape) for p, q in rows]
        return np.asarray(found, np.float64).reshape(one.shape[:-1])

    return score


def _emd(a: NDArray[np.float64], b: NDArray[np.float64], shape: tuple[int, int]) -> float:
    """Distance of two maps over the cells that both know; NaN where either has no mass or a negative one."""
    from scipy.stats import wasserstein_distance_nd

    known = np.isfinite(a) & np.isfinite(b)
    p, centres = _pooled(np.where(known, a, 0.0), shape)
    q, _ = _pooled(np.where(known, b, 0.0), shape)
    if not (p.sum() > 0 and q.sum() > 0 and (p >= 0).all() and (q >= 0).all()):
        return float("nan")
    diagonal = float(np.hypot(*shape))
    used_p, used_q = p > 0, q > 0
    work = wasserstein_distance_nd(centres[used_p], centres[used_q], p[used_p], q[used_q])
    return float(work) / diagonal


def _pooled(
    values: NDArray[np.float64], shape: tuple[int, int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mass on at most COARSE x COARSE cells, ``(cell,)``, and their centres in cells of ``shape``, (cell, 2)."""
    from foveate.geometry import CellGrid, regrid

    rows, columns = shape
    fine = CellGrid.regular(rows, columns, height=rows, width=columns)
    coarse = CellGrid.regular(min(rows, COARSE), min(columns, COARSE), height=rows, width=columns)
    mass = regrid(values.reshape(shape), fine, coarse, reduce="sum")
    y, x = coarse.centres
    return mass.ravel(), np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2)
