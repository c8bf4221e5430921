"""One token axis for a clip that is captured block by block, whose blocks know only the tokens that they meet.

Tokens are the same where their kind, name and place are; among equal ones (unnamed queries) the first is the
first. They get positions in the order in which they are met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.labels import pad, token_coordinates
from foveate.errors import SampleError, StoreError
from foveate.interfaces import TokenAxis
from foveate.study.frames import AXES, SiteFrame, named

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.engine import SiteCapture


class TokenMerge:
    """The ragged axes of one site over the blocks of one clip."""

    def __init__(self, frame: SiteFrame) -> None:
        self.frame = frame
        sizes = frame.sizes
        self.capacity = {axis: sizes[axis] for axis in AXES if axis in frame.ragged and axis in sizes}
        self.known: dict[str, dict[Hashable, int]] = {axis: {} for axis in self.capacity}
        self.tokens: dict[str, list[TokenAxis]] = {axis: [] for axis in self.capacity}

    def place(self, capture: SiteCapture) -> dict[str, NDArray[Any]]:
        """One block's arrays by name, ``(1, ...)``, their rows and keys at the clip's positions.

        Raises SampleError where more tokens were met than the run has room for.
        """
        at = {axis: self._positions(axis, getattr(capture, axis)) for axis in self.capacity}
        return {name: self._spread(name, array, at) for name, array in capture.arrays.items()}

    def tables(self) -> dict[str, NDArray[Any]]:
        """The token tables of all blocks by path, ``(1, axis)``."""
        found = {}
        for axis, size in self.capacity.items():
            whole = TokenAxis.concat(*self.tokens[axis]) if self.tokens[axis] else TokenAxis.of_kind("padding", 0)
            padded = pad(named(whole) if self.frame.site.ragged else whole, size)
            for name, column in token_coordinates(axis, [padded]).items():
                found[f"sites/{self.frame.site.id}/{name}"] = column.values
        return found

    def _positions(self, axis: str, tokens: TokenAxis) -> NDArray[np.intp]:
        known, fresh, found = self.known[axis], [], []
        for i, identity in enumerate(_identities(tokens)):
            if identity not in known:
                known[identity] = len(known)
                fresh.append(i)
            found.append(known[identity])
        if len(known) > self.capacity[axis]:
            error = StoreError(f"tokens: {len(known)} do not fit a capacity of {self.capacity[axis]}")
            raise SampleError(
                f"site {self.frame.site.id}: {error.message}",
                remedy=f"start a new run with a capacity of at least {len(known)}",
            )
        if fresh:
            self.tokens[axis].append(tokens.take(fresh))
        return np.array(found, np.intp)

    def _spread(self, name: str, array: NDArray[Any], at: Mapping[str, NDArray[np.intp]]) -> NDArray[Any]:
        dims = ("sample", *self.frame.dims[name])
        if name == "topk_index" and "key" in at:
            array = np.where(array >= 0, at["key"][np.maximum(array, 0)], -1).astype(array.dtype)
        for i, dim in enumerate(dims):
            if dim in at:
                shape = [*array.shape[:i], self.capacity[dim], *array.shape[i + 1 :]]
                wide = np.full(shape, self.frame.nothing(name, array), array.dtype)
                wide[(slice(None),) * i + (at[dim],)] = array
                array = wide
        return array


def _identities(tokens: TokenAxis) -> list[Hashable]:
    """What makes each token itself; equal ones are numbered."""
    places = np.stack([tokens.y, tokens.x, tokens.height, tokens.width], -1)
    # NaN (no place) is not equal to itself.
    places = np.where(np.isnan(places), -np.inf, places)
    seen: Counter[Hashable] = Counter()
    found: list[Hashable] = []
    for i, place in enumerate(places.tolist()):
        name = tokens.label[i] if tokens.label is not None else ""
        one = (int(tokens.kind[i]), name, int(tokens.level[i]), int(tokens.frame[i]), *place)
        found.append((one, seen[one]))
        seen[one] += 1
    return found
