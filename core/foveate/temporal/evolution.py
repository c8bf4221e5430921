"""How a number changes over the frames of a clip, in the clip's time or in a track's own, and where it jumps.

Change points by binary segmentation (Scott and Knott, Biometrics 30, 1974; Vostrikova 1981): the split of a
segment that lowers the sum of squared deviations from the segment means most is taken if a seeded permutation of
the segment's values seldom lowers it as much. Permutation assumes values that are exchangeable within a segment: a
slow trend is no jump, but it is not exchangeable either, and will be cut into steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PERMUTATIONS = 999
LEVEL = 0.05
SHORTEST = 2
"""Frames that a segment has at least: a single odd frame is an outlier, not a change."""


@dataclass(frozen=True)
class Change:
    """A jump before frame ``frame``: means of the segments on either side, and the permutation p-value."""

    frame: int
    before: float
    after: float
    p: float


def change_points(
    values: ArrayLike, *, level: float = LEVEL, permutations: int = PERMUTATIONS, seed: int = 0
) -> tuple[Change, ...]:
    """Jumps of ``values (frame,)``, in order of frames; NaN frames do not count.

    Each split is tested at ``level`` within the segment that it splits; splitting stops at the first that is not
    significant. With fewer than 4 known frames there is nothing to test: no change. The level is for each test,
    not for the whole sequence.
    """
    series = np.asarray(values, dtype=np.float64)
    if series.ndim != 1:
        raise UsageError(f"change_points: expected one value a frame, got shape {series.shape}")
    known = np.flatnonzero(np.isfinite(series))
    kept, rng = series[known], np.random.default_rng(seed)
    found: list[tuple[int, float]] = []
    _split(kept, 0, kept.size, level, permutations, rng, found)
    cuts = sorted(found)
    edges = [0, *(cut for cut, _ in cuts), kept.size]
    means = [float(kept[a:b].mean()) for a, b in pairwise(edges) if b > a]
    return tuple(Change(int(known[cut]), means[i], means[i + 1], p) for i, (cut, p) in enumerate(cuts))


def aligned(values: ArrayLike, start: ArrayLike, length: int, *, before: int = 0) -> NDArray[np.float64]:
    """Series on the time of their tracks: ``values (track, frame)`` to ``(track, before + length)``.

    Column ``before`` is the frame ``start[track]`` in which the track was born; frames outside the clip are NaN.
    """
    table, births = np.asarray(values, np.float64), np.asarray(start, np.int64)
    if table.ndim != 2 or births.shape != table.shape[:1]:
        raise UsageError(
            f"aligned: expected (track, frame) and one start a track, got {table.shape}, {births.shape}"
        )
    moved = np.full((len(table), before + length), np.nan)
    for row, birth in enumerate(births):
        first, last = max(0, birth - before), min(table.shape[1], birth + length)
        if last > first:
            moved[row, first - birth + before : last - birth + before] = table[row, first:last]
    return moved


def flicker(maps: ArrayLike, pictures: ArrayLike | None = None) -> NDArray[np.float64]:
    """How much a map changes between consecutive frames, ``(..., frame - 1)``.

    ``maps (..., frame, cell)`` are masses; the value is total variation, half the absolute difference of the
    normalised maps, in [0, 1]. With ``pictures (..., frame, cell)`` (mean pixel values in [0, 255] on the same
    cells) it is divided by the mean absolute change of the picture as a share of 255: flicker for each unit of
    change that was there to see; infinite where the picture did not change and the map did, 0 where neither did.
    """
    share = _normalised(np.asarray(maps, np.float64))
    change = np.abs(np.diff(share, axis=-2))
    own = np.where(np.isfinite(change).any(-1), np.nansum(change, axis=-1) / 2.0, np.nan)
    if pictures is None:
        return np.asarray(own)
    shown = np.asarray(pictures, np.float64)
    if shown.shape[-2:] != share.shape[-2:]:
        raise UsageError(f"flicker: maps {share.shape} and pictures {shown.shape} differ in frames or cells")
    seen = np.abs(np.diff(shown, axis=-2)).mean(axis=-1) / 255.0
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where((own == 0) & (seen == 0), 0.0, own / seen)


def _normalised(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    if maps.ndim < 2 or maps.shape[-2] < 2:
        raise UsageError(f"flicker: expected maps (..., frame, cell) of at least two frames, got {maps.shape}")
    if (maps < 0).any():
        raise UsageError("flicker: maps have negative values", remedy="take the positive part, or absolute values")
    total = np.nansum(maps, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(total > 0, maps / total, np.nan))


def _split(
    series: NDArray[np.float64],
    first: int,
    stop: int,
    level: float,
    permutations: int,
    rng: np.random.Generator,
    found: list[tuple[int, float]],
) -> None:
    """Split ``series[first:stop]`` where it pays, then both sides."""
    segment = series[first:stop]
    if segment.size < 2 * SHORTEST or np.ptp(segment) == 0:
        return
    gain, at = _best(segment[None])
    draws = rng.permuted(np.tile(segment, (permutations, 1)), axis=1)
    p = float((1 + (_best(draws)[0] >= gain[0] * (1 - 1e-12)).sum()) / (permutations + 1))
    if p > level:
        return
    cut = first + int(at[0])
    found.append((cut, p))
    _split(series, first, cut, level, permutations, rng, found)
    _split(series, cut, stop, level, permutations, rng, found)


def _best(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For each row ``(draw, frame)`` the largest fall of the squared error by one split, and where."""
    n = rows.shape[1]
    cuts = np.arange(SHORTEST, n - SHORTEST + 1)
    left = np.cumsum(rows, axis=1)[:, cuts - 1]
    total = rows.sum(axis=1, keepdims=True)
    gain = left**2 / cuts + (total - left) ** 2 / (n - cuts) - total**2 / n
    best = gain.argmax(axis=1)
    return gain[np.arange(len(rows)), best], cuts[best]
