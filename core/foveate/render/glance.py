"""The first look at one picture: what the model answers, what one row attends to, rollout, and caveats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_map, show_photo
from foveate.render.scale import check_name, per_image, shared
from foveate.render.style import Picture, blank, drawn, finish
from foveate.render.triptych import caption

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from foveate.interfaces import Prediction

ANSWERS = 5
_BAR = "#3b528b"


@drawn
def glance(
    panels: Sequence[Panel],
    rule: Rule,
    predictions: Sequence[Prediction],
    *,
    title: str,
    caveats: Sequence[str] = (),
    scale: str = "lift",
) -> Picture:
    """The picture, the first map by itself and laid over it, the other maps laid over it, the best answers.

    ``panels`` are non-negative maps of one picture, the first of them the attention row of ``rule``.
    ``caveats`` are printed below. Raises UsageError for an unknown scale.
    """
    first = panels[0]
    own = check_name(scale) == "per-image"
    scales = [per_image(panel.values) if own else shared(scale, [panel.values]) for panel in panels]
    ratio = first.image.shape[0] / first.image.shape[1]
    columns = 2 + len(panels) + bool(predictions)
    figure = blank(2.45 * columns + 0.8, min(max(2.25 * ratio + 1.5 + 0.16 * len(caveats), 3.3), 9.0))
    widths = [1.0] * (2 + len(panels)) + [0.6] * bool(predictions)
    axes = list(figure.subplots(1, columns, width_ratios=widths, squeeze=False)[0])
    show_photo(axes[0], first)
    outline_visible(axes[0], first)
    height, width = first.image.shape[:2]
    axes[0].set_title(f"picture, {width} × {height} px")
    mesh = show_map(axes[1], first, scales[0])
    axes[1].set_title(first.title)
    for axis, panel, colours in zip(axes[2:], panels, scales, strict=False):
        show_photo(axis, panel, grey=True)
        show_map(axis, panel, colours, alpha=True)
        outline_visible(axis, panel)
        axis.set_title(f"{panel.title}, overlay")
    colour_bar(axes[1 : 2 + len(panels)], mesh, scales[0], shrink=0.9)
    if predictions:
        _answers(axes[-1], predictions[:ANSWERS])
    return finish(figure, title, *caption(first, rule, scales[0]), bullets=caveats)


def _answers(axes: Axes, predictions: Sequence[Prediction]) -> None:
    """The best answers with their scores, longest bar on top."""
    for place, answer in enumerate(predictions):
        axes.barh(place, max(answer.score, 0.0), color=_BAR, height=0.32, align="edge")
        axes.text(0.0, place - 0.06, f"{_short(answer.label)}  {answer.score:.2f}", fontsize=8, va="bottom")
    axes.set(xlim=(0, max(1.0, *(answer.score for answer in predictions))), ylim=(ANSWERS - 0.4, -0.5), yticks=[])
    axes.set_xticks([0, 1])
    axes.set_title("answers (score)")
    axes.spines["left"].set_visible(False)


def _short(text: str, length: int = 24) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
