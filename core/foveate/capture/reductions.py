"""What can be said about all rows of an attention matrix without keeping it.

Each reduction folds blocks of complete rows; :func:`reduce_rows` runs any number of them over one pass, so the
matrix is evaluated once and its memory stays linear in the number of tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.capture.records import Record


class Fold(ABC):
    """A reduction of blocks ``(batch, head, row, key)`` to named arrays."""

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        self.shape, self.device, self.rank, self.hidden = record.shape, record.device, rank, hidden

    @abstractmethod
    def add(self, positions: Positions, block: Tensor) -> None:
        """Take in some complete rows."""

    @abstractmethod
    def results(self) -> dict[str, Tensor]:
        """The arrays, once all rows are in."""


class Entropy(Fold):
    """Shannon entropy of every row in nats: ``entropy`` (batch, head, query).

    Of a row that does not sum to 1 (deformable points outside the picture, slots) it is the entropy of the row
    divided by its sum, over the keys that are not hidden; 0 where nothing is left.
    """

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        super().__init__(record, rank, hidden)
        self.entropy = torch.empty(self.shape[:3], device=self.device)
        self.sums_to_one = record.sums_to_one

    def add(self, positions: Positions, block: Tensor) -> None:
        """-sum p ln p with 0 ln 0 = 0; ``torch.special.entr`` takes 1.7 times as long (not vectorised)."""
        if self.hidden is not None:
            block = block.masked_fill(self.hidden[:, None, None], 0.0)
        logs = block.clamp_min(torch.finfo(block.dtype).tiny).log_()
        found = -torch.linalg.vecdot(block, logs)
        if not self.sums_to_one or self.hidden is not None:
            # with m the sum of a row: -sum (p / m) ln (p / m) = (-sum p ln p) / m + ln m
            mass = block.sum(-1)
            found = torch.where(mass > 0, found / mass + mass.log(), 0.0)
        self.entropy[..., positions] = found.to(self.entropy)

    def results(self) -> dict[str, Tensor]:
        """One array."""
        return {"entropy": self.entropy}


class Received(Fold):
    """Mean over queries of each column: ``received`` (batch, head, key)."""

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        super().__init__(record, rank, hidden)
        batch, heads, _, keys = self.shape
        self.total = torch.zeros(batch, heads, keys, device=self.device)

    def add(self, positions: Positions, block: Tensor) -> None:
        """Column sums."""
        self.total += block.sum(-2)

    def results(self) -> dict[str, Tensor]:
        """One array."""
        return {"received": self.total / self.shape.queries}


class HeadMean(Fold):
    """Mean over heads: ``head_mean`` (batch, query, key). Quadratic in tokens, but not in heads."""

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        super().__init__(record, rank, hidden)
        batch, _, queries, keys = self.shape
        self.mean = torch.empty(batch, queries, keys, device=self.device)

    def add(self, positions: Positions, block: Tensor) -> None:
        """Mean of the block over heads."""
        self.mean[:, positions] = block.mean(1).to(self.mean)

    def results(self) -> dict[str, Tensor]:
        """One array."""
        return {"head_mean": self.mean}


class TopK(Fold):
    """The largest keys of every row, largest first: ``topk_value``, ``topk_index`` (batch, head, query, rank)."""

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        super().__init__(record, min(rank, record.shape.keys), hidden)
        shape = (*self.shape[:3], self.rank)
        self.value = torch.empty(shape, device=self.device)
        self.index = torch.empty(shape, device=self.device, dtype=torch.int32)

    def add(self, positions: Positions, block: Tensor) -> None:
        """Partial sort of each row."""
        value, index = block.topk(self.rank, dim=-1)
        self.value[..., positions, :] = value.to(self.value)
        self.index[..., positions, :] = index.to(self.index)

    def results(self) -> dict[str, Tensor]:
        """Values and positions."""
        return {"topk_value": self.value, "topk_index": self.index}


class Full(Fold):
    """The whole matrix: ``attention`` (batch, head, query, key)."""

    def __init__(self, record: Record, rank: int, hidden: Tensor | None = None) -> None:
        super().__init__(record, rank, hidden)
        self.attention = torch.empty(self.shape, device=self.device)

    def add(self, positions: Positions, block: Tensor) -> None:
        """Keep the rows."""
        self.attention[..., positions, :] = block.to(self.attention)

    def results(self) -> dict[str, Tensor]:
        """One array."""
        return {"attention": self.attention}


REDUCTIONS: dict[str, type[Fold]] = {
    "entropy": Entropy,
    "received": Received,
    "head_mean": HeadMean,
    "topk": TopK,
}
"""What ``SitePlan.reductions`` may name."""


def check_reductions(names: Iterable[str]) -> None:
    """Raise UsageError for a reduction that does not exist."""
    for name in names:
        if name not in REDUCTIONS:
            raise UsageError(
                f"capture: no reduction {name!r}", remedy=f"choose from {', '.join(sorted(REDUCTIONS))}"
            )


def reduce_rows(
    record: Record, folds: Sequence[type[Fold]], *, topk: int = 16, hidden: Tensor | None = None
) -> dict[str, Tensor]:
    """All ``folds`` over one pass through the record's rows.

    ``hidden`` ``(batch, key)`` is True for keys that hold nothing to read although no mask blocks them.
    """
    running = [fold(record, topk, hidden) for fold in folds]
    if running:
        for positions, block in record.blocks():
            for fold in running:
                fold.add(positions, block)
    return {name: array for fold in running for name, array in fold.results().items()}
