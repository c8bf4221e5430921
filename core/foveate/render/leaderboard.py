"""Scores of methods and controls as dots with intervals over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.errors import UsageError
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_METHOD, _CONTROL, _UNRANKED = "#3b528b", "0.45", "#e8590c"


@dataclass(frozen=True)
class Score:
    """One row: the mean over images and its interval. ``role``: "method", "control" or "unranked"."""

    name: str
    value: float
    low: float
    high: float
    role: str = "method"
    note: str = ""
    """Printed at the right edge: verdict, or why the row is not ranked."""


@dataclass(frozen=True)
class Column:
    """One statistic for all rows. ``reference`` is where a dashed line goes (random order, zero)."""

    label: str
    scores: Sequence[Score]
    reference: float | None = None
    reference_label: str = ""


@drawn
def leaderboard(columns: Sequence[Column], *, title: str, caption: str) -> Picture:
    """One panel a statistic, rows in the order of the first column, methods and controls told apart.

    ``caption`` must say n, target, protocol and interval. Raises UsageError where rows differ.
    """
    if not columns or not columns[0].scores:
        raise UsageError("no score to draw", remedy="run foveate faithfulness RUN first")
    names = [score.name for score in columns[0].scores]
    for column in columns:
        if [score.name for score in column.scores] != names:
            raise UsageError(f"leaderboard: column {column.label!r} has other rows than {columns[0].label!r}")
    figure = blank(3.0 + 2.9 * len(columns), max(3.0, 0.3 * len(names) + 1.9))
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        for place, score in enumerate(column.scores):
            colour, marker = _look(score.role)
            axis.plot([score.low, score.high], [place, place], color=colour, lw=1.6, solid_capstyle="butt")
            axis.plot(
                score.value, place, marker, color=colour, ms=5, mfc=colour if score.role == "method" else "w"
            )
        if column.reference is not None:
            axis.axvline(column.reference, color="0.3", lw=0.8, ls="--", zorder=0)
        axis.set_xlabel(column.label)
        axis.grid(axis="y", color="0.92", lw=0.6)
        axis.set_axisbelow(True)
        axis.set_title(column.reference_label, fontsize=8, color="0.3")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    _notes(axes[-1], columns[-1].scores)
    roles = {score.role for score in columns[0].scores}
    key = [text for role, text in _KEY.items() if role in roles]
    return finish(figure, title, caption, *key)


_KEY = {
    "method": "filled dots: methods",
    "control": "open grey dots: controls (reference maps)",
    "unranked": "open orange squares: not ranked",
}


def _look(role: str) -> tuple[str, str]:
    return {"method": (_METHOD, "o"), "control": (_CONTROL, "o")}.get(role, (_UNRANKED, "s"))


def _notes(axes: Axes, scores: Sequence[Score]) -> None:
    style: dict[str, Any] = {"va": "center", "fontsize": 7.5, "color": "0.3"}
    for place, score in enumerate(scores):
        if score.note:
            axes.annotate(score.note, (1.02, place), xycoords=("axes fraction", "data"), **style)
