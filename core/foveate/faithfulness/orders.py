"""From explanations to orders of cells: the only thing about a map that deletion and insertion use.

A map of any resolution is pooled by area to the model's own cells; tied cells are put in a random order
that is fixed by seed and sample (one draw per sample, the same for every method, so that methods are
compared under the same luck); cells that a map does not know (NaN) come last, in that random order too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.attribution.seeding import sample_seed
from foveate.errors import UsageError
from foveate.geometry import CellGrid, regrid
from foveate.stats.ranks import descending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

TIE_RULE = "ties and unknown cells in one random order per sample, shared by all methods; unknown cells last"


def to_cells(values: ArrayLike, grid: CellGrid, cells: CellGrid) -> NDArray[np.float64]:
    """Maps ``(target, [frame,] y, x)`` on ``grid`` as values of the model's cells, ``(target, cell)``.

    Both grids are in pixels of the model's input. Frame cells of a clip follow each other along ``cell``.
    Area-weighted means; NaN where the map says nothing.
    """
    array = np.asarray(values, dtype=np.float64)
    pooled = array if grid == cells else regrid(array, grid, cells, reduce="mean")
    flat = pooled.reshape(len(pooled), -1)
    return np.where(np.isfinite(flat), flat, np.nan)


def cell_order(values: ArrayLike, ids: Sequence[str], *, seed: int) -> NDArray[np.intp]:
    """Cells from most to least important, ``(..., target, cell)``, under :data:`TIE_RULE`.

    ``ids`` names the sample of each target row; rows of one sample share their tie breaking.
    """
    array = np.asarray(values, dtype=np.float64)
    noise = np.stack([tie_noise(name, array.shape[-1], seed) for name in ids])
    return descending(array, noise)


def tie_noise(sample: str, cells: int, seed: int) -> NDArray[np.float64]:
    """The random numbers that break ties on one sample, ``(cell,)``."""
    return np.random.default_rng([sample_seed(seed, sample), 0x7135]).random(cells)


def random_maps(sample: str, cells: int, *, orders: int, seed: int) -> NDArray[np.float64]:
    """``orders`` random maps ``(order, cell)``: each odd one is the even one before it, reversed.

    Every one is a uniformly random order. Reversal is antithetic (it lowers the variance of the mean), and
    inserting along an order shows the model the same pictures as deleting along its reversal, so the
    random reference costs half.
    """
    if orders < 2 or orders % 2:
        raise UsageError(f"random orders: expected an even number of at least 2, got {orders}")
    rng = np.random.default_rng([sample_seed(seed, sample), 0x9A4D])
    half = rng.random((orders // 2, cells))
    return np.stack([half, -half], axis=1).reshape(orders, cells)
