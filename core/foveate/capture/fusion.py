"""How a layer's heads join into one matrix for rollout, and which of its weights are discarded.

Head fusion by mean is Abnar and Zuidema's (2020); max, min and the discard ratio, by which the lowest
weights of a layer are set to zero, are the common variants since (vit-explain, 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from foveate.capture.blocks import Block, fuse_heads, left_product, mapped, support
from foveate.capture.records import Record
from foveate.errors import UsageError

FUSIONS = ("mean", "max", "min")
_HALF = 1 << 16

Passes = Callable[[], Iterable[Block]]
"""Starts another pass over the same blocks."""


@dataclass(frozen=True)
class Fusion:
    """``how`` heads join; ``discard`` is the fraction of lowest weights set to zero, of the whole matrix
    (``over="layer"``) or of each row (``over="row"``). Weights that tie with the last one discarded go too.
    """

    how: str = "mean"
    discard: float = 0.0
    over: Literal["layer", "row"] = "layer"

    def __post_init__(self) -> None:
        if self.how not in FUSIONS:
            raise UsageError(f"rollout: no fusion {self.how!r}", remedy=f"choose from {', '.join(FUSIONS)}")
        if not 0.0 <= self.discard < 1.0 or self.over not in ("layer", "row"):
            raise UsageError(
                f"rollout: discard must be in [0, 1) over 'layer' or 'row', not {self.discard} over {self.over!r}"
            )

    @property
    def stochastic(self) -> bool:
        """Whether rows of the joined matrix sum to one as attention does."""
        return self.how == "mean" and self.discard == 0.0


@dataclass(frozen=True, eq=False)
class Joined:
    """One call's heads joined by a :class:`Fusion`: a lazy matrix ``(batch, query, key)``."""

    record: Record
    fusion: Fusion

    def left(self, r: Tensor) -> Tensor:
        """``r @ M`` for r ``(batch, vector, query)``: ``(batch, vector, key)``."""
        if self.fusion.stochastic:
            return self.record.left(r)
        return left_product(self.blocks(support(r)), r, self.record.shape.keys)

    def row_sums(self, index: Tensor | None) -> Tensor:
        """Sums of the rows in ``index`` (default all), ``(batch, query)``; zero elsewhere."""
        batch, _, queries, _ = self.record.shape
        sums = torch.zeros(batch, queries, device=self.record.device)
        for positions, block in self.blocks(index):
            sums[:, positions] = block.sum(-1).to(sums)
        return sums

    def blocks(self, index: Tensor | None = None) -> Iterator[Block]:
        """Rows of the joined matrix, ``(batch, row, key)``."""
        if self.fusion.discard == 0.0:
            return self._fused(index)
        if self.fusion.over == "row":
            return mapped(self._fused(index), lambda block: _without_lowest(block, self.fusion.discard))
        return mapped(self._fused(index), lambda block: block * (block > self._limit))

    @cached_property
    def _limit(self) -> Tensor:
        """What the whole matrix discards up to, ``(batch, 1, 1)``: two passes, once."""
        batch, _, queries, keys = self.record.shape
        count = int(self.fusion.discard * queries * keys)
        limit = exact_threshold(lambda: self._fused(None), batch, count)
        return limit[:, None, None].to(self.record.device)

    def _fused(self, index: Tensor | None) -> Iterator[Block]:
        return mapped(self.record.blocks(index), lambda block: fuse_heads(block, self.fusion.how).float())


def exact_threshold(passes: Passes, batch: int, count: int) -> Tensor:
    """The ``count``-th smallest of all values of each matrix, ``(batch,)``; -1 where ``count`` is 0.

    Exact without sorting or storing the matrix: the bits of non-negative float32 order as integers do, so one
    pass counts their upper halves and a second the lower halves inside the bin that holds the answer.
    """
    if count == 0:
        return torch.full((batch,), -1.0)
    upper = _histogram((bits >> 16 for bits in _bits(passes())), batch)
    cumulative = upper.cumsum(1)
    bins = (cumulative < count).sum(1)
    before = (cumulative - upper).gather(1, bins[:, None])
    inside = (torch.where(bits >> 16 == bins[:, None], bits & (_HALF - 1), -1) for bits in _bits(passes()))
    lower = _histogram(inside, batch).cumsum(1)
    low = (lower < count - before).sum(1)
    return ((bins << 16) | low).to(torch.int32).view(torch.float32)


def _bits(blocks: Iterable[Block]) -> Iterator[Tensor]:
    """Each block's bits as integers, ``(batch, value)``."""
    for _, block in blocks:
        yield block.flatten(1).contiguous().view(torch.int32).long().cpu()


def _histogram(values: Iterable[Tensor], batch: int) -> Tensor:
    """Counts of 0 to 65535 for each row of ``(batch, value)``; -1 is left out."""
    offset = torch.arange(batch)[:, None] * _HALF
    counts = torch.zeros(batch, _HALF, dtype=torch.long)
    for value in values:
        chosen = (value + offset)[value >= 0]
        counts += torch.bincount(chosen, minlength=batch * _HALF).view(batch, _HALF)
    return counts


def _without_lowest(block: Tensor, fraction: float) -> Tensor:
    """Each row without its ``fraction`` of lowest values."""
    count = int(fraction * block.shape[-1])
    if count == 0:
        return block
    limit = block.kthvalue(count, dim=-1, keepdim=True).values
    return block * (block > limit)
