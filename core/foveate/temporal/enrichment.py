"""Does a map lie on what moves?

What moves is either known (a mask of the moving object) or estimated by optical flow. Moving things are often in
the middle, and so are maps: every number stands beside that of the same map at other places (circular shifts of
the whole map, which keep its shape). A map of the centre is held against the same region by the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import MissingDependencyError, UsageError
from foveate.stats.ranks import midranks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SHIFTS = 100


@dataclass(frozen=True)
class Enrichment:
    """One map on one moving region.

    ``lift`` is mass in the region over the region's share of the area; ``auc`` the chance that a moving cell has
    more than one at rest; ``nss`` the mean z-score on moving cells (Peters et al. 2005). ``shifted_*`` are means
    over the same map shifted elsewhere, ``p`` the share of shifts with at least this AUC.
    """

    lift: float
    auc: float
    nss: float
    shifted_lift: float
    shifted_auc: float
    shifted_nss: float
    p: float


_NAN = float("nan")
UNKNOWN = Enrichment(_NAN, _NAN, _NAN, _NAN, _NAN, _NAN, _NAN)


def enrichment(values: ArrayLike, moving: ArrayLike, *, shifts: int = SHIFTS, seed: int = 0) -> Enrichment:
    """``values (y, x)`` held against the bool region ``moving (y, x)``.

    NaN cells count on neither side. All NaN where the region is empty or everything, or the map is not there:
    there is nothing to tell apart. Raises UsageError where shapes differ.
    """
    table, region = np.asarray(values, np.float64), np.asarray(moving, bool)
    if table.shape != region.shape or table.ndim != 2:
        raise UsageError(f"enrichment: map {table.shape} and region {region.shape} must be equal grids (y, x)")
    own = _numbers(table, region)
    if not np.isfinite(own).all():
        return UNKNOWN
    rng = np.random.default_rng(seed)
    places = rng.permutation(np.arange(1, table.size))[: min(shifts, table.size - 1)]
    moved = np.array(
        [_numbers(np.roll(table, np.unravel_index(int(p), table.shape), (0, 1)), region) for p in places]
    )
    with np.errstate(invalid="ignore"):
        elsewhere = np.nanmean(moved, axis=0) if moved.size else np.full(3, np.nan)
    known = moved[np.isfinite(moved[:, 1]), 1] if moved.size else np.empty(0)
    p = float((1 + (known >= own[1] - 1e-12).sum()) / (1 + known.size))
    lift, auc, nss, shifted_lift, shifted_auc, shifted_nss = map(float, (*own, *elsewhere))
    return Enrichment(lift, auc, nss, shifted_lift, shifted_auc, shifted_nss, p)


def flow_speed(frames: ArrayLike) -> NDArray[np.float32]:
    """Speed of optical flow between consecutive frames in pixels a frame, ``(frame - 1, y, x)``.

    ``frames`` uint8 ``(frame, y, x, 3)``. Iterative Lucas-Kanade of scikit-image (Le Besnerais and Champagnat,
    ICIP 2005) on luminance. Raises UsageError for fewer than two frames, MissingDependencyError without it.
    """
    return np.asarray(np.hypot(*np.moveaxis(flow(frames), 1, 0)), dtype=np.float32)


def flow(frames: ArrayLike) -> NDArray[np.float32]:
    """Optical flow ``(frame - 1, 2, y, x)``: what is at ``p`` in frame t is at ``p + flow`` (y, x) in the next."""
    try:
        from skimage.registration import optical_flow_ilk
    except ImportError as error:
        raise MissingDependencyError(
            "optical flow is computed with scikit-image, which is not installed",
            remedy='pip install "foveate[video]"',
        ) from error
    pixels = np.asarray(frames)
    if pixels.ndim != 4 or pixels.shape[-1] != 3 or len(pixels) < 2:
        raise UsageError(f"flow: expected at least two RGB frames (frame, y, x, 3), got {pixels.shape}")
    grey = (pixels.astype(np.float32) / 255.0) @ np.array([0.2126, 0.7152, 0.0722], np.float32)
    steps = [optical_flow_ilk(grey[t], grey[t + 1], radius=5) for t in range(len(grey) - 1)]
    return np.asarray(np.stack(steps), dtype=np.float32)


def moving_region(speed: ArrayLike, *, least: float = 0.5, quantile: float = 0.9) -> NDArray[np.bool_]:
    """What moves, of ``speed (..., y, x)``: faster than ``least`` pixels a frame and than the ``quantile`` of its
    frame. Where nothing is that fast, nothing moves."""
    values = np.asarray(speed, np.float64)
    level = np.quantile(values, quantile, axis=(-2, -1), keepdims=True)
    return np.asarray((values >= level) & (values > least))


def _numbers(table: NDArray[np.float64], region: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(lift, AUC, NSS); NaN where undefined."""
    known = np.isfinite(table)
    inside, outside = table[known & region], table[known & ~region]
    if not inside.size or not outside.size:
        return np.full(3, np.nan)
    every = np.concatenate([inside, outside])
    ranks = midranks(every)[: inside.size]
    auc = (ranks.sum() - inside.size * (inside.size + 1) / 2) / (inside.size * outside.size)
    total, spread = np.maximum(every, 0).sum(), every.std()
    lift = np.maximum(inside, 0).sum() / total / (inside.size / every.size) if total > 0 else np.nan
    nss = (inside.mean() - every.mean()) / spread if spread > 1e-12 * max(1.0, np.abs(every).max()) else 0.0
    return np.array([lift, auc, nss])
