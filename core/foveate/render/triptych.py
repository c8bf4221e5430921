"""Picture, map, and map over picture: the first look at any explanation."""

from __future__ import annotations

from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import Scale, check_name, per_image, shared
from foveate.render.style import Picture, blank, drawn, finish


@drawn
def triptych(
    panel: Panel, rule: Rule, *, title: str = "", scale: str = "lift", unit: str = "attention"
) -> Picture:
    """The picture with the visible region outlined, the map on its canvas, and both.

    ``scale`` is one of :data:`foveate.render.scale.NAMES`; signed maps are always drawn signed.
    Raises UsageError for an unknown scale.
    """
    colours = choose_scale(panel, scale, unit)
    ratio = panel.image.shape[0] / panel.image.shape[1]
    width = 10.5
    figure = blank(width, min(max(width * 0.29 * ratio + 1.3, 2.8), 9.0))
    axes = list(figure.subplots(1, 3))
    show_photo(axes[0], panel)
    outline_visible(axes[0], panel)
    mesh = show_map(axes[1], panel, colours)
    show_photo(axes[2], panel, grey=True)
    show_map(axes[2], panel, colours, alpha=True)
    outline_visible(axes[2], panel)
    height, across = panel.image.shape[:2]
    for axis, name in zip(
        axes, (f"picture, {across} × {height} px", panel.title or "map", "overlay"), strict=True
    ):
        axis.set_title(name)
    colour_bar(axes, mesh, colours)
    return finish(figure, title or rule.model, *caption(panel, rule, colours))


def choose_scale(panel: Panel, name: str, unit: str) -> Scale:
    """The scale for a single panel."""
    if panel.signed:
        return shared("signed", [panel.values], unit)
    return per_image(panel.values, unit) if check_name(name) == "per-image" else shared(name, [panel.values], unit)


def caption(panel: Panel, rule: Rule, scale: Scale) -> list[str]:
    """Rule, scale, and what the picture cannot show."""
    sentences = [str(rule), scale.words, "cells at their exact edges, unsmoothed"]
    if panel.outside == panel.outside:
        sentences.append(f"{panel.outside:.0%} of the row's mass on tokens without a place (CLS, registers)")
    if panel.hidden_share > 1e-9:
        sentences.append(f"hatched: {panel.hidden_share:.0%} of the picture that the model did not see")
    return sentences
