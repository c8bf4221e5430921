"""Deletion on a single picture, where the model is fast enough: a warning light, never evidence.

One number for the order of a map beside the range over random orders. With n = 1 there is no interval and no
verdict; ``foveate faithfulness`` is the real test.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.attribution.objective import Objective
    from foveate.geometry import CellGrid
    from foveate.interfaces import AttentionSource, Batch, BoundTarget

ORDERS = 8
STEPS = 5
WARM_UP = 3.0
"""A first forward pass shorter than this (seconds) is timed again before the check is given up."""
BUDGET = 8.0
"""Seconds that the check may take; it is left out where it would take longer."""


@dataclass(frozen=True)
class Check:
    """Area under the score while cells vanish; lower means that what matters was found earlier.

    ``row`` in the order of the map, ``random`` the mean, ``low`` and ``high`` the range over ``orders``
    random orders. ``skipped`` says why there is no number.
    """

    row: float = float("nan")
    random: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    orders: int = 0
    skipped: str = ""


def quick_check(
    source: AttentionSource,
    batch: Batch,
    bound: BoundTarget,
    values: NDArray[np.float64],
    grid: CellGrid,
    *,
    forward: float,
) -> Check:
    """Delete the cells of one picture (replaced by its mean colour) in the order of a map and at random.

    ``values`` ``(row, column)`` on ``grid`` (input pixels), for the first row of ``bound``. ``forward`` is the
    seconds that a first forward pass took; only whether the check fits BUDGET depends on the clock.
    """
    from foveate.attribution.objective import Objective
    from foveate.faithfulness.curves import Protocol, forward_count, perturbation_curves
    from foveate.faithfulness.orders import cell_order, random_maps, to_cells

    if not len(bound):
        return Check(skipped="no object is above the threshold, so there is no target")
    objective = Objective(source, batch, bound).take([0])
    cells = source.cells(batch)
    ours = to_cells(values[None], grid, cells)
    protocol = Protocol(("mean",), (bound.scale,), STEPS)
    pictures = forward_count(1, ORDERS, ours.shape[-1], protocol)
    if WARM_UP > forward > BUDGET / pictures:
        forward = _seconds_a_forward(objective)  # a first pass of a small model is mostly warm-up
    cost = forward * pictures
    if cost > BUDGET:
        return Check(skipped=f"its {pictures} forward passes would take about {cost:.0f} s")
    name = batch.ids[bound.rows[0].sample]
    maps = np.concatenate([ours, random_maps(name, ours.shape[-1], orders=ORDERS, seed=0)])
    orders = cell_order(maps[:, None], [name], seed=0)
    areas = perturbation_curves(objective, orders, cells, protocol).areas[:, 0, 0, 0, 0]  # deletion
    others = areas[1:]
    return Check(float(areas[0]), float(others.mean()), float(others.min()), float(others.max()), ORDERS)


def _seconds_a_forward(objective: Objective) -> float:
    import torch

    with torch.no_grad():
        began = time.perf_counter()
        objective(objective.inputs)
    return time.perf_counter() - began
