"""Two models on one picture, and whether they agree more than chance."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike, NDArray

from foveate.errors import UsageError
from foveate.geometry import Geometry
from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import LIFT_LOW, Scale, check_name, shared
from foveate.render.style import Picture, blank, drawn, finish

DIFFERENCE_LIMIT = 3.0  # log2: eight times more or less


@drawn
def side_by_side(
    a: Panel, b: Panel, rules: tuple[Rule, Rule], *, title: str = "", scale: str = "lift", note: str = ""
) -> Picture:
    """The picture, both maps on one scale with each model's visible region, and log2(B / A) where both saw.

    Each map stays on its own cells; the difference is taken on the coarser grid of the two, by area
    (:meth:`foveate.geometry.Geometry.to_canvas`). ``note`` carries agreement, null and lost mass.
    Raises UsageError where the panels are not of one picture.
    """
    if a.image.shape != b.image.shape:
        raise UsageError(f"side by side: two pictures of different size, {a.image.shape} and {b.image.shape}")
    if check_name(scale) == "per-image":
        raise UsageError("two models side by side need one scale", remedy="choose lift or linear")
    colours = shared("signed" if a.signed or b.signed else scale, [a.values, b.values])
    ratio = a.image.shape[0] / a.image.shape[1]
    figure = blank(12.0, min(max(2.55 * ratio + 1.6, 3.2), 9.0))
    axes = list(figure.subplots(1, 4))
    show_photo(axes[0], a)
    for panel in (a, b):
        outline_visible(axes[0], panel)
    axes[0].set_title("picture, visible regions")
    for axis, panel in zip(axes[1:3], (a, b), strict=True):
        mesh = show_map(axis, panel, colours)
        axis.set_title(panel.title)
    colour_bar(axes[1:3], mesh, colours, shrink=0.8)
    if a.signed or b.signed:
        axes[3].set_axis_off()
        words = "no ratio of signed maps"
    else:
        ratio_panel, ratio_scale = difference(a, b)
        colour_bar(axes[3], show_map(axes[3], ratio_panel, ratio_scale), ratio_scale, shrink=0.8)
        axes[3].set_title("B / A where both saw")
        words = "B / A on the coarser grid, by area, in times uniform, where less than ⅛ counts as ⅛"
    return finish(
        figure, title or f"{rules[0].model} and {rules[1].model}", f"A: {rules[0]}", f"B: {rules[1]}",
        colours.words, words, note,
    )  # fmt: skip


def difference(a: Panel, b: Panel) -> tuple[Panel, Scale]:
    """log2 of B over A, both relative to uniform, on the coarser grid's cells within what both models saw.

    Both are taken as the lift scale shows them: below 1/8 of uniform all values are alike, so that the ratio
    of two nearly empty cells does not look like a finding. Raises UsageError where the models saw nothing
    in common.
    """
    coarse = min((a, b), key=lambda panel: panel.grid.shape[0] * panel.grid.shape[1])
    seen = _seen_by_both(a.geometry, b.geometry)
    canvas = coarse.geometry.grid_to_original(coarse.grid).clip(*seen)
    relative = [panel.geometry.to_canvas(panel.values / panel.uniform, panel.grid, canvas) for panel in (a, b)]
    low = 2.0**LIFT_LOW
    log_ratio = np.log2(np.maximum(relative[1], low)) - np.log2(np.maximum(relative[0], low))
    scale = Scale("signed", Normalize(-DIFFERENCE_LIMIT, DIFFERENCE_LIMIT), "RdBu_r", "log₂ (B / A)", "")
    return Panel.of_map(a.image, _whole(a), log_ratio, canvas, signed=True), scale


@drawn
def null(
    observed: ArrayLike,
    across: ArrayLike,
    *,
    statistic: str,
    title: str,
    caption: str,
) -> Picture:
    """Agreement on the same image against agreement across different images (the null), as histograms.

    ``observed`` ``(sample,)`` one value an image; ``across`` ``(pair,)``. Raises UsageError when either
    has no finite value.
    """
    same, other = (_finite(values) for values in (observed, across))
    if not same.size or not other.size:
        raise UsageError(f"null: {same.size} observed and {other.size} null values; both need at least one")
    edges = list(np.linspace(*_range(np.concatenate([same, other])), 31))
    figure = blank(6.4, 3.6)
    axes = figure.subplots()
    for values, colour, name in ((other, "0.6", "different images"), (same, "#3b528b", "same image")):
        weights = np.full(values.size, 1.0 / values.size)
        axes.hist(values, edges, weights=weights, color=colour, alpha=0.65, label=f"{name}, n = {values.size}")
        axes.axvline(float(values.mean()), color=colour, lw=1.6)
    axes.set(xlabel=statistic, ylabel="share")
    axes.legend(loc="upper left")
    return finish(figure, title, caption, "lines: means; the null pairs maps of different images")


def _seen_by_both(a: Geometry, b: Geometry) -> tuple[float, float, float, float]:
    """Intersection of the visible regions (top, left, bottom, right), original pixels."""
    top, left, bottom, right = zip(a.visible, b.visible, strict=True)
    seen = (max(top), max(left), min(bottom), min(right))
    if seen[0] >= seen[2] or seen[1] >= seen[3]:
        raise UsageError("side by side: the two models saw no common part of this picture")
    return seen


def _whole(panel: Panel) -> Geometry:
    """The geometry under which original pixels are input pixels."""
    return Geometry.identity(*panel.image.shape[:2])


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64).ravel()
    return array[np.isfinite(array)]


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)
