"""What a detector found and where it looked for each object: boxes, cross-attention, layers, who looks at whom.

An object has one colour in all panels of a figure. Its box is drawn where the model put it, in original
pixels; its map is the attention row of its object query (or any other map of it), on the model's own cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from foveate.errors import UsageError
from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import Scale, check_name, per_image, shared
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

COLOURS = (
    "#e8590c", "#228be6", "#2b8a3e", "#c2255c", "#f2c200", "#7048e8", "#0b7285", "#d6336c", "#74b816", "#495057",
)  # fmt: skip
"""One colour an object, in order; after the last they begin again."""


@dataclass(frozen=True)
class DetectedObject:
    """One object that a detector found. ``box`` is (top, left, bottom, right) in original pixels, or None."""

    label: str
    score: float
    query: int
    box: tuple[float, float, float, float] | None = None

    @property
    def name(self) -> str:
        """Label and score, for titles."""
        return f"{self.label} {self.score:.2f}"


@drawn
def objects(
    found: Sequence[DetectedObject],
    panels: Sequence[Panel],
    rule: Rule,
    *,
    title: str = "",
    scale: str = "lift",
    unit: str = "attention",
    columns: int = 4,
) -> Picture:
    """The picture with all boxes, then each object's map over the grey picture with its own box.

    ``panels`` belong to ``found`` one by one. Raises UsageError where there is no object, or counts differ.
    """
    _check(found, panels)
    total = len(panels) + 1
    rows = -(-total // columns)
    columns = -(-total // rows)  # rows of equal length
    ratio = panels[0].image.shape[0] / panels[0].image.shape[1]
    figure = blank(2.5 * columns + 0.9, rows * (2.3 * min(ratio, 2.0) + 0.35) + 1.1)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    show_photo(axes[0], panels[0])
    outline_visible(axes[0], panels[0])
    for number, one in enumerate(found):
        show_box(axes[0], one, number, tag=True)
    axes[0].set_title(f"{len(found)} object{'s' * (len(found) != 1)}")
    scales = _scales(panels, scale, unit)
    for number, (axis, panel, one) in enumerate(zip(axes[1:], panels, found, strict=False)):
        show_photo(axis, panel, grey=True)
        mesh = show_map(axis, panel, scales[number], alpha=True)
        outline_visible(axis, panel)
        show_box(axis, one, number)
        _titled(axis, f"{number + 1}  {one.name}", number)
    for axis in axes[total:]:
        axis.set_axis_off()
    colour_bar(axes, mesh, scales[-1], shrink=0.9)
    return finish(figure, title or rule.model, *_words(rule, scales[-1], panels))


@drawn
def film_strip(
    found: Sequence[DetectedObject],
    strips: Sequence[Sequence[Panel]],
    layers: Sequence[int],
    rule: Rule,
    *,
    title: str = "",
    scale: str = "lift",
    answers: Sequence[Sequence[DetectedObject]] | None = None,
) -> Picture:
    """One row an object, one frame a decoder layer, on one scale.

    ``strips`` is ``(object, layer)``, and so are ``answers``: what the object's query said at each layer, as a
    box and a name; without them the box is the final one in every frame. Raises UsageError where counts differ or
    the scale is per image.
    """
    _check(found, strips)
    if answers is not None and [len(row) for row in answers] != [len(strip) for strip in strips]:
        raise UsageError(f"film strip: answers of {[len(row) for row in answers]} layers for {len(layers)} layers")
    if any(len(strip) != len(layers) for strip in strips):
        raise UsageError(f"film strip: {[len(s) for s in strips]} frames for {len(layers)} layers")
    if check_name(scale) == "per-image":
        raise UsageError("layers on per-image scales would not compare", remedy="choose lift or linear")
    colours = shared(scale, [panel.values for strip in strips for panel in strip])
    ratio = strips[0][0].image.shape[0] / strips[0][0].image.shape[1]
    side = float(np.clip(11.0 / len(layers), 1.3, 2.2))
    figure = blank(side * len(layers) + 1.5, len(found) * (side * min(ratio, 2.0) + 0.25) + 1.1)
    grid = figure.subplots(len(found), len(layers), squeeze=False)
    for number, (one, strip) in enumerate(zip(found, strips, strict=True)):
        said = [one] * len(layers) if answers is None else answers[number]
        for axis, panel, layer, answer in zip(grid[number], strip, layers, said, strict=True):
            show_photo(axis, panel, grey=True)
            mesh = show_map(axis, panel, colours, alpha=True)
            outline_visible(axis, panel)
            show_box(axis, answer, number)
            if number == 0:
                axis.set_title(f"layer {layer}")
            if answers is not None:
                axis.set_xlabel(answer.name, fontsize=7.5, labelpad=2)
        grid[number, 0].set_ylabel(f"{number + 1}  {one.name}", color=COLOURS[number % len(COLOURS)])
    colour_bar(list(grid.flat), mesh, colours, shrink=0.9)
    words = _words(rule, colours, [panel for strip in strips for panel in strip])
    boxes = (
        "the final answer's, in every frame"
        if answers is None
        else "each layer's own answer, by the model's heads"
    )
    return finish(figure, title or rule.model, *words, f"boxes: {boxes}")


@dataclass(frozen=True, eq=False)
class CrossTable:
    """``values`` ``(object, region)``: share of each object's mass; the last column is outside all regions.

    ``chance`` ``(region,)`` is the share of the cells' area, which uniform attention would give.
    """

    values: NDArray[np.float64]
    chance: NDArray[np.float64]
    region: str = "box"


@drawn
def cross_objects(
    found: Sequence[DetectedObject], table: CrossTable, panel: Panel, rule: Rule, *, title: str = ""
) -> Picture:
    """Who looks at whom: the picture with boxes beside a matrix of mass, each object's own region ringed.

    Raises UsageError where counts differ.
    """
    count = len(found)
    if table.values.shape != (count, count + 1) or table.chance.shape != (count + 1,):
        raise UsageError(f"cross objects: a table {table.values.shape} for {count} objects")
    figure = blank(4.6 + 0.55 * count, max(3.2, 0.42 * count + 2.0))
    left, right = figure.subplots(1, 2, width_ratios=[2.4, max(2.0, 0.6 * (count + 1))])
    show_photo(left, panel)
    for number, one in enumerate(found):
        show_box(left, one, number, tag=True)
    left.set_title("picture")
    shown = np.vstack([table.values, table.chance])
    mesh = right.imshow(shown, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        right.text(column, row, text, ha="center", va="center", fontsize=8, color="w" if value < 0.6 else "k")
    for number in range(count):
        right.add_patch(
            Rectangle((number - 0.5, number - 0.5), 1, 1, fill=False, lw=2.2, ec=COLOURS[number % len(COLOURS)])
        )
    right.axhline(count - 0.5, color="w", lw=2)
    right.set_xticks(range(count + 1), [*(str(i + 1) for i in range(count)), "outside"])
    right.set_yticks(range(count + 1), [*(f"{i + 1} {one.label}" for i, one in enumerate(found)), "uniform"])
    right.set(xlabel=f"in whose {table.region}", ylabel="whose map")
    right.set_title("share of a map's mass")
    right.tick_params(length=0)
    figure.colorbar(mesh, ax=right, shrink=0.9)
    words = "regions that overlap share mass, so a row can sum to more than 1"
    return finish(figure, title or rule.model, str(rule), words, "bottom row: what uniform attention would give")


def show_box(axes: Axes, one: DetectedObject, number: int, *, tag: bool = False) -> None:
    """An object's box in its colour; with ``tag`` its number at the corner."""
    if one.box is None or not np.isfinite(one.box).all():
        return
    top, left, bottom, right = one.box
    colour = COLOURS[number % len(COLOURS)]
    halo = [withStroke(linewidth=3.2, foreground="w")]
    axes.add_patch(
        Rectangle((left, top), right - left, bottom - top, fill=False, ec=colour, lw=1.6, path_effects=halo)
    )
    if tag:
        axes.annotate(
            str(number + 1), (left, top), xytext=(2, -2), textcoords="offset points", ha="left", va="top",
            color="w", fontsize=8, fontweight="bold", clip_on=True,
            bbox={"boxstyle": "square,pad=0.15", "fc": colour, "ec": "none"},
        )  # fmt: skip


def _titled(axes: Axes, text: str, number: int) -> None:
    axes.set_title(text, color=COLOURS[number % len(COLOURS)])


def _scales(panels: Sequence[Panel], name: str, unit: str) -> list[Scale]:
    """One scale for all, or each its own where that is asked for."""
    if check_name(name) == "per-image":
        return [per_image(panel.values, unit) for panel in panels]
    if any(panel.signed for panel in panels):
        name = "signed"
    return [shared(name, [panel.values for panel in panels], unit)] * len(panels)


def _words(rule: Rule, scale: Scale, panels: Sequence[Panel]) -> list[str]:
    """Caption: rule, scale, and what the picture cannot show."""
    sentences = [str(rule), scale.words, "cells at their exact edges, unsmoothed"]
    hidden = max(panel.hidden_share for panel in panels)
    if hidden > 1e-9:
        sentences.append(f"outlined: what the model saw, all but {hidden:.0%} of the picture")
    return sentences


def _check(found: Sequence[DetectedObject], panels: Sequence[object]) -> None:
    if not found:
        raise UsageError(
            "no object to draw: the model found none above its threshold",
            remedy="open the model with a lower threshold, or choose another sample",
        )
    if len(found) != len(panels):
        raise UsageError(f"{len(found)} objects but {len(panels)} maps")
