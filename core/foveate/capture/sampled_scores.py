"""Deformable attention as something that interventions change: the cells that its points read, and their shares.

A point reads up to four cells by bilinear shares; what lies outside the picture reads zeros, so that rows sum to
the in-image mass and not to one. Changes act on the shares A_ik themselves, after the softmax:

- without renormalisation (the default here) a blocked cell reads as zero, exactly as a cell outside the picture
  does;
- with it, what is left of a row is scaled so that the row keeps its own in-image mass, as a dense row keeps 1.

The result is ``A' V``, summed cell by cell (sparse, ``F.embedding_bag``), or as a product with dense rows where
they were made anew. Gradients reach weights, sampling locations and values.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.capture.deformable import Gathered
from foveate.capture.records import Shape, work_dtype
from foveate.capture.sampled_call import SampledCall
from foveate.capture.scores import Scores, log_weights


class SampledScores(Scores):
    """Shares of one deformable call."""

    sums_to_one = False

    def __init__(self, call: SampledCall) -> None:
        self._call = call
        batch, queries, heads = call.sizes
        weights = call.weights.reshape(batch, queries, heads, -1).transpose(1, 2)
        weights = weights.to(work_dtype(weights.dtype))
        cells, shares, start, key = [], [], 0, 0
        for level in call.levels:
            count = level.points(queries)
            where, share = level.spread((batch, heads), slice(None), weights[..., start : start + count])
            cells.append(where + key)
            shares.append(share)
            start, key = start + count, key + math.prod(level.size)
        self._widths = [part.shape[-1] for part in cells]
        self._cells, self._shares = torch.cat(cells, -1), torch.cat(shares, -1)
        self._keys = key
        self._dense: Tensor | None = None
        self.touched = False

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, cells of all levels)."""
        batch, queries, heads = self._call.sizes
        return Shape(batch, heads, queries, self._keys)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._shares.device

    def visible(self) -> Tensor:
        """A point may lie anywhere: every cell of every level."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device).expand(1, 1, *self.shape[2:])

    def emptied(self, edges: Tensor) -> Tensor:
        """Rows whose shares all lie on ``edges``, bool ``(batch, head, query)``."""
        shares, chosen = self._current(edges)
        return (shares > 0).any(-1) & ~((shares > 0) & ~chosen).any(-1)

    def weights(self) -> Tensor:
        """Dense rows ``(batch, head, query, key)``; they sum to the in-image mass."""
        if self._dense is not None:
            return self._dense
        empty = self._shares.new_zeros(self.shape)
        return empty.scatter_add(-1, self._cells, self._shares)

    def full(self) -> Tensor:
        """Logarithms of the rows."""
        return log_weights(self.weights())

    def block(self, edges: Tensor) -> None:
        """Shares on ``edges`` are 0; each row keeps its mass."""
        self._change(torch.where(self._current(edges)[1], 0.0, 1.0), keep_mass=True)

    def add(self, bias: Tensor) -> None:
        """Shares times exp(bias); each row keeps its mass."""
        self._change(self._current(bias)[1].exp(), keep_mass=True)

    def multiply(self, edges: Tensor, factor: float) -> None:
        """Shares on ``edges`` times ``factor``; nothing is renormalised."""
        self._change(torch.where(self._current(edges)[1], factor, 1.0), keep_mass=False)

    def put(self, rows: Tensor, weights: Tensor) -> None:
        """Give ``rows`` these weights as they are."""
        self._dense = torch.where(rows, weights, self.weights())
        self.touched = True

    def result(self) -> tuple[Tensor, SampledCall]:
        """What heads put out ``(batch, head, query, channel)``, and the changed call."""
        values = self._call.values()
        values = values.to(work_dtype(values.dtype))
        if self._dense is not None:
            return self._dense @ values, replace(self._call, dense=self._dense)
        return self._summed(values), replace(
            self._call, weights=self._shares.transpose(1, 2), levels=self._levels()
        )

    def _current(self, by_edge: Tensor) -> tuple[Tensor, Tensor]:
        """Shares as they are now, and what ``by_edge`` (broadcastable to the shape) says of each."""
        everywhere = by_edge.expand(self.shape)
        if self._dense is not None:
            return self._dense, everywhere
        return self._shares, everywhere.gather(-1, self._cells)

    def _change(self, factor: Tensor, *, keep_mass: bool) -> None:
        before = self._shares if self._dense is None else self._dense
        after = before * factor.to(before.dtype)
        if keep_mass:
            left = after.sum(-1, keepdim=True)
            wanted = before.sum(-1, keepdim=True) / torch.where(left > 0, left, torch.ones_like(left))
            after = after * torch.where(left > 0, wanted, torch.zeros_like(wanted))
        if self._dense is None:
            self._shares = after
        else:
            self._dense = after
        self.touched = True

    def _summed(self, values: Tensor) -> Tensor:
        """Sum of shares times values, no cell-by-cell tensor in between."""
        batch, heads, queries, keys = self.shape
        first = torch.arange(batch * heads, device=self.device).view(batch, heads, 1, 1) * keys
        bags = (self._cells + first).flatten(0, 2)
        shares = self._shares.flatten(0, 2).to(values.dtype)
        out = F.embedding_bag(bags, values.reshape(-1, values.shape[-1]), per_sample_weights=shares, mode="sum")
        return out.view(batch, heads, queries, -1)

    def _levels(self) -> list[Gathered]:
        """Every share as a point on a whole cell, level by level."""
        parts, key = [], 0
        for level, cells in zip(self._call.levels, self._cells.split(self._widths, -1), strict=True):
            parts.append(Gathered(level.values, (cells - key).flatten(0, 1).flatten(1)))
            key += math.prod(level.size)
        return parts
