"""Several explanations of one picture beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

from foveate.errors import UsageError
from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.style import Picture, blank, drawn, finish
from foveate.render.triptych import choose_scale


@drawn
def methods(
    panels: Sequence[Panel],
    rule: Rule,
    *,
    title: str = "",
    scale: str = "lift",
    columns: int = 5,
) -> Picture:
    """The picture, then one overlay a method, each with its own colour bar.

    Non-negative maps share the scale ``scale`` (lift: times the map's own mean); signed maps have each
    its own symmetric range, since their units differ, and the colour bar states it.
    Raises UsageError where there is no map.
    """
    if not panels:
        raise UsageError("no map to compare", remedy="run foveate attribute RUN first")
    total = len(panels) + 1
    rows = math.ceil(total / columns)
    columns = math.ceil(total / rows)  # rows of equal length
    ratio = panels[0].image.shape[0] / panels[0].image.shape[1]
    figure = blank(2.5 * columns, rows * (1.85 * ratio + 0.45) + 1.3)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    show_photo(axes[0], panels[0])
    outline_visible(axes[0], panels[0])
    axes[0].set_title("picture")
    for axis in axes[total:]:
        axis.set_axis_off()
    for axis, panel in zip(axes[1:], panels, strict=False):
        colours = choose_scale(panel, scale, "attribution")
        show_photo(axis, panel, grey=True)
        colour_bar(axis, show_map(axis, panel, colours, alpha=True), colours, shrink=0.85)
        axis.set_title(panel.title)
    words = "each panel has the scale of its colour bar: × uniform compares between panels"
    if any(panel.signed for panel in panels):
        words += ", signed maps (red for, blue against) each have their own range and do not"
    return finish(figure, title or rule.model, str(rule), words, "cells unsmoothed")
