"""Two models' maps of one image on common ground: the coarser grid, where both models looked.

Models crop and cut images differently, so cell (3, 4) of one is not cell (3, 4) of the other. Both maps go
to original pixels and from there, by area of overlap, to the cells of the coarser grid (never the finer:
nothing is invented), within the rectangle that both models saw. How much of each map's mass lies outside is
reported, because agreement on what is left may be agreement on little.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.compare.maps import MapSet
from foveate.geometry import CellGrid, Geometry, regrid

if TYPE_CHECKING:
    from numpy.typing import NDArray

MIN_COVER = 0.5
"""A common cell counts when both models saw at least this share of it."""

Window = tuple[float, float, float, float]


class Laid(NamedTuple):
    """One map on common cells: densities (row, column), NaN where not seen, and the share of mass lost."""

    density: NDArray[np.float64]
    lost: float


@dataclass(frozen=True, eq=False)
class Meeting:
    """Both models' maps on common cells, ``a`` and ``b`` float64 ``(image, cell)``, NaN where not both saw.

    ``lost_a`` and ``lost_b`` (image,) are the shares of each map's mass (absolute values) that lie outside;
    ``shared`` (image,) is the part of the image's area that both saw; ``coarser`` is "a" or "b", whose grid
    of ``shape`` the common cells are.
    """

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    lost_a: NDArray[np.float64]
    lost_b: NDArray[np.float64]
    shared: NDArray[np.float64]
    coarser: str
    shape: tuple[int, int]


def meet(a: MapSet, b: MapSet) -> Meeting:
    """Lay two models' maps of the same images (row i with row i) on the coarser grid of the two.

    One grid serves all images, so that maps of different images can be compared as well. An image of which
    the models saw no common part gets NaN everywhere and has lost all its mass.
    """
    coarser = "a" if _cell_area(a) >= _cell_area(b) else "b"
    chosen = a if coarser == "a" else b
    laid = [_meet_one(a, b, chosen, i) for i in range(len(a))]
    cells = chosen.grid.shape[0] * chosen.grid.shape[1]
    return Meeting(
        a=np.array([one.density.ravel() for one, _, _ in laid]).reshape(len(a), cells),
        b=np.array([other.density.ravel() for _, other, _ in laid]).reshape(len(a), cells),
        lost_a=np.array([one.lost for one, _, _ in laid]),
        lost_b=np.array([other.lost for _, other, _ in laid]),
        shared=np.array([share for _, _, share in laid]),
        coarser=coarser,
        shape=chosen.grid.shape,
    )


def lay(values: NDArray[np.float64], grid: CellGrid, geometry: Geometry, cells: CellGrid, window: Window) -> Laid:
    """One map ``(row, column)`` on input cells of ``grid``, laid on ``cells`` (original pixels) in ``window``.

    Values are masses of their cells; the result is a density in the unit of the map's own mean cell.
    """
    source = geometry.grid_to_original(grid)
    seen = _cover(cells, window) >= MIN_COVER
    density = regrid(values, source, cells, reduce="mean", window=window)
    mass = regrid(np.abs(values), source, cells, reduce="sum", window=window)
    total = float(np.nansum(np.abs(values)))
    kept = float(np.nansum(np.where(seen, mass, 0.0)))
    lost = 1.0 - kept / total if total > 0.0 else float("nan")
    return Laid(np.where(seen, density, np.nan), max(lost, 0.0) if lost == lost else lost)


def common_window(a: Geometry, b: Geometry) -> Window | None:
    """The rectangle (top, left, bottom, right), original pixels, that both models saw; None if there is none."""
    (top_a, left_a, bottom_a, right_a), (top_b, left_b, bottom_b, right_b) = a.visible, b.visible
    window = max(top_a, top_b), max(left_a, left_b), min(bottom_a, bottom_b), min(right_a, right_b)
    return window if window[0] < window[2] and window[1] < window[3] else None


def _meet_one(a: MapSet, b: MapSet, chosen: MapSet, i: int) -> tuple[Laid, Laid, float]:
    window = common_window(a.geometry[i], b.geometry[i])
    if window is None:
        blank = Laid(np.full(chosen.grid.shape, np.nan), 1.0)
        return blank, blank, 0.0
    cells = chosen.geometry[i].grid_to_original(chosen.grid)
    one, other = (lay(m.values[i], m.grid, m.geometry[i], cells, window) for m in (a, b))
    area = a.geometry[i].original_height * a.geometry[i].original_width
    share = (window[2] - window[0]) * (window[3] - window[1]) / area
    return one, other, share


def _cover(cells: CellGrid, window: Window) -> NDArray[np.float64]:
    """Share of each cell inside the window, (row, column)."""
    y = np.clip(np.minimum(cells.y[1:], window[2]) - np.maximum(cells.y[:-1], window[0]), 0.0, None)
    x = np.clip(np.minimum(cells.x[1:], window[3]) - np.maximum(cells.x[:-1], window[1]), 0.0, None)
    return np.asarray(np.outer(y, x) / cells.areas)


def _cell_area(maps: MapSet) -> float:
    """Geometric mean over images of a cell's area in original pixels."""
    mean = float(maps.grid.areas.mean())
    return float(np.exp(np.mean([np.log(mean / (g.scale_y * g.scale_x)) for g in maps.geometry])))
