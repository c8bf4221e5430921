"""A clip at a glance: some of its frames with maps laid over them, and how the mass is spread over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import Scale, check_name, per_image, shared
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_COLOURS = {"attention": "#3b528b", "rollout": "#5dc863"}


@drawn
def film(
    panels: Mapping[str, Panel],
    rule: Rule,
    mass: Mapping[str, NDArray[np.float64]],
    *,
    title: str,
    caveats: Sequence[str] = (),
    scale: str = "lift",
) -> Picture:
    """One row of frames a kind of map, all on one scale, and the mass of every frame cell.

    ``panels`` are named ``KIND, FRAME``; the first is of the row that ``rule`` describes. ``mass`` holds
    ``(frame cell,)`` for kinds whose frames can be compared: what the map adds up to there. Raises UsageError for
    an unknown scale.
    """
    names = dict.fromkeys(name.partition(", ")[0] for name in panels)
    kinds = {kind: [p for name, p in panels.items() if name.startswith(f"{kind}, ")] for kind in names}
    own = check_name(scale) == "per-image"
    columns = max(len(row) for row in kinds.values())
    first = next(iter(panels.values()))
    ratio = first.image.shape[0] / first.image.shape[1]
    width = max(1.75 * columns + 0.9, 6.0)
    height = (1.75 * ratio + 0.3) * len(kinds) + 1.6 + 0.16 * len(caveats)
    figure = blank(width, min(max(height, 3.3), 14.0))
    axes = figure.subplots(
        len(kinds) + 1,
        columns,
        squeeze=False,
        height_ratios=[ratio] * len(kinds) + [0.45],
        gridspec_kw={"hspace": 0.1},
    )
    for line, (kind, row) in zip(axes, kinds.items(), strict=False):  # the last line is the curve's
        values = [panel.values for panel in row]
        colours = per_image(np.stack(values)) if own else shared(scale, values)
        _strip(line, row, colours, kind)
    if mass:
        for spare in axes[-1]:
            spare.remove()
        _over_time(figure.add_subplot(axes[-1][0].get_gridspec()[-1, :]), mass)
    sentences = [str(rule), _scale(scale, kinds).words, "cells at their exact edges, unsmoothed"]
    if first.hidden_share > 1e-9:
        sentences.append(f"outlined: what the model saw, without {first.hidden_share:.0%} of each frame")
    return finish(figure, title, *sentences, bullets=caveats)


def _scale(scale: str, kinds: Mapping[str, Sequence[Panel]]) -> Scale:
    values = [panel.values for panel in next(iter(kinds.values()))]
    return per_image(np.stack(values)) if scale == "per-image" else shared(scale, values)


def _strip(line: Sequence[Axes], row: Sequence[Panel], colours: Scale, kind: str) -> None:
    mesh = None
    for axis, panel in zip(line, row, strict=False):
        show_photo(axis, panel, grey=True)
        mesh = show_map(axis, panel, colours, alpha=True)
        outline_visible(axis, panel)
        axis.set_title(panel.title)
    for axis in line[len(row) :]:
        axis.remove()
    line[0].set_ylabel(kind)
    if mesh is not None:
        colour_bar(list(line[: len(row)]), mesh, colours, shrink=0.9)


def _over_time(axes: Axes, mass: Mapping[str, NDArray[np.float64]]) -> None:
    """What each frame cell gets of all that lies on patches, beside an even share."""
    for kind, values in mass.items():
        share = values / values.sum() if values.sum() > 0 else values
        axes.plot(np.arange(len(share)), share, "o-", color=_COLOURS.get(kind, "black"), ms=3, lw=1.2, label=kind)
    count = len(next(iter(mass.values())))
    axes.axhline(1 / count, color="black", lw=0.8, ls=":", label="even")
    top = max(float(axes.get_ylim()[1]), 2 / count)
    axes.set(xlabel="frame cell", ylabel="share of mass", ylim=(0, 1.05 * top))
    axes.locator_params(axis="x", integer=True)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 0.95), ncols=3, frameon=False, fontsize=7)
