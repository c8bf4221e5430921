"""One query row in every layer and head, as one mosaic on one scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.render.panel import Panel, Rule, colour_bar, outline_visible, show_photo
from foveate.render.scale import check_name, shared
from foveate.render.style import Picture, blank, drawn, finish

GAP = 0.12  # between tiles, in tiles


@drawn
def matrix(
    panel: Panel,
    values: NDArray[np.floating],
    layers: Sequence[int],
    heads: Sequence[str],
    rule: Rule,
    *,
    title: str = "",
    scale: str = "lift",
    unit: str = "attention",
) -> Picture:
    """The photo beside a mosaic with one tile a layer (down) and head (across).

    ``values`` float ``(layer, head, row, column)`` on the cells of ``panel.grid``; ``panel`` gives the
    photo, the geometry and the uniform level. ``layers`` are true layer numbers. All tiles share one
    scale; ``per-image`` is refused. Raises UsageError where counts do not fit.
    """
    if values.shape != (len(layers), len(heads), *panel.grid.shape):
        raise UsageError(
            f"layer x head matrix: values are {values.shape}, expected "
            f"{(len(layers), len(heads), *panel.grid.shape)} for the layers, heads and grid given"
        )
    if check_name(scale) == "per-image":
        raise UsageError(
            "a layer x head matrix on per-image scales would not compare",
            remedy="choose lift, linear or signed",
        )
    colours = shared(scale, [values], unit)
    rows, columns = panel.grid.shape
    mosaic, down, across = tile(np.asarray(values, np.float64))
    side = float(np.clip(8.0 / max(len(heads), 4), 0.45, 0.9))  # inches a tile
    aspect = rows / columns
    figure = blank(3.2 + len(heads) * side + 1.0, max(3.0, len(layers) * side * aspect + 1.4))
    left, right = figure.subplots(1, 2, width_ratios=[2.6, max(len(heads) * side, 1.6)])
    show_photo(left, panel)
    outline_visible(left, panel)
    left.set_title("picture")
    painted = np.ma.masked_invalid(colours.paint(mosaic, panel.uniform))
    right.set_facecolor("white")
    mesh = right.pcolormesh(painted, norm=colours.norm, cmap=colours.cmap, antialiased=False, rasterized=True)
    right.set(aspect="equal", ylim=(mosaic.shape[0], 0), xlabel="head", ylabel="layer")
    right.set_yticks(down, [str(layer) for layer in layers])
    right.set_xticks(across, list(heads))
    right.tick_params(length=0)
    for spine in right.spines.values():
        spine.set_visible(False)
    colour_bar(right, mesh, colours)
    missing = "white inside a tile: not captured" if np.isnan(values).any() else ""
    tiles = "each tile: the cells of the model's input, unsmoothed"
    return finish(figure, title or rule.model, str(rule), colours.words, tiles, missing)


def tile(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[float], list[float]]:
    """``(layer, head, row, column)`` as one array with NaN gaps, and the tile centres down and across."""
    layers, heads, rows, columns = values.shape
    gap = max(1, round(GAP * max(rows, columns)))
    padded = np.full((layers, heads, rows + gap, columns + gap), np.nan)
    padded[..., :rows, :columns] = values
    mosaic = padded.transpose(0, 2, 1, 3).reshape(layers * (rows + gap), heads * (columns + gap))
    down = [i * (rows + gap) + rows / 2 for i in range(layers)]
    across = [j * (columns + gap) + columns / 2 for j in range(heads)]
    return mosaic[:-gap, :-gap], down, across
