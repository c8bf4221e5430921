"""From values to colours, said in words.

The default is **lift**: a value divided by what a uniform map would have (attention: K times the weight),
on the fixed logarithmic scale 1/8 ... 32. It is the same in every picture, so pictures compare whatever
their number of keys, and an almost uniform map looks almost uniform. The others are ``linear`` (from 0,
shared by the panels of a figure), ``signed`` (red for, blue against, centred at 0) and ``per-image``
(each panel's own minimum to maximum), which always says that its colours do not compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike, NDArray

from foveate.errors import UsageError

NAMES = ("lift", "linear", "signed", "per-image")
LIFT_LOW, LIFT_HIGH = -3, 5  # log2: 1/8 to 32 times uniform
_LIFT_TICKS = {-3: "⅛", -2: "¼", -1: "½", 0: "1", 1: "2", 2: "4", 3: "8", 4: "16", 5: "32"}


@dataclass(frozen=True, eq=False)
class Scale:
    """One mapping of values to colours.

    ``relative`` scales take values divided by the uniform level; ``logarithmic`` ones their log2.
    ``ticks`` maps positions on the colour bar to their labels (None: matplotlib's choice). ``words`` is
    for the caption, ``label`` (with unit) for the colour bar.
    """

    name: str
    norm: Normalize
    cmap: str
    label: str
    words: str
    relative: bool = False
    logarithmic: bool = False
    ticks: dict[int, str] | None = None

    def paint(self, values: ArrayLike, uniform: float) -> NDArray[np.float64]:
        """What is handed to the colour map; NaN stays NaN, and below the scale is its lowest colour."""
        array = np.asarray(values, np.float64)
        if self.relative:
            array = array / uniform if uniform > 0 else np.full_like(array, np.nan)
        if self.logarithmic:
            array = np.log2(np.maximum(array, 2.0 ** (LIFT_LOW - 1)))
        return array

    def share(self, values: ArrayLike, uniform: float) -> NDArray[np.float64]:
        """Position on the scale in [0, 1]; for signed scales the strength |v| / limit. NaN becomes 0."""
        normed = np.asarray(self.norm(self.paint(values, uniform)), np.float64)
        position = np.nan_to_num(np.clip(normed, 0.0, 1.0))
        return np.asarray(np.abs(2 * position - 1) if self.name == "signed" else position)


def lift() -> Scale:
    """The fixed scale of times uniform, 1/8 to 32, by powers of two."""
    return Scale(
        "lift",
        Normalize(LIFT_LOW, LIFT_HIGH),
        "viridis",
        "× uniform",
        "colour: times uniform (value / uniform level), log scale, fixed ⅛ to 32",
        relative=True,
        logarithmic=True,
        ticks=_LIFT_TICKS,
    )


def linear(high: float, unit: str = "attention") -> Scale:
    """From 0 to ``high``, shared by all panels that use it."""
    top = high if np.isfinite(high) and high > 0 else 1.0
    return Scale("linear", Normalize(0.0, top), "viridis", unit, f"colour: {unit}, linear, 0 to {top:.3g}, shared")


def signed(limit: float, unit: str = "attribution") -> Scale:
    """From -limit (blue: against the target) through 0 (white) to +limit (red: for it)."""
    top = limit if np.isfinite(limit) and limit > 0 else 1.0
    words = f"colour: signed {unit}, centred at 0, ±{top:.3g}; red for the target, blue against"
    return Scale("signed", Normalize(-top, top), "RdBu_r", unit, words)


def per_image(values: ArrayLike, unit: str = "attention") -> Scale:
    """This panel's own minimum to maximum. Its colours do not compare with any other panel's."""
    low, high = _extent([values])
    words = f"colour: PER-IMAGE min-max of {unit}: colours do not compare between panels"
    label = f"{unit} (own range)"
    return Scale("per-image", Normalize(low, high if high > low else low + 1.0), "viridis", label, words)


def shared(name: str, stack: Iterable[ArrayLike], unit: str = "attention") -> Scale:
    """One scale for all arrays of ``stack``. Raises UsageError for an unknown name or ``per-image``."""
    if name == "lift":
        return lift()
    low, high = _extent(stack)
    if name == "linear":
        return linear(high, unit)
    if name == "signed":
        return signed(max(abs(low), abs(high)), unit)
    raise UsageError(f"unknown scale {name!r} here: expected one of lift, linear, signed")


def check_name(name: str) -> str:
    """The name itself, or UsageError that lists the scales."""
    if name not in NAMES:
        raise UsageError(f"unknown scale {name!r}: expected one of {', '.join(NAMES)}")
    return name


def _extent(stack: Iterable[ArrayLike]) -> tuple[float, float]:
    """Smallest and largest finite value; (0, 0) where there is none."""
    arrays = [np.asarray(values, np.float64).ravel() for values in stack]
    values = np.concatenate(arrays) if arrays else np.empty(0)
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
