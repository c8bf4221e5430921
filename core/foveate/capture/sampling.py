"""Where deformable attention sampled: the points of one query, their weights, and the point they start from.

Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, eq. 3) reads values at K points on each of
L feature maps, placed around a reference point, with weights that sum to 1 over all L K points of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from foveate.capture.deformable import DeformableRecord, Gathered, Level
from foveate.capture.trace import Trace
from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, CallKey, TokenAxis


@dataclass(frozen=True, eq=False)
class SamplingPoints:
    """All points of one query, in pixels of the model's input.

    ``y``, ``x``, ``weight`` float64 ``(point,)``; ``level`` and ``head`` int64 ``(point,)``. Weights sum to 1
    over all points kept (heads are averaged). ``reference`` is (y, x), NaN where it is not known.
    """

    y: NDArray[np.float64]
    x: NDArray[np.float64]
    weight: NDArray[np.float64]
    level: NDArray[np.int64]
    head: NDArray[np.int64]
    reference: tuple[float, float] = (float("nan"), float("nan"))

    def inside(self, height: float, width: float) -> NDArray[np.bool_]:
        """Which points lie on an input of ``height x width`` pixels; the others read zeros, at least in part."""
        return (self.y >= 0) & (self.y <= height) & (self.x >= 0) & (self.x <= width)


def sampling_points(
    traced: Trace, call: CallKey, query: int, *, sample: int = 0, head: int | Literal["mean"] = "mean"
) -> SamplingPoints:
    """The points of one query in one call: of one head, or of all, their weights divided by the number of heads.

    Raises UsageError where the call is not deformable, or query or head do not exist.
    """
    record = traced.record(call)
    if not isinstance(record, DeformableRecord):
        raise UsageError(
            f"{call.site}, layer {call.layer}, attends densely and has no sampling points",
            remedy="draw its attention row instead",
        )
    batch, heads, queries = record.weights.shape[:3]
    if not 0 <= query < queries or not 0 <= sample < batch:
        raise UsageError(f"{call.site}: no query {query} of sample {sample}", remedy=f"0 to {queries - 1}")
    if head != "mean" and not 0 <= head < heads:
        raise UsageError(f"{call.site} has no head {head}", remedy=f"0 to {heads - 1}, or mean")
    kept = list(range(heads)) if head == "mean" else [head]
    return _points(record, traced.labels(call).key, sample, query, kept)


def reference_point(
    source: AttentionSource, batch: Batch, call: CallKey, query: int, *, sample: int = 0
) -> tuple[float, float]:
    """The point (y, x), input pixels, around which a query's points are placed, as its module was told.

    Runs the model once more. (NaN, NaN) where the module takes no ``reference_points``.
    """
    site = next(site for site in source.sites if site.id == call.site)
    path = next(path for path, layer in site.modules.items() if layer == call.layer)
    heard: list[torch.Tensor] = []

    def listen(_: Any, args: Any, kwargs: Any) -> None:
        if isinstance(kwargs.get("reference_points"), torch.Tensor):
            heard.append(kwargs["reference_points"].detach())

    hook = source.module.get_submodule(path.partition("#")[0]).register_forward_pre_hook(listen, with_kwargs=True)
    try:
        source.forward(batch)
    finally:
        hook.remove()
    if not heard:
        return float("nan"), float("nan")
    point = heard[-1][sample, query].reshape(-1, heard[-1].shape[-1])[:, :2].double().mean(0)  # one a level, alike
    height, width = batch.inputs.shape[-2:]
    return float(point[1]) * height, float(point[0]) * width


def _points(
    record: DeformableRecord, keys: TokenAxis, sample: int, query: int, heads: list[int]
) -> SamplingPoints:
    """Points head by head, level by level; coordinates through the extent of each level's cells."""
    batch, count, queries = record.weights.shape[:3]
    rows: list[NDArray[np.float64]] = []
    start = cell = 0
    for number, level in enumerate(record.levels):
        points = level.points(queries)
        y, x = _places(level, (batch, count, queries), (sample, query), heads)
        weight = record.weights[sample, heads, query, start : start + points].double().cpu().numpy() / len(heads)
        of = np.broadcast_to(np.array(heads)[:, None], y.shape)
        size = float(keys.height[cell]), float(keys.width[cell])
        rows.append(np.stack([y * size[0], x * size[1], weight, np.full(y.shape, number), of], -1).reshape(-1, 5))
        start, cell = start + points, cell + level.size[0] * level.size[1]
    y, x, weight, levels, of = np.concatenate(rows).T
    return SamplingPoints(y, x, weight, levels.astype(np.int64), of.astype(np.int64))


def _places(
    level: Level | Gathered, axes: tuple[int, int, int], at: tuple[int, int], heads: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y and x ``(head, point)`` of a query in cells of the level, whose borders are 0 and its size."""
    (*outer, queries), (sample, query) = axes, at
    if isinstance(level, Gathered):  # whole cells: their centres
        cells = level.cells.unflatten(-1, (queries, -1)).unflatten(0, outer)[sample, heads, query].cpu().numpy()
        return cells // level.size[1] + 0.5, cells % level.size[1] + 0.5
    grid = level.grid.unflatten(0, outer)[sample, heads, query].double().cpu().numpy()
    rows, columns = level.size
    return (_edges(grid[..., 1], rows, level.align_corners), _edges(grid[..., 0], columns, level.align_corners))


def _edges(coordinate: NDArray[np.float64], size: int, align: bool) -> NDArray[np.float64]:
    """[-1, 1] of ``F.grid_sample`` to edge coordinates in cells."""
    if align:
        return np.asarray((coordinate + 1) / 2 * (size - 1) + 0.5)
    return np.asarray((coordinate + 1) / 2 * size)
