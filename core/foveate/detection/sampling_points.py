"""What the sampling points of deformable attention do: mass in the image, mass by level, offsets, the exact row.

Zhu et al. 2021 (Deformable DETR, ICLR, arXiv:2010.04159, eq. 3): a head reads values at points p_q + dp with
weights that sum to 1 over all points of all levels. The value at a point is bilinear in the four cells around it;
outside the feature map it is 0. So every number here is a sum over points, and the dense row is their splat.

Arrays are as a run stores them: ``location`` (..., layer, head, query, point, 2), (y, x) in pixels of the model's
input; ``weight`` and ``level`` (..., layer, head, query, point); ``reference`` (..., layer, query, 4): y, x,
height, width in the same pixels, height and width 0 where the reference is a point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import TokenAxis


@dataclass(frozen=True)
class LevelCells:
    """One feature map among the keys: ``rows x columns`` cells of ``height x width`` pixels."""

    level: int
    start: int
    rows: int
    columns: int
    y: float
    x: float
    height: float
    width: float


class Offsets(NamedTuple):
    """Points of each row around its reference, each weighted by its attention; shape (..., layer, head, query).

    ``length``: mean distance from the reference. ``spread``: root mean square distance from the points' own mean.
    ``one_sided``: length of the mean offset over the mean length; 0 where points lie all around, 1 where all lie
    in one direction. ``direction``: of the mean offset, radians from the x axis towards the bottom of the picture.
    NaN where the unit is not defined, and direction and one_sided where no point leaves the reference.
    """

    length: NDArray[np.float64]
    spread: NDArray[np.float64]
    one_sided: NDArray[np.float64]
    direction: NDArray[np.float64]


def level_cells(key: TokenAxis) -> tuple[LevelCells, ...]:
    """The feature maps along a key axis, in its order; level ``i`` of a stored point is entry ``i``.

    Keys without a place (padding behind the last map) belong to none. Raises UsageError where cells of a level are
    not a full grid.
    """
    there = np.flatnonzero(np.isfinite(key.y))
    if not there.size:
        raise UsageError("sampling points: no key has a place in the picture")
    cuts = np.flatnonzero(np.diff(key.level[there])) + 1
    return tuple(_level(key, part) for part in np.split(there, cuts))


def _level(key: TokenAxis, part: NDArray[np.intp]) -> LevelCells:
    first = int(part[0])
    columns = int((key.y[part] == key.y[first]).sum())
    rows = len(part) // columns
    if rows * columns != len(part) or (np.diff(part) != 1).any():
        raise UsageError(f"sampling points: the {len(part)} keys of level {key.level[first]} are not a full grid")
    height, width = float(key.height[first]), float(key.width[first])
    y, x = float(key.y[first]) - height / 2, float(key.x[first]) - width / 2
    return LevelCells(int(key.level[first]), first, rows, columns, y, x, height, width)


def splat(location: ArrayLike, weight: ArrayLike, level: ArrayLike, key: TokenAxis) -> NDArray[np.float64]:
    """The dense rows (..., key) that points make: each weight shared bilinearly among the cells around its point.

    What falls outside a feature map is lost: rows sum to the mass in the image (:func:`image_mass`).
    """
    share = np.asarray(weight, np.float64)
    flat_share = share.reshape(-1, share.shape[-1])
    places, of = _placed(location, level, key)
    row_number = np.broadcast_to(np.arange(len(flat_share))[:, None], flat_share.shape)
    dense = np.zeros((len(flat_share), len(key)))
    for number, cells in enumerate(level_cells(key)):
        here = of.reshape(flat_share.shape) == number
        y, x = (places[..., axis].reshape(flat_share.shape)[here] for axis in (0, 1))
        for row, down in _corners(y):
            for column, across in _corners(x):
                inside = (row >= 0) & (row < cells.rows) & (column >= 0) & (column < cells.columns)
                at = cells.start + row[inside] * cells.columns + column[inside]
                mass = (flat_share[here] * down * across)[inside]
                np.add.at(dense, (row_number[here][inside], at), mass)
    return dense.reshape(*share.shape[:-1], len(key))


def image_mass(location: ArrayLike, weight: ArrayLike, level: ArrayLike, key: TokenAxis) -> NDArray[np.float64]:
    """What of each row (...) falls on cells of the feature maps, from 0 to 1: the sum of the splatted row."""
    share = np.asarray(weight, np.float64)
    places, of = _placed(location, level, key)
    kept = np.zeros_like(share)
    for number, cells in enumerate(level_cells(key)):
        inside = _held(places[..., 0], cells.rows) * _held(places[..., 1], cells.columns)
        kept = np.where(of == number, share * inside, kept)
    return np.asarray(np.where(np.isnan(share).any(-1), np.nan, kept.sum(-1)))


def levels_mass(weight: ArrayLike, level: ArrayLike, count: int) -> NDArray[np.float64]:
    """Weight of the points on each of ``count`` levels (..., level); sums to 1, points outside included."""
    share, of = np.asarray(weight, np.float64), np.asarray(level)
    return np.stack([np.where(of == number, share, 0.0).sum(-1) for number in range(count)], -1)


def offsets_in_cells(
    location: ArrayLike, weight: ArrayLike, level: ArrayLike, reference: ArrayLike, key: TokenAxis
) -> Offsets:
    """Offsets counted in cells of each point's own level: what the network's offset layer puts out for points."""
    sizes = np.array([(cells.height, cells.width) for cells in level_cells(key)])
    of = np.clip(np.asarray(level, np.int64), 0, len(sizes) - 1)
    return _offsets(_from_reference(location, reference) / sizes[of], weight)


def offsets_in_boxes(location: ArrayLike, weight: ArrayLike, reference: ArrayLike) -> Offsets:
    """Offsets in units of the reference box: 1/2 along an axis is its edge. NaN where the reference is a point."""
    extent = np.asarray(reference, np.float64)[..., None, :, None, 2:]
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = _from_reference(location, reference) / np.where(extent > 0, extent, np.nan)
    return _offsets(scaled, weight)


def _from_reference(location: ArrayLike, reference: ArrayLike) -> NDArray[np.float64]:
    centre = np.asarray(reference, np.float64)[..., None, :, None, :2]
    return np.asarray(np.asarray(location, np.float64) - centre)


def _offsets(offset: NDArray[np.float64], weight: ArrayLike) -> Offsets:
    """``offset`` (..., point, 2) as (y, x); weights are scaled to sum to 1."""
    share = np.asarray(weight, np.float64)
    total = share.sum(-1, keepdims=True)
    share = share / np.where(total > 0, total, np.nan)
    length = (share * np.hypot(offset[..., 0], offset[..., 1])).sum(-1)
    mean = (share[..., None] * offset).sum(-2)
    around = ((offset - mean[..., None, :]) ** 2).sum(-1)
    size = np.hypot(mean[..., 0], mean[..., 1])
    moved = length > 0
    one_sided = np.where(moved, size / np.where(moved, length, 1.0), np.nan)
    direction = np.where(moved & (size > 0), np.arctan2(mean[..., 0], mean[..., 1]), np.nan)
    return Offsets(length, np.sqrt((share * around).sum(-1)), one_sided, direction)


def _placed(
    location: ArrayLike, level: ArrayLike, key: TokenAxis
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Points in cells of their own level, 0 at the centre of the first cell; and their levels, -1 for no place."""
    levels = level_cells(key)
    origin = np.array([(cells.y, cells.x) for cells in levels])
    size = np.array([(cells.height, cells.width) for cells in levels])
    of, pixels = np.asarray(level, np.int64), np.asarray(location, np.float64)
    of = np.where((of < len(levels)) & np.isfinite(pixels).all(-1), of, -1)
    return (pixels - origin[of]) / size[of] - 0.5, of


def _corners(place: NDArray[np.float64]) -> Sequence[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """The two cells around each place along one axis, and their shares."""
    low = np.floor(place)
    return ((low.astype(np.int64), 1 - (place - low)), (low.astype(np.int64) + 1, place - low))


def _held(place: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """What of a point's weight falls on the ``count`` cells of an axis: a tent of width 1 around each of them."""
    return np.asarray(np.clip(np.minimum(place + 1, count - place), 0.0, 1.0))
