"""Attention rollout as a row sweep: one vector instead of N x N matrices.

Abnar and Zuidema 2020 (arXiv:2005.00928, eq. 1): Â_l = rownorm(a I + (1 - a) fuse_h A_l), R = Â_L ... Â_1.
Only rows of R that the answer is read from are wanted, and ``w R = (...((w Â_L) Â_L-1)...) Â_1`` needs one
vector-matrix product a layer, each evaluated in row blocks. Memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.capture.records import Record
from foveate.capture.streams import bottom_rows, packing_of, start_of_reading, through_calls
from foveate.capture.tap import quiet
from foveate.capture.trace import Trace
from foveate.errors import UsageError
from foveate.interfaces import AttentionStep, BoundTarget, MergeStep, OpaqueStep

Vectors = dict[str, Tensor]


def rollout(
    trace: Trace, bound: BoundTarget | None = None, *, residual: float = 0.5, fuse: str = "mean"
) -> Tensor:
    """Rollout of the rows that the answer is read from: ``(sample, token)``, or ``(target, token)``.

    ``residual`` is the weight a of the identity (0.5 in the paper), ``fuse`` how heads join: ``mean``
    (the paper), ``max`` or ``min``. Columns are the tokens of ``trace.stream``. With the mean, rows sum to 1
    except for what was lost: weights outside the image (deformable), rows without keys, and, in models
    with learned queries, what stays with the queries. For ``max`` and ``min`` each row of Â is normalised.
    Raises UsageError for bad options, CaptureError where the flow does not reach the stream.
    """
    if not 0.0 <= residual < 1.0:
        raise UsageError(f"rollout: residual must be in [0, 1), not {residual}")
    if fuse not in ("mean", "max", "min"):
        raise UsageError(f"rollout: no fusion {fuse!r}", remedy="choose mean, max or min")
    site, weights = start_of_reading(trace, bound)
    packing = packing_of(trace, bound)
    vectors: Vectors = {site.query: packing.pack(weights)}
    stopped = ""
    with quiet():
        for step in reversed(trace.flow):
            if isinstance(step, OpaqueStep):
                if step.stream in vectors:
                    stopped = step.name
                    break
            elif isinstance(step, MergeStep):
                _unmerge(step, vectors)
            elif step.query in vectors:
                _attend(trace, step, vectors, residual, fuse)
    return packing.unpack(bottom_rows(trace, vectors.get(trace.stream), stopped, list(vectors)))


def _attend(trace: Trace, step: AttentionStep, vectors: Vectors, residual: float, fuse: str) -> None:
    """Move each vector from a step's queries to its keys; ``residual`` of it stays with the queries."""
    record, labels = trace.record(step.call), trace.labels(step.call)
    keep = residual if step.residual else 0.0
    share = vectors.pop(step.query)
    if fuse != "mean":
        share = through_calls(share, labels, (record.shape.queries,) * 2, _normaliser(record, keep, fuse))
    moved = through_calls(share, labels, record.shape[2:], lambda r: record.left(r, fuse=fuse))
    if step.residual:
        vectors[step.query] = keep * share
    _add(vectors, step.key, (1 - keep) * moved)


def _normaliser(record: Record, keep: float, fuse: str) -> Callable[[Tensor], Tensor]:
    """Division by the row sums of ``keep I + (1 - keep) fuse_h A``; 0/0 = 0."""
    ones = torch.ones(record.shape.batch, record.shape.keys, 1, device=record.device)
    sums = keep + (1 - keep) * record.right(ones, fuse=fuse).transpose(1, 2)
    return lambda r: torch.where(sums > 0, r / sums, torch.zeros_like(r))


def _unmerge(step: MergeStep, vectors: Vectors) -> None:
    """Tokens of the target are linear in those of the source."""
    if step.target in vectors:
        moved = vectors.pop(step.target)
        _add(vectors, step.source, moved @ step.matrix.to(moved))


def _add(vectors: Vectors, stream: str, moved: Tensor) -> None:
    vectors[stream] = vectors[stream] + moved if stream in vectors else moved
