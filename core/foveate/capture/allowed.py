"""Which keys a mask left to each row: a blocked key is not a key that received zero attention.

Padding, causal masks and masked attention (Mask2Former) put a very negative number on a score. What they blocked
varies with sample, layer, query and key, and is read from the call itself: from the mask that the kernel was
given, or from the scores that entered the model's own softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.dense import DenseRecord
from foveate.capture.labels import call_weights
from foveate.capture.materialised import BLOCKED, MaterialisedRecord
from foveate.capture.records import Record, as_index
from foveate.capture.selection import Selection
from foveate.interfaces import CallLabels


def allowed(record: Record, index: Positions | Sequence[int]) -> Tensor:
    """bool ``(batch, row, key)``: whether any head of a row may read a key."""
    positions = as_index(index, record.device)
    batch, _, queries, keys = record.shape
    rows = torch.arange(queries, device=record.device)[positions]
    free = torch.ones(batch, len(rows), keys, dtype=torch.bool, device=record.device)
    if isinstance(record, DenseRecord):
        return free & _of_mask(record, positions, rows)
    if isinstance(record, MaterialisedRecord) and record.blocked is not None:
        return ~record.blocked[:, :, positions].all(1)
    return free


def allowed_rows(record: Record, selection: Selection, labels: CallLabels | None) -> Tensor:
    """:func:`allowed` for the rows that ``selection`` keeps; a weighted row may read what any of its rows may.

    A position without a query in this call may read nothing.
    """
    if selection.weights is None:
        kept, queries = selection.local(labels)
        own = allowed(record, queries)
        whole = own.new_zeros(len(own), len(selection.index), own.shape[-1])
        whole[:, kept] = own
        return whole
    weights = selection.weights.to(record.device)
    used = (weights if labels is None else call_weights(weights, labels, selection.group)) > 0
    return (allowed(record, slice(None)) & used[:, :, None]).any(1, keepdim=True)


def allowed_counts(record: Record) -> dict[str, Tensor]:
    """How many keys each row may read, ``key_count`` int32 ``(batch, query)``, and by which share of the queries
    each key may be read, ``reader_share`` float32 ``(batch, key)``; a few rows at a time.
    """
    batch, _, queries, keys = record.shape
    count = torch.zeros(batch, queries, dtype=torch.int32, device=record.device)
    readers = torch.zeros(batch, keys, dtype=torch.float64, device=record.device)
    for positions in record.positions():
        free = allowed(record, positions)
        count[:, positions] = free.sum(-1, dtype=torch.int32)
        readers += free.sum(-2)
    return {"key_count": count, "reader_share": (readers / max(1, queries)).float()}


def hidden_counts(valid: Tensor, queries: int) -> dict[str, Tensor]:
    """The same where the source hides keys from whole samples: ``valid`` ``(batch, key)``."""
    count = valid.sum(-1, dtype=torch.int32)[:, None].expand(-1, queries)
    return {"key_count": count, "reader_share": valid.float()}


def _of_mask(record: DenseRecord, positions: Positions, rows: Tensor) -> Tensor:
    """What mask and causality leave, broadcast against ``(batch, row, key)``."""
    keys = torch.arange(record.shape.keys, device=record.device)
    left = keys <= rows[:, None] if record.causal else torch.ones((), dtype=torch.bool, device=record.device)
    if record.mask is None:
        return left
    mask = record.mask if record.mask.shape[-2] == 1 else record.mask[..., positions, :]
    kept = mask if mask.dtype == torch.bool else mask > BLOCKED
    return left & kept.any(1)
