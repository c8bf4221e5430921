"""Row blocks: how anything about an N x N matrix is computed without ever holding it.

A record yields its attention as blocks of complete rows, ``(positions, P)`` with ``P`` of shape
``(batch, head, row, key)``. Products and reductions are folds over such blocks, so their memory is linear
in the number of tokens. Blocks whose head axis has been fused, ``(batch, row, key)``, are folded alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

BUDGET = 8 << 20
"""Bytes of one float32 block. Measured on CPU: 8 MiB stays in cache; fused kernels are 1.2 to 5 times slower."""
MIN_ROWS = 16

Positions = slice | Tensor
Block = tuple[Positions, Tensor]


def spans(count: int, row_bytes: int) -> Iterator[slice]:
    """Cut ``count`` rows into slices of about :data:`BUDGET` bytes, at least :data:`MIN_ROWS` rows each."""
    step = max(MIN_ROWS, BUDGET // max(1, row_bytes))
    for start in range(0, count, step):
        yield slice(start, min(count, start + step))


def fuse_heads(block: Tensor, how: str = "mean") -> Tensor:
    """``(batch, head, row, key)`` to ``(batch, row, key)`` by ``mean``, ``max`` or ``min`` over heads."""
    if how == "mean":
        return block.mean(1)
    if how == "max":
        return block.amax(1)
    if how == "min":
        return block.amin(1)
    raise ValueError(f"fuse_heads: expected 'mean', 'max' or 'min', got {how!r}")


def left_product(blocks: Iterable[Block], r: Tensor, keys: int) -> Tensor:
    """``r @ M`` for blocks of M ``(batch, row, key)`` and r ``(batch, vector, query)``: (batch, vector, key)."""
    out = r.new_zeros(*r.shape[:2], keys)
    for positions, block in blocks:
        out += r[..., positions] @ block.to(r.dtype)
    return out


def right_product(blocks: Iterable[Block], u: Tensor, queries: int) -> Tensor:
    """``M @ u`` for blocks of M ``(batch, row, key)`` and u ``(batch, key, column)``: (batch, query, column)."""
    out = u.new_zeros(u.shape[0], queries, u.shape[2])
    for positions, block in blocks:
        out[:, positions] = block.to(u.dtype) @ u
    return out


def support(r: Tensor) -> Tensor | None:
    """Positions of the last axis where anything is non-zero, or None where that is more than half of it.

    The first step of a rollout starts from one row; only that row of attention is then computed.
    """
    used = (r != 0).flatten(0, -2).any(0)
    positions = used.nonzero().flatten()
    return positions if 2 * len(positions) < r.shape[-1] else None


def mapped(blocks: Iterable[Block], function: Callable[[Tensor], Tensor]) -> Iterator[Block]:
    """The same blocks, each passed through ``function``."""
    for positions, block in blocks:
        yield positions, function(block)
