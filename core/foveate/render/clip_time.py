"""Figures over the frames of a clip: ribbon, frame-to-frame matrix, importance, film strip, cues.

Time runs from left to right in all of them. Numbers of attention are shown against what uniform attention would
give, on the fixed scale of :mod:`foveate.render.scale`; numbers over videos with their intervals and n.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import UsageError
from foveate.render.clip_overlay import Overlay, compose
from foveate.render.scale import lift
from foveate.render.style import Picture, blank, drawn, finish

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike, NDArray

    from foveate.stats.intervals import Interval

MOST_FRAMES = 12
"""Frames that a strip shows; of a longer clip evenly chosen ones, and the caption says so."""
STRIP = 320
"""Pixels of a frame in a film strip: names of tracks stay readable where it is small."""
GREY, BLUE, RED = "0.45", "#3b528b", "#e8590c"


@drawn
def ribbon(
    lifts: ArrayLike,
    rows: Sequence[str],
    frames: Sequence[NDArray[np.uint8]],
    *,
    title: str,
    source: str,
    times: Sequence[float] = (),
) -> Picture:
    """Where in time each row looks: the clip's frames above, one band a row below, coloured by lift.

    ``lifts`` ``(row, frame)`` is mass on each frame over what uniform attention gives it; NaN (the track is not
    there) is white. ``frames`` are thumbnails, one a column. Raises UsageError where counts differ.
    """
    table = np.asarray(lifts, np.float64)
    if table.shape != (len(rows), len(frames)) or not table.size:
        raise UsageError(f"ribbon: {table.shape} values for {len(rows)} rows and {len(frames)} frames")
    shown = _chosen(len(frames))
    ratio = frames[0].shape[0] / frames[0].shape[1]
    width = 9.0
    figure = blank(width, width / len(shown) * ratio + 0.34 * len(rows) + 1.9)
    top, below = figure.subplots(2, 1, height_ratios=[width / len(shown) * ratio, 0.34 * len(rows) + 0.25])
    strip = np.concatenate([frames[i] for i in shown], axis=1)
    top.imshow(strip, extent=(-0.5, len(frames) - 0.5, 1, 0), aspect="auto", interpolation="nearest")
    top.set(xticks=[], yticks=[])
    scale = lift()
    painted = np.ma.masked_invalid(scale.paint(table, 1.0))
    mesh = below.pcolormesh(
        np.arange(len(frames) + 1) - 0.5, np.arange(len(rows) + 1) - 0.5, painted, norm=scale.norm, cmap=scale.cmap
    )
    below.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.5, len(frames) - 0.5))
    below.set_yticks(range(len(rows)), list(rows))
    _time_ticks(below, len(frames), times)
    _bar(figure, [top, below], mesh, scale)
    picked = "" if len(shown) == len(frames) else f"{len(shown)} of {len(frames)} frames shown above"
    missing = "white: the track is not there" if np.isnan(table).any() else ""
    return finish(figure, title, source, scale.words, picked, missing)


@drawn
def frame_matrices(
    lifts: Mapping[str, ArrayLike], *, title: str, source: str, n: int, columns: int = 4
) -> Picture:
    """Frame-to-frame attention, one matrix a name (layer): query frame down, attended frame across, mean over n.

    Values are lift against uniform attention. Raises UsageError where a matrix is not square or there is none.
    """
    tables = {name: np.asarray(values, np.float64) for name, values in lifts.items()}
    if not tables or any(t.ndim != 2 or t.shape[0] != t.shape[1] for t in tables.values()):
        raise UsageError(f"frame matrices: expected square matrices, got {[t.shape for t in tables.values()]}")
    rows = -(-len(tables) // columns)
    across = -(-len(tables) // rows)
    figure = blank(2.3 * across + 1.1, 2.3 * rows + 1.2)
    axes = figure.subplots(rows, across, squeeze=False)
    scale = lift()
    for axis, (name, table) in zip(axes.flat, tables.items(), strict=False):
        painted = np.ma.masked_invalid(scale.paint(table, 1.0))
        mesh = axis.imshow(painted, norm=scale.norm, cmap=scale.cmap, interpolation="nearest")
        axis.set_title(name)
        _sparse_ticks(axis, len(table))
        axis.set_xlabel("attended frame")
    for row in axes:
        row[0].set_ylabel("query frame")
    for axis in axes.flat[len(tables) :]:
        axis.set_axis_off()
    _bar(figure, list(axes.flat), mesh, scale)
    words = f"mean over {n} video{'s' * (n != 1)}"
    return finish(figure, title, source, scale.words, words, "mass between frames does not show use of motion")


@dataclass(frozen=True, eq=False)
class Band:
    """A line over frames or steps with its interval: ``mean``, ``low``, ``high`` (step,), NaN where unknown."""

    name: str
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    control: bool = False

    @classmethod
    def over(cls, name: str, values: ArrayLike, *, control: bool = False, seed: int = 0) -> Band:
        """Mean and bootstrap interval over videos of ``values (video, step)``; the bootstrap is pointwise."""
        from foveate.stats.intervals import bootstrap_mean

        table = np.asarray(values, np.float64)
        spans = [bootstrap_mean(column, seed=seed) for column in table.T]
        mean, low, high = (np.array([getattr(s, part) for s in spans]) for part in ("estimate", "low", "high"))
        return cls(name, mean, low, high, control)


@drawn
def importance(
    shares: Sequence[Band],
    deletion: Sequence[Band] = (),
    *,
    title: str,
    source: str,
    times: Sequence[float] = (),
) -> Picture:
    """Frame importance over time and, beside it, what the score does while the most important frames go.

    ``shares`` are lines over frames (as lift: 1 is even), ``deletion`` lines over the share of frames removed.
    Raises UsageError where there is no line.
    """
    if not shares:
        raise UsageError("importance: there is no line to draw")
    panels = 2 if deletion else 1
    figure = blank(4.6 * panels + 0.6, 3.5)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for band, colour in zip(shares, _colours(shares), strict=True):
        _line(axes[0], np.arange(band.mean.size), band, colour)
    axes[0].axhline(1.0, color="0.3", lw=0.8, ls="--", zorder=0)
    axes[0].set(ylabel="importance, times even", ylim=(0, None))
    _time_ticks(axes[0], shares[0].mean.size, times)
    axes[0].legend(fontsize=8)
    if deletion:
        for band, colour in zip(deletion, _colours(deletion), strict=True):
            _line(axes[1], np.linspace(0, 1, band.mean.size), band, colour)
        axes[1].set(xlabel="share of frames removed, most important first", ylabel="score")
        axes[1].legend(fontsize=8)
    faster = "a faithful order falls faster than random" if deletion else ""
    return finish(figure, title, source, "bands: 95 % bootstrap intervals over videos, frame by frame", faster)


@drawn
def evolution(
    series: Sequence[Band], *, title: str, source: str, unit: str, changes: Sequence[float] = (), times: Any = ()
) -> Picture:
    """A metric over frames with its change points as dashed lines."""
    if not series:
        raise UsageError("evolution: there is no line to draw")
    figure = blank(7.0, 3.3)
    axis = figure.subplots()
    for band, colour in zip(series, _colours(series), strict=True):
        _line(axis, np.arange(band.mean.size), band, colour)
    for change in changes:
        axis.axvline(change - 0.5, color=RED, lw=1.0, ls="--")
    axis.set(ylabel=unit)
    _time_ticks(axis, series[0].mean.size, times)
    axis.legend(fontsize=8)
    told = f"dashed: {len(changes)} change point{'s' * (len(changes) != 1)}" if changes else "no change point"
    return finish(figure, title, source, told)


@drawn
def film_strip(
    frames: Sequence[NDArray[np.uint8]],
    overlay: Overlay,
    *,
    title: str,
    source: str,
    labels: Sequence[str] = (),
    columns: int = 6,
) -> Picture:
    """Frames of a clip with the map and the track of ``overlay``, all on one scale; its own title and caption are
    replaced by the figure's. Raises UsageError without a frame."""
    if not len(frames):
        raise UsageError("film strip: there is no frame to draw")
    bare = Overlay(overlay.scale, overlay.map, overlay.tracks, grey=overlay.grey, size=STRIP)
    made = list(compose(frames, bare))
    height = _picture_height(frames[0], STRIP)
    shown = _chosen(len(made), 2 * columns)
    rows = -(-len(shown) // columns)
    across = -(-len(shown) // rows)
    ratio = frames[0].shape[0] / frames[0].shape[1]
    figure = blank(1.75 * across + 0.9, rows * (1.75 * ratio + 0.3) + 1.0)
    axes = figure.subplots(rows, across, squeeze=False)
    for axis, number in zip(axes.flat, shown, strict=False):
        axis.imshow(made[number][:height], interpolation="nearest")
        axis.set_title(labels[number] if number < len(labels) else f"frame {number}", fontsize=8)
        axis.set(xticks=[], yticks=[])
    for axis in axes.flat[len(shown) :]:
        axis.set_axis_off()
    if overlay.map is not None:
        from matplotlib.cm import ScalarMappable

        _bar(figure, list(axes.flat), ScalarMappable(overlay.scale.norm, overlay.scale.cmap), overlay.scale)
    picked = "" if len(shown) == len(made) else f"{len(shown)} of {len(made)} frames"
    words = overlay.scale.words if overlay.map is not None else ""
    return finish(figure, title, source, words, "one scale over the clip" if words else "", picked)


@drawn
def cues(
    effects: Mapping[str, Mapping[str, Interval]], verdicts: Mapping[str, str], *, title: str, source: str
) -> Picture:
    """Shapley values of appearance and motion and their interaction, one group a row (model, class, task).

    ``effects``: row -> effect -> interval over videos. The verdict stands at the right of its row. Raises
    UsageError where rows differ or there is none.
    """
    if not effects or set(effects) != set(verdicts):
        raise UsageError(f"cues: effects of {list(effects)}, verdicts of {list(verdicts)}")
    names = list(next(iter(effects.values())))
    figure = blank(2.6 + 2.3 * len(names), 0.42 * len(effects) + 1.9)
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for place, row in enumerate(effects.values()):
            span = row[name]
            there = span.excludes(0.0)
            axis.plot([span.low, span.high], [place, place], color=BLUE if there else GREY, lw=1.8)
            axis.plot(span.estimate, place, "o", color=BLUE if there else GREY, ms=5, mfc=BLUE if there else "w")
        axis.axvline(0.0, color="0.3", lw=0.8, ls="--", zorder=0)
        axis.set_title(name)
        axis.grid(axis="y", color="0.92", lw=0.6)
    axes[0].set_yticks(range(len(effects)), [f"{row} (n = {_n(effects[row])})" for row in effects])
    axes[0].set_ylim(len(effects) - 0.4, -0.6)
    for place, label in enumerate(effects):
        style: dict[str, Any] = {"va": "center", "fontsize": 8, "color": "0.2"}
        axes[-1].annotate(verdicts[label], (1.03, place), xycoords=("axes fraction", "data"), **style)
    filled = "filled: the interval over videos excludes 0"
    return finish(figure, title, source, filled)


def _n(row: Mapping[str, Interval]) -> int:
    return next(iter(row.values())).n


def _chosen(frames: int, most: int = MOST_FRAMES) -> list[int]:
    """Evenly chosen frames, the first and the last among them."""
    if frames <= most:
        return list(range(frames))
    return [int(i) for i in np.linspace(0, frames - 1, most).round()]


def _picture_height(frame: NDArray[np.uint8], size: int) -> int:
    from foveate.render.clip_overlay import shown_size

    return shown_size(frame.shape[0], frame.shape[1], size)[0]


def _line(axis: Axes, x: NDArray[Any], band: Band, colour: str) -> None:
    axis.plot(x, band.mean, color=colour, lw=1.6, ls=":" if band.control else "-", label=band.name, marker=".")
    axis.fill_between(x, band.low, band.high, color=colour, alpha=0.18, lw=0)


def _colours(bands: Sequence[Band]) -> list[str]:
    from foveate.render.detection import COLOURS

    own = iter(COLOURS * (1 + len(bands) // len(COLOURS)))
    return [GREY if band.control else next(own) for band in bands]


def _time_ticks(axis: Axes, frames: int, times: Sequence[float]) -> None:
    known = len(times) == frames and bool(np.isfinite(np.asarray(times, np.float64)).all())
    chosen = _chosen(frames, 9)
    axis.set_xticks(chosen, [f"{times[i]:.2f}" if known else str(i) for i in chosen])
    axis.set_xlabel("time in s" if known else "frame")


def _sparse_ticks(axis: Axes, frames: int) -> None:
    chosen = _chosen(frames, 6)
    axis.set_xticks(chosen, [str(i) for i in chosen])
    axis.set_yticks(chosen, [str(i) for i in chosen])


def _bar(figure: Figure, axes: list[Axes], mesh: Any, scale: Any) -> None:
    extend = "both" if scale.name == "lift" else "neither"
    bar = figure.colorbar(mesh, ax=axes, extend=extend, pad=0.02, aspect=25)
    if scale.ticks is not None:
        bar.set_ticks(list(scale.ticks), labels=list(scale.ticks.values()))
    bar.set_label(scale.label)
