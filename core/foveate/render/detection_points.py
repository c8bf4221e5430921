"""Deformable attention on the picture: where it sampled, with what weight, and the exact row that this makes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from foveate.render.detection import show_box
from foveate.render.panel import colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import lift
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PathCollection

    from foveate.capture.sampling import SamplingPoints
    from foveate.render.detection import DetectedObject
    from foveate.render.panel import Panel, Rule

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
"""One marker a pyramid level, finest first; after the last they begin again."""


@drawn
def deformable(
    points: SamplingPoints, splat: Panel, rule: Rule, *, title: str = "", one: DetectedObject | None = None
) -> Picture:
    """The sampling points of one query over the grey picture, beside the row they make when splatted.

    The reference point is a cross; a point's colour is its weight in times uniform over the points (1 / number
    of points), its marker the pyramid level. ``splat`` is the row over cells; ``one`` the object, for its box.
    """
    scale = lift()
    ratio = splat.image.shape[0] / splat.image.shape[1]
    figure = blank(9.6, min(4.2 * ratio + 1.3, 9.5))
    left, right = figure.subplots(1, 2)
    show_photo(left, splat, grey=True)
    marks = _scatter(left, points, splat, scale.paint(points.weight, 1.0 / points.weight.size))
    left.set_title(f"{points.weight.size} sampling points")
    show_photo(right, splat, grey=True)
    mesh = show_map(right, splat, scale, alpha=True)
    right.set_title("the row that they make (bilinear splat)")
    for axis in (left, right):
        outline_visible(axis, splat)
        if one is not None:
            show_box(axis, one, 0)
    colour_bar([left, right], mesh, scale, shrink=0.9)
    levels = sorted({int(level) for level in points.level})
    left.legend(
        handles=[*(_key(level) for level in levels), *_reference(left, points, splat)],
        loc="upper left", bbox_to_anchor=(0.0, -0.02), ncols=len(levels) + 1, handletextpad=0.2, columnspacing=1.0,
    )  # fmt: skip
    marks.set_rasterized(False)
    lost = 1.0 - float(points.weight[points.inside(splat.geometry.input_height, splat.geometry.input_width)].sum())
    words = "points: × uniform over the points; row: × uniform over the cells"
    outside = f"{lost:.0%} of the weight lies on points outside the model's input, where values are 0"
    return finish(figure, title or rule.model, str(rule), scale.words, words, outside if lost > 5e-3 else "")


def _scatter(axes: Axes, points: SamplingPoints, panel: Panel, colours: np.ndarray) -> PathCollection:
    """Points in original pixels, weak ones first so that strong ones lie on top."""
    scale = lift()
    for level in sorted({int(level) for level in points.level}, reverse=True):
        here = np.flatnonzero(points.level == level)
        here = here[np.argsort(points.weight[here], kind="stable")]
        y, x = _original(panel, points.y[here], points.x[here])
        marks = axes.scatter(
            x, y, c=colours[here], norm=scale.norm, cmap=scale.cmap, marker=MARKERS[level % len(MARKERS)],
            s=26, linewidths=0.6, edgecolors="w", zorder=3, clip_on=True,
        )  # fmt: skip
    return marks


def _reference(axes: Axes, points: SamplingPoints, panel: Panel) -> list[Line2D]:
    """The cross where the points start from, and its key; nothing where it is not known."""
    if not np.isfinite(points.reference).all():
        return []
    y, x = _original(panel, np.array([points.reference[0]]), np.array([points.reference[1]]))
    cross = axes.plot(x, y, "+", color="#c92a2a", ms=14, mew=2.0, zorder=4)
    cross[0].set_path_effects([withStroke(linewidth=4.0, foreground="w")])
    return [Line2D([], [], color="#c92a2a", marker="+", ls="", ms=9, mew=2.0, label="reference")]


def _key(level: int) -> Line2D:
    marker = MARKERS[level % len(MARKERS)]
    return Line2D([], [], color="0.4", marker=marker, ls="", ms=5, label=f"level {level}")


def _original(panel: Panel, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Input pixels to original pixels."""
    g = panel.geometry
    return (y - g.offset_y) / g.scale_y, (x - g.offset_x) / g.scale_x
