"""Token values on the model's cells, whether the tokens tile one grid or the levels of a pyramid.

A detector's encoder may read several feature maps at once. Each level is laid on its own grid and moved to the
model's cells as a mass (a coarse token's number is spread over its area), and levels add up, so that nothing
that a method gave to a token is lost or counted twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.geometry import CellGrid, regrid, tokens_to_cells

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import TokenAxis


def patches_by_level(tokens: TokenAxis) -> list[NDArray[np.intp]]:
    """Positions of the patch tokens of each pyramid level, by number; one entry where there are no levels."""
    patches = tokens.where("patch")
    levels = tokens.level[patches]
    return [patches[levels == level] for level in np.unique(levels)]


def tokens_on_cells(values: ArrayLike, tokens: TokenAxis, cells: CellGrid) -> NDArray[np.float64]:
    """Values over tokens ``(..., token)`` on ``cells``, ``(..., row, column)``; others do not count.

    One grid that is not ``cells`` is moved as a density (area-weighted mean), the levels of a pyramid as masses
    that add up. Raises ValueError where the patches of a level are not one grid (frames, windows).
    """
    array = np.asarray(values, dtype=np.float64)
    levels = patches_by_level(tokens)
    if len(levels) < 2:
        laid, grid = tokens_to_cells(array, tokens)
        return laid if grid == cells else regrid(laid, grid, cells, reduce="mean")
    total = np.zeros((*array.shape[:-1], *cells.shape))
    for level in levels:
        laid, grid = tokens_to_cells(array[..., level], tokens.take(level.tolist()))
        total += np.nan_to_num(regrid(laid, grid, cells, reduce="sum"))
    return total
