"""Gradients of target scores at every attention call, in as few backward passes as the targets allow.

Samples of a batch do not influence each other, so one backward of a sum of scores gives each sample its own
gradient: rows that explain different samples share a pass, several rows of one sample take one each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.capture.tap import quiet
from foveate.capture.trace import Trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import BoundTarget, CallKey


@dataclass(frozen=True, eq=False)
class Round:
    """One backward pass: the rows it serves, all of different samples, and the gradient at each call's node."""

    rows: tuple[int, ...]
    gradients: Mapping[CallKey, Tensor]
    """Calls that the scores do not depend on are absent: their gradient is zero."""


def gradient_rounds(
    trace: Trace, bound: BoundTarget, *, calls: Collection[CallKey] | None = None, keep_graph: bool = True
) -> Iterator[Round]:
    """Backward passes that together serve every row of ``bound``, down to the first of ``calls`` (default all).

    With ``keep_graph`` the trace can be explained again; without, the last pass frees the graph as it goes,
    and the gradients take no memory that the backward pass did not need anyway. Raises UsageError for a trace
    without gradients, CaptureError for a call that ran outside the graph.
    """
    nodes = _nodes(trace, trace.records if calls is None else calls)
    with torch.enable_grad():
        scores = trace.source.score(trace.outputs, trace.batch, bound)
    if not scores.requires_grad:
        raise CaptureError(
            "relevance: the score has no gradient", remedy="the source's forward or score detaches its result"
        )
    rounds = rounds_of(bound)
    for rows in rounds:
        total = scores[list(rows)].sum()
        keep = keep_graph or rows is not rounds[-1]
        found = torch.autograd.grad(total, list(nodes.values()), retain_graph=keep, allow_unused=True)
        gradients = {call: g for call, g in zip(nodes, found, strict=True) if g is not None}
        yield Round(rows, gradients)


def by_round(
    trace: Trace,
    bound: BoundTarget,
    weights: Tensor,
    explain: Callable[[Round, Tensor], Tensor],
    *,
    keep_graph: bool,
    calls: Collection[CallKey] | None = None,
) -> Tensor:
    """``explain`` every row of ``bound``, a backward pass at a time: ``(target, token)``.

    ``explain`` gets the pass and its readout rows as ``(sample, 1, query)``, zero for samples it does not
    serve, and returns ``(sample, 1, token)``. ``weights`` are the readout rows ``(target, query)``; ``calls`` are
    those whose gradient it reads (default all).
    """
    rows: dict[int, Tensor] = {}
    for backward in gradient_rounds(trace, bound, calls=calls, keep_graph=keep_graph):
        samples = [bound.rows[row].sample for row in backward.rows]
        start = weights.new_zeros(len(trace.batch), 1, weights.shape[1])
        start[samples, 0] = weights[list(backward.rows)]
        with quiet():
            values = explain(backward, start)
        rows.update({row: values[sample, 0] for row, sample in zip(backward.rows, samples, strict=True)})
    return torch.stack([rows[i] for i in range(len(bound))]) if rows else weights.new_zeros(0, 0)


def rounds_of(bound: BoundTarget) -> list[tuple[int, ...]]:
    """Rows of ``bound`` in groups without a repeated sample."""
    seen: dict[int, int] = {}
    rounds: list[list[int]] = []
    for i, row in enumerate(bound.rows):
        number = seen.get(row.sample, 0)
        seen[row.sample] = number + 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(i)
    return [tuple(rows) for rows in rounds]


def _nodes(trace: Trace, calls: Collection[CallKey]) -> dict[CallKey, Tensor]:
    if not trace.grad:
        raise UsageError(
            "relevance: the trace has no graph", remedy="make it with trace(source, batch, grad=True)"
        )
    nodes = {}
    for call in calls:
        record = trace.record(call)
        if record.node is None:
            raise CaptureError(
                f"relevance: {call.site} layer {call.layer} ({record.name}) ran outside the autograd graph",
                remedy="turn off gradient checkpointing and no_grad inside the model; put it in eval mode",
            )
        nodes[call] = record.node
    return nodes
