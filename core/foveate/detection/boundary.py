"""Do object queries look at borders: mass in a band around a box or mask, over what any band there would get.

Meng et al. 2021 (Conditional DETR, ICCV, figure 1) show heads that look at the extremities of an object. A band
lies near the object, where attention is dense anyway, and larger objects have larger bands; so the mass in a band
is divided by the band's share of the area (enrichment), and compared with bands of the same shape elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.detection.mass import box_shares, mask_shares
from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.geometry import CellGrid

SHIFTS = 100


def box_band(grid: CellGrid, box: ArrayLike, width: float) -> NDArray[np.float64]:
    """Share of each cell, ``(row, column)``, within ``width / 2`` of the border of a box, on either side.

    ``box`` is (top, left, bottom, right) in the coordinates of ``grid``. A box thinner than the band has no
    inside left. Raises UsageError unless ``width`` is positive.
    """
    if not width > 0:
        raise UsageError(f"box_band: width must be positive, got {width}")
    half = width / 2
    outwards = np.array([-half, -half, half, half])
    edges = np.asarray(box, np.float64)
    outer, inner = box_shares(grid, np.stack([edges + outwards, edges - outwards]))
    return np.asarray(outer - inner)


def mask_band(grid: CellGrid, mask: NDArray[np.bool_], width: float) -> NDArray[np.float64]:
    """Share of each cell, ``(row, column)``, within ``width / 2`` pixels of the border of a mask ``(y, x)``.

    Distances are Euclidean between pixel centres, half a pixel off the border; the picture's own edge is none.
    """
    from scipy.ndimage import distance_transform_edt

    if not width > 0:
        raise UsageError(f"mask_band: width must be positive, got {width}")
    if not mask.any() or mask.all():
        return np.zeros(grid.shape)
    away = np.where(mask, distance_transform_edt(mask), distance_transform_edt(~mask)) - 0.5
    return np.asarray(mask_shares(grid, (away <= width / 2)[None])[0])


def enrichment(attention: ArrayLike, band: ArrayLike, areas: ArrayLike) -> float:
    """Share of a map's mass in a band over the band's share of the area; 1 = no preference.

    ``attention``, ``band`` (shares of cells) and ``areas`` are ``(row, column)``. NaN cells were not seen and
    count in neither share. NaN for a map without mass or a band outside all that was seen.
    """
    mass = np.asarray(attention, np.float64)
    seen = np.isfinite(mass)
    mass, inside = np.where(seen, mass, 0.0), np.asarray(band, np.float64)
    size = np.where(seen, np.asarray(areas, np.float64), 0.0)
    expected = float((inside * size).sum() / size.sum()) if size.any() else 0.0
    total = float(mass.sum())
    return float((inside * mass).sum() / total / expected) if total > 0 and expected > 0 else float("nan")


def shifted_boxes(
    box: ArrayLike, size: tuple[float, float], *, count: int = SHIFTS, seed: int = 0
) -> NDArray[np.float64]:
    """The same box at ``count`` places drawn evenly from all where it lies within ``size`` (height, width).

    ``(place, 4)``; a box larger than the image stays where it is along that axis.
    """
    top, left, bottom, right = (float(v) for v in np.asarray(box, np.float64))
    rng = np.random.default_rng(seed)
    draws = rng.random((count, 2))
    extent = np.array([bottom - top, right - left])
    room = np.array(size) - extent
    start = np.where(room > 0, draws * np.maximum(room, 0.0), [top, left])
    return np.concatenate([start, start + extent], 1)


def box_enrichment(
    attention: ArrayLike,
    grid: CellGrid,
    box: ArrayLike,
    *,
    width: float,
    size: tuple[float, float],
    shifts: int = SHIFTS,
    seed: int = 0,
) -> tuple[float, float]:
    """Enrichment of the band around an object's own box, and its mean over the same box at other places."""
    own = enrichment(attention, box_band(grid, box, width), grid.areas)
    elsewhere = [
        enrichment(attention, box_band(grid, other, width), grid.areas)
        for other in shifted_boxes(box, size, count=shifts, seed=seed)
    ]
    known = [value for value in elsewhere if np.isfinite(value)]
    return own, float(np.mean(known)) if known else float("nan")
