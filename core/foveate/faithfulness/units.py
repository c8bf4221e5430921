"""What vanishes at once: a cell, a tube through time, or a whole frame.

One patch of one frame is seldom missed, since the frames around it show the same. So the cells of a clip can be
taken together: a *tube* is a patch through all frame cells (or through blocks of them), a *frame* is every patch
of one frame cell. A unit ranks by what the map gives it as a whole. Of images there are cells only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

UnitKind = Literal["cells", "tubes", "frames"]
UnitValue = Literal["sum", "mean"]


@dataclass(frozen=True)
class Unit:
    """Which cells vanish together, and how a map ranks them.

    ``span`` is the largest number of frame cells in one block of a tube (None: all); a clip is cut into as few
    blocks as that allows, as even as possible. ``value`` is the number of a unit: the "sum" of the map over its
    cells or their "mean"; cells that the map does not know do not count.
    """

    kind: UnitKind = "cells"
    span: int | None = None
    value: UnitValue = "sum"

    def __post_init__(self) -> None:
        if self.kind not in get_args(UnitKind) or self.value not in get_args(UnitValue):
            raise UsageError(
                f"unit: expected one of {', '.join(get_args(UnitKind))} ranked by sum or mean, "
                f"got {self.kind!r} ranked by {self.value!r}"
            )
        if self.span is not None and (self.kind != "tubes" or self.span < 1):
            raise UsageError(f"unit: a span of {self.span} frame cells is for tubes, and at least 1")

    def record(self) -> dict[str, Any]:
        """What is stored beside every score of a clip."""
        return {"unit": self.kind, "unit_span": self.span or 0, "unit_value": self.value}

    def of(self, shape: tuple[int, ...]) -> Units:
        """The units of maps ``([frame cell,] row, column)`` of ``shape``. UsageError for images in tubes."""
        numbers = np.arange(int(np.prod(shape)))
        if self.kind == "cells":
            return Units(numbers, self)
        if len(shape) != 3:
            raise UsageError(f"unit {self.kind!r}: an image has no frames", remedy="--unit cells")
        frame, place = np.divmod(numbers, shape[1] * shape[2])
        if self.kind == "frames":
            return Units(frame, self)
        blocks = -(-shape[0] // (self.span or shape[0]))
        return Units(frame * blocks // shape[0] * (shape[1] * shape[2]) + place, self)


CELLS = Unit()
FRAMES = Unit("frames")


@dataclass(frozen=True, eq=False)
class Units:
    """``numbers`` int64 ``(cell,)``: the unit of each cell of a map, from 0; ``unit`` says what units are."""

    numbers: NDArray[np.int64]
    unit: Unit = CELLS

    @property
    def count(self) -> int:
        """How many units there are."""
        return int(self.numbers.max()) + 1

    def pool(self, values: ArrayLike) -> NDArray[np.float64]:
        """Maps ``(..., cell)`` as one number a unit, ``(..., unit)``; NaN where a unit has no known cell."""
        array = np.asarray(values, dtype=np.float64)
        if self.unit.kind == "cells":
            return array
        known = np.isfinite(array)
        total = self._add(np.where(known, array, 0.0))
        size = self._add(known.astype(np.float64))
        with np.errstate(invalid="ignore", divide="ignore"):
            value = total / size if self.unit.value == "mean" else total
        return np.where(size > 0, value, np.nan)

    def any(self, cells: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Whether a unit has one of ``cells (..., cell)``, ``(..., unit)``."""
        return self._add(cells.astype(np.float64)) > 0

    def _add(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = values.reshape(-1, values.shape[-1])
        rows = [np.bincount(self.numbers, row, minlength=self.count) for row in flat]
        added = np.asarray(rows, dtype=np.float64)
        return added.reshape(*values.shape[:-1], self.count)
