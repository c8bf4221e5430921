"""How a metric is distributed over images: histograms with n, median and reference lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_BINS, LEAST_BINS = 31, 11
MAX_GROUPS = 6
_COLOURS = ("#3b528b", "#e8590c", "#21918c", "#9467bd", "#5ec962", "#7f7f7f")


@dataclass(frozen=True, eq=False)
class Distribution:
    """One value an image. ``values`` float ``(sample,)``; NaN (failed, not captured) is counted, not drawn.

    ``references`` maps the name of a reference (uniform attention, a bound) to its value.
    """

    name: str
    values: NDArray[np.floating]
    unit: str = ""
    references: Mapping[str, float] = field(default_factory=dict)


@drawn
def distributions(
    items: Sequence[Distribution],
    *,
    title: str,
    source: str,
    groups: Sequence[str] | None = None,
    columns: int = 3,
) -> Picture:
    """One histogram a metric, over images.

    ``source`` says which model, site, layer and heads. ``groups`` (one name an image, for instance its
    country) splits each histogram into outlines; beyond six groups the rarest are joined as "other".
    Raises UsageError where there is nothing finite to draw.
    """
    if not items or not any(np.isfinite(item.values).any() for item in items):
        raise UsageError("no finite value to draw", remedy="run foveate metrics RUN first")
    names = None if groups is None else _largest(groups)
    columns = min(columns, len(items))
    rows = math.ceil(len(items) / columns)
    figure = blank(max(3.4 * columns, 4.6), 2.4 * rows + 1.3)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(items) :]:
        axis.set_axis_off()
    for axis, item in zip(axes.flat, items, strict=False):
        _histogram(axis, item, names)
    if names is not None:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    bars = "shares of each group" if names is not None else "counts"
    return finish(figure, title, source, f"{bars} of images, equal bins", "solid: median; dashed: reference")


def _histogram(axes: Axes, item: Distribution, names: list[str] | None) -> None:
    finite = np.isfinite(item.values)
    values = np.asarray(item.values, np.float64)[finite]
    missing = int((~finite).sum())
    axes.set_title(f"{item.name}   n = {values.size}" + (f", {missing} missing" if missing else ""))
    axes.set_xlabel(item.unit or "dimensionless")
    if not values.size:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center")
        return
    edges = _edges(values)
    if names is None:
        axes.hist(values, edges, color=_COLOURS[0])
        axes.set_ylabel("images")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.axvline(float(np.median(values)), color="black", lw=1.2)
    else:
        _by_group(axes, values, [name for name, known in zip(names, finite, strict=True) if known], edges)
    for name, place in item.references.items():
        if np.isfinite(place):
            axes.axvline(place, color="0.4", lw=1.0, ls="--")
            axes.annotate(
                name, (place, 1.0), xycoords=("data", "axes fraction"), rotation=90, fontsize=7, color="0.3",
                ha="right", va="top", xytext=(-2, -2), textcoords="offset points",
            )  # fmt: skip


def _by_group(axes: Axes, values: NDArray[np.float64], names: list[str], edges: list[float]) -> None:
    for colour, group in zip(_COLOURS, _order(names), strict=False):
        part = values[np.array(names) == group]
        share = np.full(part.size, 1.0 / part.size)
        label = f"{group} ({part.size})"
        axes.hist(part, edges, weights=share, histtype="step", color=colour, lw=1.4, label=label)
        axes.axvline(float(np.median(part)), color=colour, lw=1.0)
    axes.set_ylabel("share of group")


def _edges(values: NDArray[np.float64]) -> list[float]:
    """About 2 sqrt(n) equal bins; an odd number, so that a constant stands in the middle of its bar."""
    bins = int(np.clip(2 * np.sqrt(values.size), LEAST_BINS, MOST_BINS)) | 1
    low, high = float(values.min()), float(values.max())
    if high - low <= 1e-12 * max(abs(low), abs(high), 1.0):
        low, high = low - 0.5, high + 0.5
    return list(np.linspace(low, high, bins + 1))


def _largest(groups: Sequence[str]) -> list[str]:
    """Group names with all but the largest five joined as "other" where there are more than six."""
    order = _order(list(groups))
    kept = set(order if len(order) <= MAX_GROUPS else order[: MAX_GROUPS - 1])
    return [name if name in kept else "other" for name in groups]


def _order(names: Sequence[str]) -> list[str]:
    """Most frequent first, then by name."""
    counts = dict.fromkeys(names, 0)
    for name in names:
        counts[name] += 1
    return sorted(counts, key=lambda name: (-counts[name], name))
