"""Deformable attention as the exact dense matrix that it is.

Multi-scale deformable attention (Zhu et al. 2021, arXiv:2010.04159, eq. 3) samples values bilinearly at a
few points a query and sums them by softmax weights. Bilinear sampling is linear in the values, so splatting
each weight onto its four corners gives a matrix over the flattened pyramid with A @ V equal to the
module's output. What falls outside the image (zero padding) is lost: row sums below one are the in-image mass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.records import Check, Record, Shape, as_index, relative_error, work_dtype
from foveate.interfaces import SiteForm


@dataclass(frozen=True, eq=False)
class Level:
    """One pyramid level of one call: ``values`` (batch * head, channel, height, width); ``grid``
    (batch * head, query, point, 2) as ``F.grid_sample`` takes it, (x, y) in [-1, 1].
    """

    values: Tensor
    grid: Tensor
    align_corners: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.values.shape[-2]), int(self.values.shape[-1])

    def detach(self) -> Level:
        """Without its graph."""
        return Level(self.values.detach(), self.grid.detach(), self.align_corners)

    def points(self, queries: int) -> int:
        """Sampling points of one query and head."""
        return int(self.grid.shape[-2])

    def spread(self, heads: tuple[int, int], positions: Positions, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cells ``(batch, head, row, 4 * point)`` that some rows' points take, and what of their weight."""
        grid = self.grid.unflatten(0, heads)[:, :, positions].to(weights.dtype)
        return _bilinear(grid, weights, self)


@dataclass(frozen=True, eq=False)
class Gathered:
    """One pyramid level of one call whose points are whole cells, read by integer index (RT-DETRv2's "discrete").

    ``values`` (batch * head, channel, height, width); ``cells`` (batch * head, query * point), row by row.
    """

    values: Tensor
    cells: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return int(self.values.shape[-2]), int(self.values.shape[-1])

    def detach(self) -> Gathered:
        """Without its graph."""
        return Gathered(self.values.detach(), self.cells)

    def points(self, queries: int) -> int:
        """Sampling points of one query and head."""
        return int(self.cells.shape[-1]) // queries

    def spread(self, heads: tuple[int, int], positions: Positions, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Cells ``(batch, head, row, point)`` of some rows' points, and their weight."""
        by_query = self.cells.unflatten(-1, (-1, weights.shape[-1])).unflatten(0, heads)
        return by_query[:, :, positions], weights


def gathered(values: Tensor, index: object) -> Gathered | None:
    """The level that ``values[picture, :, y, x]`` reads with integers ``(picture, point)``; None otherwise."""
    if values.dim() != 4 or not isinstance(index, tuple) or len(index) != 4 or index[1] != slice(None):
        return None
    picture, y, x = index[0], index[2], index[3]
    whole = (torch.int64, torch.int32)
    if not all(isinstance(t, Tensor) and t.dim() == 2 and t.dtype in whole for t in (picture, y, x)):
        return None
    rows = torch.arange(len(values), device=values.device)[:, None]
    if len(picture) != len(values) or not bool((picture == rows).all()):
        return None
    return Gathered(values, y.long() * values.shape[-1] + x.long())


class DeformableRecord(Record):
    """Sampling points and weights of one call; keys are the cells of all levels, one level after the other.

    ``weights`` is ``(batch, query, head, ...)`` with levels and points in the remaining axes, as the
    softmax put them out. ``out`` is the module's weighted sum, ``(batch * head, channel, query)``, or with
    ``layout`` "query first" ``(batch, query, head * channel)``.
    """

    form: ClassVar[SiteForm] = "deformable"
    via = "grid_sample"
    sums_to_one = False

    def __init__(
        self,
        name: str,
        weights: Tensor,
        levels: Sequence[Level | Gathered],
        out: Tensor | None = None,
        *,
        layout: str = "channel first",
    ) -> None:
        self.name, self._layout = name, layout
        batch, queries, heads = weights.shape[:3]
        self.levels = tuple(level.detach() for level in levels)
        # (batch, head, query, point): points of all levels side by side
        self.weights = weights.detach().reshape(batch, queries, heads, -1).transpose(1, 2)
        self.out = None if out is None else out.detach()
        self.node = out if out is not None and out.requires_grad else None

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, cells of all levels)."""
        batch, heads, queries = self.weights.shape[:3]
        return Shape(batch, heads, queries, sum(math.prod(level.size) for level in self.levels))

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights.device

    def rows(self, index: Positions | Sequence[int]) -> Tensor:
        """Splatted attention of some queries, ``(batch, head, row, key)``; sums to the in-image mass."""
        positions = as_index(index, self.device)
        parts = []
        for level, cells, share in self._corners(positions):
            flat = share.new_zeros(*share.shape[:3], math.prod(level.size))
            parts.append(flat.scatter_add_(-1, cells, share))
        return torch.cat(parts, -1)

    def left(self, r: Tensor, *, fuse: str = "mean") -> Tensor:
        """``r @ fuse_h A`` (batch, vector, key); for the mean by splatting r times the weights, never dense."""
        if fuse != "mean":
            return super().left(r, fuse=fuse)
        batch, heads = self.shape[:2]
        parts = []
        for level, cells, share in self._corners(slice(None)):
            mass = (r[:, :, None, :, None] * (share / heads)[:, None]).flatten(2)
            flat = mass.new_zeros(batch, r.shape[1], math.prod(level.size))
            parts.append(flat.scatter_add_(-1, cells.flatten(1)[:, None].expand_as(mass), mass))
        return torch.cat(parts, -1)

    def values(self) -> Tensor:
        """V over the cells of all levels, ``(batch, head, key, channel)``."""
        return level_values(self.levels, *self.shape[:2])

    def certificate(self, index: Positions | Sequence[int]) -> Check:
        """Splatted A times V against the module's own output; ``row_error`` is by how much rows exceed 1."""
        rows = self.rows(index)
        excess = float((rows.sum(-1) - 1).clamp_min(0).amax())
        error = math.nan
        if self.out is not None:
            found = rows @ self.values().to(rows.dtype)
            error = relative_error(found, self._by_query(self.out)[:, :, as_index(index, self.device)])
            error = math.inf if math.isnan(error) else error
        return Check(error, excess, int((rows == 0).all(-1).sum()), self.weights.dtype)

    def weight_gradient(self, positions: Positions, gradient: Tensor) -> Tensor:
        """dL/dA_ij = <dL/dO_i, V_j> on some rows, ``(batch, head, row, key)``: corners are already coalesced."""
        slope = self._by_query(gradient)[:, :, positions]
        dtype = work_dtype(slope.dtype)
        return slope.to(dtype) @ self.values().to(dtype).transpose(-1, -2)

    def _by_query(self, out: Tensor) -> Tensor:
        """The module's output, or its gradient, as ``(batch, head, query, channel)``."""
        batch, heads, queries = self.shape[:3]
        if self._layout == "query first":
            return out.reshape(batch, queries, heads, -1).transpose(1, 2)
        return out.reshape(batch, heads, -1, queries).transpose(-1, -2)

    def _corners(self, positions: Positions) -> Iterator[tuple[Level | Gathered, Tensor, Tensor]]:
        """Per level: flat cells and their shares of the weights, ``(batch, head, row, corner)``."""
        batch, heads, queries = self.weights.shape[:3]
        weights = self.weights[:, :, positions].to(work_dtype(self.weights.dtype))
        start = 0
        for level in self.levels:
            count = level.points(queries)
            yield level, *level.spread((batch, heads), positions, weights[..., start : start + count])
            start += count


def level_values(levels: Sequence[Level | Gathered], batch: int, heads: int) -> Tensor:
    """V over the cells of all levels, ``(batch, head, key, channel)``."""
    flat = torch.cat([level.values.flatten(2) for level in levels], -1)
    return flat.reshape(batch, heads, *flat.shape[1:]).transpose(-1, -2)


def _bilinear(grid: Tensor, weights: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """The four cells around each point and what of its weight each gets (zero outside the image)."""
    height, width = level.size
    x = _pixel(grid[..., 0], width, level.align_corners)
    y = _pixel(grid[..., 1], height, level.align_corners)
    left, top = x.floor(), y.floor()
    cells, shares = [], []
    for column, across in ((left, 1 - (x - left)), (left + 1, x - left)):
        for row, down in ((top, 1 - (y - top)), (top + 1, y - top)):
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            cell = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            cells.append(cell.long())
            shares.append(weights * across * down * inside)
    return torch.cat(cells, -1), torch.cat(shares, -1)


def _pixel(coordinate: Tensor, size: int, align_corners: bool) -> Tensor:
    """[-1, 1] to pixel indices, as ``F.grid_sample`` defines them."""
    if align_corners:
        return (coordinate + 1) / 2 * (size - 1)
    return ((coordinate + 1) * size - 1) / 2
