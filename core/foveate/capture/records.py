"""What the tap leaves of one attention call: a lazy matrix.

A :class:`Record` holds references to what the model computed anyway and evaluates attention on demand, in
float32 whatever the model's dtype (float64 stays float64). Three forms know how to give exact rows:
:class:`~foveate.capture.dense.DenseRecord` from q and k,
:class:`~foveate.capture.materialised.MaterialisedRecord` from weights that the model made itself, and
:class:`~foveate.capture.deformable.DeformableRecord` by splatting its sampling points. All else is written
once, here, on blocks of rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from foveate.capture.blocks import (
    Block,
    Positions,
    fuse_heads,
    left_product,
    mapped,
    right_product,
    spans,
    support,
)
from foveate.capture.reductions import Entropy, Received, reduce_rows
from foveate.interfaces import SiteForm


class Shape(NamedTuple):
    """Sizes of one call: ``batch`` is the product of all leading axes (samples, windows, frames ...)."""

    batch: int
    heads: int
    queries: int
    keys: int


class Stats(NamedTuple):
    """``entropy`` in nats ``(batch, head, query)``; ``received`` ``(batch, head, key)``, mean over queries."""

    entropy: Tensor
    received: Tensor


class Check(NamedTuple):
    """How exact a record is on the rows that were tested.

    ``value_error``: max |P V - out| / max |out| against the module's own output, NaN where the tap saw no
    value product. ``row_error``: max |row sum - 1|, fully masked rows excepted. ``masked_rows``: rows
    that see no key at all (they are zero, as SDPA's are). ``dtype`` is the model's.
    """

    value_error: float
    row_error: float
    masked_rows: int
    dtype: torch.dtype


class Record(ABC):
    """One attention call, evaluated on demand. All tensors are ``(batch, head, query or row, key)``.

    ``name`` is the path of the owning module, ``ordinal`` how many softmaxes or fused calls that module started
    before this one under the tap, ``node`` the tensor of the autograd graph at which :meth:`relevance` takes a
    gradient (None where no graph was recorded).
    """

    form: ClassVar[SiteForm] = "dense"
    via: str = ""
    name: str
    ordinal: int = 0
    node: Tensor | None = None
    dropout: float = 0.0
    sums_to_one: bool = True

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """Sizes of the call."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the call ran."""

    @abstractmethod
    def rows(self, index: Positions | Sequence[int]) -> Tensor:
        """Exact attention of some queries, ``(batch, head, row, key)``, float32 or float64."""

    @abstractmethod
    def certificate(self, index: Positions | Sequence[int]) -> Check:
        """Compare P V on some rows with what the module itself put out."""

    @abstractmethod
    def weight_gradient(self, positions: Positions, gradient: Tensor) -> Tensor:
        """dL/dA of some rows, ``(batch, head, row, key)``, from the gradient at :attr:`node`."""

    def prepared(self) -> Record:
        """The same matrix, arranged for many block products."""
        return self

    def light(self) -> Record:
        """The same matrix without what only certificates and gradients need."""
        return self

    # ---------------------------------------------------------------------------- folds over blocks

    def positions(self, index: Tensor | None = None) -> Iterator[Positions]:
        """All queries, or those in ``index``, cut so that a block of their rows is a few megabytes."""
        batch, heads, queries, keys = self.shape
        for span in spans(queries if index is None else len(index), 4 * batch * heads * keys):
            yield span if index is None else index[span]

    def blocks(self, index: Tensor | None = None) -> Iterator[Block]:
        """``(positions, P)`` over all queries, or over those in ``index``, a few megabytes at a time."""
        ready = self.prepared()
        for positions in self.positions(index):
            yield positions, ready.rows(positions)

    def left(self, r: Tensor, *, fuse: str = "mean") -> Tensor:
        """``r @ fuse_h A`` for r ``(batch, vector, query)``: ``(batch, vector, key)``."""
        fused = mapped(self.blocks(support(r)), lambda block: fuse_heads(block, fuse))
        return left_product(fused, r, self.shape.keys)

    def right(self, u: Tensor, *, fuse: str = "mean") -> Tensor:
        """``fuse_h A @ u`` for u ``(batch, key, column)``: ``(batch, query, column)``."""
        fused = mapped(self.blocks(), lambda block: fuse_heads(block, fuse))
        return right_product(fused, u, self.shape.queries)

    def weighted(self, weights: Tensor) -> Tensor:
        """``sum_i w_i A_i`` for each head, from w ``(batch, query)``: ``(batch, head, 1, key)``."""
        batch, heads, _, keys = self.shape
        total = weights.new_zeros(batch, heads, 1, keys)
        for positions, block in self.blocks(support(weights)):
            total += weights[:, None, None, positions] @ block.to(weights.dtype)
        return total

    def stats(self) -> Stats:
        """Entropy of every row and mean of every column, exactly, in linear memory."""
        found = reduce_rows(self, (Entropy, Received))
        return Stats(found["entropy"], found["received"])

    # ---------------------------------------------------------------------------- with gradients

    def relevance_blocks(self, gradient: Tensor, index: Tensor | None = None) -> Iterator[Block]:
        """Blocks of Ā = mean_h relu(A * dL/dA), ``(batch, row, key)`` (Chefer et al. 2021, eq. 5)."""
        ready = self.prepared()
        for positions, block in ready.blocks(index):
            slope = ready.weight_gradient(positions, gradient)
            yield positions, slope.mul_(block).relu_().mean(1)

    def grad_left(self, r: Tensor, gradient: Tensor) -> Tensor:
        """``r @ Ā`` for r ``(batch, vector, query)``: ``(batch, vector, key)``."""
        return left_product(self.relevance_blocks(gradient, support(r)), r, self.shape.keys)

    def grad_right(self, u: Tensor, gradient: Tensor) -> Tensor:
        """``Ā @ u`` for u ``(batch, key, column)``: ``(batch, query, column)``."""
        return right_product(self.relevance_blocks(gradient), u, self.shape.queries)


def as_index(index: Positions | Sequence[int], device: torch.device) -> Positions:
    """Positions given as a slice, a tensor or a sequence of integers, ready to index with."""
    if isinstance(index, slice):
        return index
    return torch.as_tensor(index, dtype=torch.long, device=device)


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 where the model itself is float64."""
    return torch.promote_types(dtype, torch.float32)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected|; NaN where either is not finite."""
    if expected.numel() == 0:
        return 0.0
    expected = expected.to(found.dtype)
    error = (found - expected).abs().amax()
    size = expected.abs().amax()
    return float(error / size) if size > 0 else float(error)


def row_check(rows: Tensor) -> tuple[float, int]:
    """(max |row sum - 1| over rows that see a key, number of rows that see none); NaN propagates."""
    sums = rows.sum(-1)
    dead = (rows == 0).all(-1)
    off = torch.where(dead, torch.zeros_like(sums), (sums - 1).abs())
    return (float(off.amax()) if off.numel() else 0.0), int(dead.sum())
