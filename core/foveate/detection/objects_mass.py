"""Who attends to whom: attention mass between objects, and between groups of tokens.

Groups come as soft memberships (a cell that a box covers by half belongs to it by half), from boxes or masks by
:mod:`foveate.detection.mass`. Every mass stands beside the share of keys that the group holds: what attention
without a preference would put there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray


def group_mass(
    attention: ArrayLike, query_groups: ArrayLike, key_groups: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean mass that tokens of one group put on another, and the other's share of the keys.

    ``attention (..., query, key)`` with rows over valid keys (NaN keys hold no mass and do not count);
    ``query_groups (group, query)`` and ``key_groups (group', key)`` memberships in [0, 1]. Returns ``mass (...,
    group, group')``, NaN for a group without queries or rows without mass, and ``share (group',)`` of the keys
    that any row of the attention sees. Raises UsageError where shapes do not fit.
    """
    rows = np.asarray(attention, np.float64)
    of_query, of_key = (np.asarray(groups, np.float64) for groups in (query_groups, key_groups))
    if rows.shape[-2:] != (of_query.shape[-1], of_key.shape[-1]):
        raise UsageError(
            f"group_mass: attention {rows.shape} does not fit groups of {of_query.shape[-1]} queries and "
            f"{of_key.shape[-1]} keys"
        )
    valid = np.isfinite(rows).reshape(-1, rows.shape[-1]).any(0)
    known = np.nan_to_num(rows)
    total = known.sum(-1, keepdims=True)
    rows = known / np.where(total > 0, total, 1.0)
    weight = of_query * (total[..., 0] > 0)[..., None, :]
    size = weight.sum(-1)[..., None]
    mass = weight @ (rows @ of_key.T)
    share = of_key @ valid / max(1, int(valid.sum()))
    return np.where(size > 0, mass / np.where(size > 0, size, 1.0), np.nan), share


def object_exchange(
    attention: ArrayLike, objects: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What object queries take from each other in the decoder's self-attention.

    ``attention (..., query, key)`` over the same object queries; ``objects`` are the queries that found one.
    Returns ``(..., 3)``: mean mass of objects' rows on themselves, on the other objects, and on queries without an
    object; and the shares ``(3,)`` of keys that these are. Without objects the masses are NaN.
    """
    rows = np.asarray(attention, np.float64)
    count = rows.shape[-1]
    if rows.shape[-2] != count:
        raise UsageError(f"object_exchange: {rows.shape[-2]} queries but {count} keys: not self-attention")
    found = np.asarray(objects, np.intp)
    share = np.array([1, max(0, found.size - 1), count - max(1, found.size)], np.float64) / count
    if not found.size:
        return np.full((*rows.shape[:-2], 3), np.nan), share
    own = rows[..., found, found].mean(-1)
    among = rows[..., found[:, None], found].sum(-1).mean(-1)
    whole = rows[..., found, :].sum(-1).mean(-1)
    return np.stack([own, among - own, whole - among], -1), share
