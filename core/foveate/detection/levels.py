"""Which pyramid level reads from which: mass between the levels of a multi-scale detector.

Zhu et al. 2021 (Deformable DETR, ICLR, section 4.1) let one softmax run over the points of all levels, so levels
compete; a level's share of the tokens is no baseline for that competition (four in five tokens are of the finest
level), but an equal share for each level is, and both are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.detection.objects_mass import group_mass

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import TokenAxis


class LevelMass(NamedTuple):
    """``mass (..., query level, key level)``; row -1 of ``query_levels`` are queries without a level (objects).

    ``share (key level,)`` is each level's share of the keys. Levels are named by their true numbers.
    """

    mass: NDArray[np.float64]
    query_levels: tuple[int, ...]
    key_levels: tuple[int, ...]
    share: NDArray[np.float64]

    @property
    def equal(self) -> float:
        """The mass of each level if levels were chosen evenly."""
        return 1.0 / len(self.key_levels)


def level_mass(attention: ArrayLike, query: TokenAxis, key: TokenAxis) -> LevelMass:
    """Mass between levels of ``attention (..., query, key)``: mean over the queries of each level.

    Keys without a level form a level -1 of their own. Rows are normalised over what they see.
    """
    queries, of_query = _members(query.level)
    keys, of_key = _members(key.level)
    mass, share = group_mass(attention, of_query, of_key)
    return LevelMass(mass, queries, keys, share)


def _members(level: NDArray[np.int32]) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    names = np.unique(level)
    return tuple(int(name) for name in names), (level[None] == names[:, None]).astype(np.float64)
