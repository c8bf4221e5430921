"""How one forward pass is read: on which output scale, and following which object.

A target on an object can be followed by its query, whatever that query says once the picture has changed, or to
the answer that matches the object best (``probability@match``). A detector may hand an object from one query to
another, so either alone can mislead: by query a moved object looks lost, by match a neighbour may be taken for it.
Both are read from the same forward pass. An object that nothing matches any more has vanished; its probability is
exactly 0, which is how vanished objects are counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, cast

from foveate.interfaces import BoundTarget, Scale

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource

MATCH = "@match"
"""Suffix of target kinds, and of readings, that follow an object by best match."""


def read_as(bound: BoundTarget, reading: str) -> BoundTarget:
    """The same rows for one reading: a scale (``logit``), or a scale followed by match (``probability@match``)."""
    scale = cast("Scale", reading.removesuffix(MATCH))
    if not reading.endswith(MATCH):
        return bound.at(scale)
    rows = tuple(row if row.kind.endswith(MATCH) else replace(row, kind=row.kind + MATCH) for row in bound.rows)
    return replace(bound, rows=rows, scale=scale)


def readings_of(source: AttentionSource, kind: str, scales: Sequence[str]) -> tuple[str, ...]:
    """``scales``, and the probability followed by match where the source can follow targets of this kind so.

    A logit has no natural value for an object that is gone, so only the probability is followed.
    """
    can = kind + MATCH in source.targets and "probability" in scales
    return (*scales, "probability" + MATCH) if can else tuple(scales)


def vanished_share(curves: NDArray[np.floating]) -> NDArray[np.floating]:
    """Share of the pictures along curves ``(..., step)``, read by match, in which nothing matches the object."""
    share: NDArray[np.floating] = (curves == 0.0).mean(-1)
    return share
