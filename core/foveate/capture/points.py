"""Sampling points of the rows kept: where, with which weight, on which level, inside the picture or not.

A splatted row says how much each cell was read. The points say how: a head's pattern around its reference, its
reach over levels, and what it tried to read outside. They are also far fewer numbers: 3 a point against a row
over a whole pyramid.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.deformable import DeformableRecord, Gathered, Level
from foveate.capture.labels import call_weights
from foveate.capture.records import Record, as_index
from foveate.capture.selection import Selection
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallLabels, Site, SitePlan, TokenAxis

POINTS = "points"
"""The name in ``SitePlan.reductions``."""
ARRAYS = ("location", "weight", "inside", "level", "reference")


def check_points(site: Site, plan: SitePlan) -> None:
    """Raise UsageError where a plan asks for the points of a site that has none, or for their mean over heads."""
    if POINTS not in plan.reductions:
        return
    if site.form != "deformable":
        raise UsageError(
            f"capture plan: {site.id} attends densely and has no sampling points",
            remedy="ask for points of deformable sites only",
        )
    if plan.heads == "mean":
        raise UsageError(
            f"capture plan: sampling points of {site.id} have no mean over heads", remedy="heads='keep'"
        )


def points(record: DeformableRecord, index: Positions) -> dict[str, Tensor]:
    """Points of some queries.

    ``location`` float32 ``(batch, head, row, point, 2)``: (y, x) as fractions of the level's extent, 0 and 1 at
    its borders; ``weight`` float32, ``inside`` bool and ``level`` int32 ``(batch, head, row, point)``. Points
    lie level by level in the order of the model; weights of a head sum to 1 over all of them. ``inside`` is
    False where a point lies beyond a border. (Up to half a cell within one, a part of its bilinear share is lost
    nevertheless.)
    """
    batch, heads, queries = record.weights.shape[:3]
    places = [_fractions(level, (batch, heads, queries))[:, :, index] for level in record.levels]
    location = torch.cat(places, -2).float()
    weight = record.weights[:, :, index].float()
    inside = ((location >= 0) & (location <= 1)).all(-1)
    number = torch.cat([torch.full((part.shape[-2],), i, dtype=torch.int32) for i, part in enumerate(places)])
    return {
        "location": location,
        "weight": weight,
        "inside": inside,
        "level": number.to(location.device).expand(weight.shape),
    }


def kept_points(
    record: Record, selection: Selection, labels: CallLabels | None, where: str, reference: Tensor | None = None
) -> dict[str, Tensor]:
    """:func:`points` of the rows that ``selection`` keeps, on the CPU, with their ``reference (batch, row, 4)``.

    ``reference`` is that of all queries, ``(batch, query, 4)`` (:mod:`foveate.capture.references`); left out where
    the module was told none.

    Raises CaptureError for a call without points (rows that an intervention made anew) and UsageError for a
    readout that mixes several rows.
    """
    if not isinstance(record, DeformableRecord):
        raise CaptureError(
            f"capture: {where} ran without sampling points", remedy="leave 'points' out where Replace acts"
        )
    if selection.weights is None:
        index = slice(None) if selection.rule == "all" else as_index(selection.index, record.device)
        own = index if isinstance(index, slice) else index.cpu()
        told = {} if reference is None else {"reference": reference[:, own]}
        return {name: array.cpu() for name, array in points(record, index).items()} | told
    weights = selection.weights.to(record.device)
    rows = weights if labels is None else call_weights(weights, labels)
    if bool(((rows > 0).sum(-1) > 1).any()):
        raise UsageError(
            f"capture plan: {where} is read from several queries at once, whose points have no mean",
            remedy="give rows= as query positions",
        )
    chosen = rows.argmax(-1)
    every = points(record, slice(None))
    at = torch.arange(len(chosen), device=record.device)
    kept = {name: array[at, :, chosen].unsqueeze(2).cpu() for name, array in every.items()}
    return kept if reference is None else kept | {"reference": reference[at.cpu(), chosen.cpu()].unsqueeze(1)}


def on_input(location: Tensor, level: Tensor, sizes: list[tuple[int, int]], keys: TokenAxis) -> Tensor:
    """Fractions of levels as (y, x) in pixels of the model's input, through the extents of the levels' cells."""
    origin, extent, cell = [], [], 0
    for rows, columns in sizes:
        height, width = float(keys.height[cell]), float(keys.width[cell])
        origin.append((float(keys.y[cell]) - height / 2, float(keys.x[cell]) - width / 2))
        extent.append((height * rows, width * columns))
        cell += math.prod((rows, columns))
    index = level.long()
    return torch.tensor(origin)[index] + location * torch.tensor(extent)[index]


def sizes_of(record: Record) -> list[tuple[int, int]]:
    """(rows, columns) of each level of a deformable record."""
    return [level.size for level in cast("DeformableRecord", record).levels]


def _fractions(level: Level | Gathered, axes: tuple[int, int, int]) -> Tensor:
    """(y, x) of all points of a level ``(batch, head, query, point, 2)``, 0 and 1 at its borders."""
    rows, columns = level.size
    if isinstance(level, Gathered):  # whole cells: their centres
        cells = level.cells.reshape(*axes, -1)
        return torch.stack([(cells // columns + 0.5) / rows, (cells % columns + 0.5) / columns], -1)
    grid = (level.grid.reshape(*axes, -1, 2).flip(-1).double() + 1) / 2
    if not level.align_corners:
        return grid
    size = torch.tensor([rows, columns], device=grid.device, dtype=grid.dtype)
    return (grid * (size - 1) + 0.5) / size
