"""A page of samples chosen by a rule that is printed on it.

Which samples a figure shows decides what its reader believes, so the choice is a seeded function of the
data: ``diverse`` (farthest-point sampling, Gonzalez 1985, Theor. Comput. Sci. 38:293) or ``extremes``
(the highest and the lowest of a statistic, with rank and value under each).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from foveate.errors import UsageError
from foveate.render.panel import Panel, Rule, colour_bar, show_map, show_photo
from foveate.render.scale import Scale, check_name, per_image, shared
from foveate.render.style import Picture, blank, drawn, finish

THUMBNAIL = 8  # pixels a side of the picture features


@dataclass(frozen=True)
class Choice:
    """Positions chosen out of ``total``, a note for each (rank and value), and the rule in words."""

    positions: tuple[int, ...]
    notes: tuple[str, ...]
    rule: str


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """What makes two pictures alike here: 8 x 8 mean colours, float64 ``(192,)`` in [0, 1]."""
    from PIL import Image

    small = Image.fromarray(image).convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return np.asarray(small, np.float64).ravel() / 255.0


def diverse(features: ArrayLike, count: int, *, seed: int = 0) -> Choice:
    """Farthest-point sampling: a seeded first sample, then always the one farthest from all chosen.

    ``features`` float ``(sample, feature)``, Euclidean distance; ties go to the first.
    """
    points = np.asarray(features, np.float64)
    _need(len(points), count)
    chosen = [int(np.random.default_rng(seed).integers(len(points)))]
    distance = np.linalg.norm(points - points[chosen[0]], axis=1)
    while len(chosen) < min(count, len(points)):
        distance[chosen] = -1.0
        chosen.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(points - points[chosen[-1]], axis=1))
    rule = (
        f"{len(chosen)} of {len(points)} samples, chosen for diversity: farthest-point sampling of "
        f"{THUMBNAIL} × {THUMBNAIL} thumbnails, seed {seed}"
    )
    return Choice(tuple(chosen), ("",) * len(chosen), rule)


def extremes(values: ArrayLike, count: int, *, name: str) -> Choice:
    """The ``count // 2`` highest and as many lowest finite values, each with rank and value; ties by order."""
    array = np.asarray(values, np.float64)
    finite = np.flatnonzero(np.isfinite(array))
    _need(finite.size, count)
    order = finite[np.argsort(-array[finite], kind="stable")]
    half = min(count, finite.size) // 2 or 1
    ranks = [*range(half), *range(max(half, finite.size - half), finite.size)]
    notes = tuple(f"rank {rank + 1}, {name} {array[order[rank]]:.3g}" for rank in ranks)
    rule = f"the {half} highest and {len(ranks) - half} lowest of {finite.size} samples by {name}"
    return Choice(tuple(int(order[rank]) for rank in ranks), notes, rule)


@drawn
def grid(
    panels: Sequence[Panel],
    choice: Choice,
    rule: Rule,
    *,
    title: str = "",
    scale: str = "lift",
    unit: str = "attention",
    columns: int = 4,
) -> Picture:
    """Pairs of picture and overlay, one a chosen sample, on one scale unless ``per-image`` is asked for."""
    _need(len(panels), 1)
    scales = _scales(panels, scale, unit)
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    ratio = float(np.median([panel.image.shape[0] / panel.image.shape[1] for panel in panels]))
    cell = 11.0 / (2 * columns) if columns > 1 else 3.0
    figure = blank(min(2 * columns * cell, 11.0) + 1.0, rows * (0.93 * cell * ratio + 0.36) + 1.3)
    axes = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    meshes = []
    for i, (panel, colours) in enumerate(zip(panels, scales, strict=True)):
        photo, overlay = axes[i // columns, 2 * (i % columns) : 2 * (i % columns) + 2]
        show_photo(photo, panel)
        show_photo(overlay, panel, grey=True)
        meshes.append(show_map(overlay, panel, colours, alpha=True))
        for axis in (photo, overlay):
            axis.set_axis_on()
        lines = (_fit(panel.title, int(2 * cell * 16)), choice.notes[i])
        photo.set_title("\n".join(line for line in lines if line), fontsize=7.5)
    colour_bar(list(axes.flat), meshes[0], scales[0], shrink=min(1.0, 3.0 / figure.get_figheight() + 0.3))
    return finish(figure, title or rule.model, str(rule), choice.rule, scales[0].words, "cells unsmoothed")


def _scales(panels: Sequence[Panel], name: str, unit: str) -> list[Scale]:
    """One scale a panel; the same object unless each has its own range."""
    if check_name(name) == "per-image":
        return [per_image(panel.values, unit) for panel in panels]
    kind = "signed" if any(panel.signed for panel in panels) else name
    return [shared(kind, [panel.values for panel in panels], unit)] * len(panels)


def _fit(text: str, characters: int) -> str:
    """``text`` without its middle where it is longer than there is room for."""
    if len(text) <= characters:
        return text
    tail = (characters - 1) // 2
    return f"{text[: characters - 1 - tail]}…{text[-tail:]}"


def _need(have: int, count: int) -> None:
    if have < 1 or count < 1:
        raise UsageError(f"a page of samples needs at least one: {have} available, {count} asked for")
