"""Panels for tests of pictures: everything in whole pixels, so that a rendered canvas can be checked exactly."""

from __future__ import annotations

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foveate.geometry import CellGrid, Geometry
from foveate.render.panel import Panel, Rule
from foveate.render.style import styled

ZOOM = 5
RULE = Rule("tiny", "attention of the readout row (cls), layer 1", 65)


def cropped_panel(values: np.ndarray | None = None, **changes: object) -> Panel:
    """80 x 120 pixels, scaled by 0.8 and cropped to 64 x 64: cells of 10 x 10, columns 20 to 100 are seen."""
    random = np.random.default_rng(0)
    image = random.integers(0, 256, (80, 120, 3), dtype=np.uint8)
    geometry = Geometry(80, 120, 64, 64, 0.8, 0.8, 0.0, -16.0)
    if values is None:
        values = random.random((8, 8)) / 64
    settings = {"uniform": 1 / 65, "title": "map"} | changes
    return Panel(image, geometry, values, CellGrid.regular(8, 8, height=64, width=64), **settings)


def rendered(draw, height: int = 80, width: int = 120) -> np.ndarray:
    """What ``draw(axes)`` paints, ZOOM device pixels a picture pixel: uint8 (y, x, 3) without frame."""
    with styled():
        figure = Figure(figsize=(width * ZOOM / 100, height * ZOOM / 100), dpi=100)
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        draw(axes)
        axes.set_axis_off()
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
