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


def patches_by_frame(tokens: TokenAxis, frames: int) -> list[NDArray[np.intp]]:
    """Positions of the patch tokens of each of ``frames`` frame cells.

    Raises ValueError where a patch belongs to none of them, or one of them has no patches.
    """
    patches = tokens.where("patch")
    of = tokens.frame[patches]
    if patches.size == 0 or sorted(set(of.tolist())) != list(range(frames)):
        raise ValueError(
            f"tokens of a clip: expected patches in each of {frames} frame cells (TokenAxis.frame from 0), "
            f"got {patches.size} patches in frames {sorted(set(of.tolist()))}"
        )
    return [patches[of == frame] for frame in range(frames)]


def tokens_on_cells(
    values: ArrayLike, tokens: TokenAxis, cells: CellGrid, *, frames: int | None = None
) -> NDArray[np.float64]:
    """Values over tokens ``(..., token)`` on ``cells``, ``(..., row, column)``; others do not count.

    One grid that is not ``cells`` is moved as a density (area-weighted mean), the levels of a pyramid as masses
    that add up. Of a clip with ``frames`` frame cells, tokens go to their own (``tokens.frame``):
    ``(..., frame, row, column)``. Raises ValueError where the patches of a level are not one grid (windows;
    several frames without ``frames``; a frame without patches).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape[-1] != len(tokens):
        raise ValueError(f"tokens on cells: {array.shape[-1]} values but {len(tokens)} tokens")
    if frames is not None:
        planes = []
        for members in patches_by_frame(tokens, frames):
            own, values = _added(array[..., members], tokens.take(members.tolist()))
            planes.append(tokens_on_cells(values, own, cells))
        return np.stack(planes, axis=-3)
    levels = patches_by_level(tokens)
    if len(levels) < 2:
        laid, grid = tokens_to_cells(array, tokens)
        return laid if grid == cells else regrid(laid, grid, cells, reduce="mean")
    total = np.zeros((*array.shape[:-1], *cells.shape))
    for level in levels:
        laid, grid = tokens_to_cells(array[..., level], tokens.take(level.tolist()))
        total += np.nan_to_num(regrid(laid, grid, cells, reduce="sum"))
    return total


def on_finest(values: ArrayLike, tokens: TokenAxis) -> tuple[NDArray[np.float64], CellGrid]:
    """Values over tokens ``(..., token)`` on the cells that the patches tile, ``(..., row, column)``.

    Of a pyramid these are the cells of its finest level, on which all levels add up as masses. Raises ValueError
    where the patches of a level are not one grid.
    """
    levels = patches_by_level(tokens)
    if len(levels) < 2:
        return tokens_to_cells(values, tokens)
    finest = tokens.take(max(levels, key=len).tolist())
    _, grid = tokens_to_cells(np.zeros(len(finest)), finest)
    return tokens_on_cells(values, tokens, grid), grid


def _added(array: NDArray[np.float64], tokens: TokenAxis) -> tuple[TokenAxis, NDArray[np.float64]]:
    """Tokens of one frame, each place once: what several readers of it found there adds up (a memory)."""
    places = np.stack([tokens.level, tokens.y, tokens.x], axis=1)
    _, first, group = np.unique(places, axis=0, return_index=True, return_inverse=True)
    if first.size == len(tokens):
        return tokens, array
    total = np.zeros((first.size, *array.shape[:-1]))
    np.add.at(total, group.ravel(), np.moveaxis(array, -1, 0))
    return tokens.take(first.tolist()), np.moveaxis(total, 0, -1)
