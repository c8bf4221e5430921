"""What is compared: one model's maps of some images, with the rule that made them.

A score between two models means something only when the same thing was computed on both sides. Everything
that must be equal is a field of :class:`MapRule`; what differs is said in words, and there is no score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import CellGrid, Geometry


@dataclass(frozen=True)
class MapRule:
    """How the maps were made. All fields must be equal on both sides.

    ``layer`` and ``head`` are words relative to the model ("last of those kept", "mean of heads"), since
    models have different numbers of them; ``target`` is the kind of answer explained, empty where the
    method explains none (raw attention). ``options`` are the method's own settings.
    """

    method: str
    layer: str = ""
    head: str = ""
    target: str = ""
    scale: str = ""
    signed: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def differences(self, other: MapRule) -> list[str]:
        """What is not the same, one sentence each; empty where the two may be compared."""
        found = []
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name == "options":
                found += [
                    f"option {key} is {mine.get(key)!r} and {theirs.get(key)!r}"
                    for key in sorted({*mine, *theirs})
                    if mine.get(key) != theirs.get(key)
                ]
            elif mine != theirs:
                found.append(f"{item.name} is {mine!r} and {theirs!r}")
        return found

    def __str__(self) -> str:
        words = [self.method, self.layer, self.head, f"target {self.target}" if self.target else ""]
        return ", ".join(word for word in words if word)


@dataclass(frozen=True, eq=False)
class MapSet:
    """One model's maps ``values (image, row, column)`` on ``grid`` (pixels of its input).

    ``geometry`` says per image how it became the input; ``labels`` what was explained on it ("" where the
    method explains no answer); ``unplaced`` (image,) is the mass on tokens without a place in the picture
    (CLS, registers), NaN where that means nothing.
    """

    model: str
    rule: MapRule
    values: NDArray[np.float64]
    grid: CellGrid
    geometry: tuple[Geometry, ...]
    labels: tuple[str, ...]
    unplaced: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.geometry)

    def take(self, index: Sequence[int] | NDArray[np.intp]) -> MapSet:
        """Some of the images, in the order given."""
        rows = [int(i) for i in index]
        return MapSet(
            self.model,
            self.rule,
            self.values[rows],
            self.grid,
            tuple(self.geometry[i] for i in rows),
            tuple(self.labels[i] for i in rows),
            self.unplaced[rows],
        )
