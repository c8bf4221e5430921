"""Attention rollout as a row sweep: one vector instead of N x N matrices.

Abnar and Zuidema 2020 (arXiv:2005.00928, eq. 1): Â_l = rownorm(a I + (1 - a) fuse_h A_l), R = Â_L ... Â_1.
Only rows of R that the answer is read from are wanted, and ``w R = (...((w Â_L) Â_L-1)...) Â_1`` needs one
vector-matrix product a layer, each evaluated in row blocks. Memory is linear in the number of tokens.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from foveate.capture.blocks import support
from foveate.capture.certificate import spread
from foveate.capture.fusion import Fusion, Joined
from foveate.capture.merging import pull_back
from foveate.capture.streams import at_queries, bottom_rows, own_part, packing_of, start_of_reading, through_calls
from foveate.capture.tap import quiet
from foveate.capture.trace import Trace
from foveate.errors import UsageError
from foveate.interfaces import AttentionStep, BoundTarget, MergeStep, OpaqueStep

Vectors = dict[str, Tensor]


def rollout(
    trace: Trace,
    bound: BoundTarget | None = None,
    *,
    residual: float = 0.5,
    fuse: str = "mean",
    discard: float = 0.0,
    discard_over: Literal["layer", "row"] = "layer",
    layers: Collection[int] | None = None,
) -> Tensor:
    """Rollout of the rows that the answer is read from: ``(sample, token)``, or ``(target, token)``.

    ``residual`` is the weight a of the identity (0.5 in the paper), ``fuse`` how heads join: ``mean``
    (the paper), ``max`` or ``min``. ``discard`` sets the lowest fraction of each layer's joined weights to
    zero, of the matrix or of each row (``discard_over``). ``layers`` limits self-attention to these layer
    numbers (default all). Columns are the tokens of ``trace.stream``.

    With the mean, rows sum to 1 except for what was lost: weights outside the image (deformable), rows
    without keys, and, in models with learned queries, what stays with the queries. Every other variant
    normalises the rows of Â, which takes one more pass over each layer (``discard_over="layer"``: three).
    Raises UsageError for bad options, CaptureError where the flow does not reach the stream.
    """
    site, weights = start_of_reading(trace, bound)
    packing = packing_of(trace, bound)
    sweep = Sweep(trace, residual, Fusion(fuse, discard, discard_over), layers)
    return packing.unpack(sweep.run(site.query, packing.pack(weights)))


def rollout_distance(trace: Trace, *, rows: int = 4, residual: float = 0.5, fuse: str = "mean") -> Tensor:
    """How far apart rollout rows of different queries are: mean total variation ``(sample,)`` in [0, 1].

    Deep rollout forgets where it started: with all rows alike, a map says what the model attends to on the
    whole and nothing about the answer. ``rows`` queries spread over the readout's site are compared pairwise;
    below :data:`COLLAPSED` a rollout map should be shown with that caveat.
    """
    site, weights = start_of_reading(trace)
    queries = weights.shape[1]
    starts = torch.zeros(len(trace.batch), min(rows, queries), queries, device=weights.device)
    starts[:, range(starts.shape[1]), spread(queries, starts.shape[1])] = 1.0
    found = Sweep(trace, residual, Fusion(fuse)).run(site.query, starts)
    pairs = torch.combinations(torch.arange(starts.shape[1]))
    if not len(pairs):
        return torch.ones(len(trace.batch))
    return (found[:, pairs[:, 0]] - found[:, pairs[:, 1]]).abs().sum(-1).mean(-1) / 2


COLLAPSED = 0.05
"""Rollout rows closer than this (mean total variation) are alike: 95 % of each is shared by all."""


@dataclass(frozen=True)
class Sweep:
    """Vectors over streams, multiplied by each step's Â from the last to the first."""

    trace: Trace
    residual: float
    fusion: Fusion
    layers: Collection[int] | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.residual < 1.0:
            raise UsageError(f"rollout: residual must be in [0, 1), not {self.residual}")

    def run(self, stream: str, starts: Tensor) -> Tensor:
        """From ``(sample, slot, query)`` on ``stream`` to ``(sample, slot, token)`` on the bottom stream."""
        vectors: Vectors = {stream: starts}
        stopped = ""
        with quiet():
            for step in reversed(self.trace.flow):
                if isinstance(step, OpaqueStep):
                    if step.stream in vectors:
                        stopped = step.name
                        break
                elif isinstance(step, MergeStep):
                    _unmerge(step, vectors)
                elif step.query in vectors and not self._skipped(step):
                    self._attend(step, vectors)
        return bottom_rows(self.trace, vectors.get(self.trace.stream), stopped, list(vectors))

    def _skipped(self, step: AttentionStep) -> bool:
        inside = self.layers is None or step.call.layer in self.layers
        return step.query == step.key and not inside

    def _attend(self, step: AttentionStep, vectors: Vectors) -> None:
        """Move each vector from a step's queries to its keys; ``residual`` of it stays with the queries."""
        record, labels = self.trace.record(step.call), self.trace.labels(step.call)
        keep = self.residual if step.residual else 0.0
        here, joined = vectors.pop(step.query), Joined(record, self.fusion)
        share = own_part(here, labels)
        if labels.partial:
            vectors[step.query] = here - share
        if not self.fusion.stochastic:
            share = at_queries(share, labels, lambda r: _normalised(joined, r, keep))
        moved = through_calls(share, labels, record.shape[2:], joined.left)
        if step.residual:
            _add(vectors, step.query, keep * share)
        _add(vectors, step.key, (1 - keep) * moved)


def _normalised(joined: Joined, r: Tensor, keep: float) -> Tensor:
    """r divided by the row sums of ``keep I + (1 - keep) M``; 0/0 = 0."""
    sums = (keep + (1 - keep) * joined.row_sums(support(r)))[:, None]
    return torch.where(sums > 0, r / sums, torch.zeros_like(r))


def _unmerge(step: MergeStep, vectors: Vectors) -> None:
    """Tokens of the target are linear in those of the sources."""
    if step.target in vectors:
        moved = vectors.pop(step.target)
        for source, matrix in step.parts:
            _add(vectors, source, pull_back(moved, matrix))


def _add(vectors: Vectors, stream: str, moved: Tensor) -> None:
    vectors[stream] = vectors[stream] + moved if stream in vectors else moved
