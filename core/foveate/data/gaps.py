"""Values that are missing for a reason, and values that are broken.

NaN in a captured sample says that nothing was there to look: a frame behind the end of a clip, a track that does
not live. Such gaps are the same in every layer and head. Any other NaN, and every infinity, is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

ENTRIES = ("query", "token", "key", "rank")
"""Axes along which single entries may be missing where tokens come and go."""


def is_broken(
    values: NDArray[Any],
    dims: Sequence[str],
    group: Collection[str] = (),
    *,
    comes_and_goes: bool = False,
    padded: bool = False,
) -> bool:
    """Whether one sample's array, with axes ``dims``, holds an infinity, or NaN that is no gap.

    ``group`` names the axes of which whole entries (frames, tracks) may be missing; where the array is ``padded``
    to a capacity, all of them may. Where the tokens of a site come and go, single rows and keys may be missing,
    too, but not in attention itself, which is 0 there.
    """
    if values.dtype.kind != "f":
        return False
    finite = np.isfinite(values)
    if finite.all():
        return False
    pairs = {"query", "key"} <= set(dims) or {"token", "key"} <= set(dims)
    entries = ENTRIES if comes_and_goes and not pairs else ()
    if np.isinf(values).any() or not (finite.any() or padded or entries):
        return True
    across = tuple(i for i, dim in enumerate(dims) if dim not in group and dim not in entries)
    return bool((finite.any(across) != finite.all(across)).any())
