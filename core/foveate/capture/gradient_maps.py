"""Two maps that weigh attention by its gradient without propagating it: grad x attention, and LeGrad."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from foveate.capture.blocks import left_product
from foveate.capture.gradients import Round, by_round
from foveate.capture.merging import pull_back
from foveate.capture.records import Record
from foveate.capture.streams import start_of_reading, stream_tokens, through_calls
from foveate.capture.trace import Trace
from foveate.errors import CaptureError
from foveate.interfaces import AttentionStep, BoundTarget, CallKey, MergeStep


def grad_attention(trace: Trace, bound: BoundTarget, *, keep_graph: bool = True) -> Tensor:
    """Readout rows of mean_h relu(A * dL/dA) at the last layer of the readout's site: ``(target, token)``.

    Where that layer runs once for every frame, all its runs together.

    The gradient-weighted attention of Chefer et al. 2021 (ICCV, eq. 5) without propagation. Columns are
    tokens of ``trace.stream``: the site's key stream, or what that was merged from (a level of a pyramid).
    Raises CaptureError where the site reads neither.
    ``keep_graph`` as for :func:`~foveate.capture.relevance.relevance`.
    """
    site, weights = start_of_reading(trace, bound)
    steps = [s for s in trace.flow if isinstance(s, AttentionStep) and s.call.site == site.id]
    merges = None if not steps else _merges_below(trace, steps[-1])
    if merges is None:
        raise CaptureError(
            f"grad x attention: {site.id} does not read from {trace.stream!r}", remedy="use relevance"
        )
    calls = _runs(trace, [step.call for step in steps])

    def one(backward: Round, start: Tensor) -> Tensor:
        parts = [_weighted_rows(trace, call, backward.gradients.get(call), start) for call in calls]
        found = torch.stack(parts).sum(0)
        for merge in merges:
            found = pull_back(found, merge.matrix)
        return found

    return by_round(trace, bound, weights, one, keep_graph=keep_graph, calls=calls)


def _runs(trace: Trace, calls: list[CallKey]) -> list[CallKey]:
    """The last call, with those of its layer that hold other parts of the clip."""
    last = calls[-1]
    return [call for call in calls if call.layer == last.layer] if trace.labels(last).partial else [last]


def _weighted_rows(trace: Trace, call: CallKey, gradient: Tensor | None, start: Tensor) -> Tensor:
    """``start @ mean_h relu(A * dL/dA)`` of one call, ``(sample, 1, token)``."""
    record, labels = trace.record(call), trace.labels(call)
    if gradient is None:
        return start.new_zeros(*start.shape[:2], len(stream_tokens(labels)))
    return through_calls(start, labels, record.shape[2:], lambda r: record.grad_left(r, gradient))


def _merges_below(trace: Trace, step: AttentionStep) -> list[MergeStep] | None:
    """The merges between a step's keys and the bottom stream, last first; None where keys are not made of it."""
    stream, merges = step.key, []
    for below in reversed(trace.flow[: trace.flow.index(step)]):
        if isinstance(below, MergeStep) and below.target == stream and stream != trace.stream:
            if below.others:
                return None
            stream = below.source
            merges.append(below)
    return merges if stream == trace.stream else None


def legrad(
    trace: Trace, bound: BoundTarget, *, calls: Collection[CallKey] | None = None, keep_graph: bool = True
) -> Tensor:
    """Mean over layers, heads and queries of relu(dL/dA): ``(target, token)``.

    LeGrad (Bousselham et al. 2024, arXiv:2404.03214), with L the model's own score at every layer;
    the paper scores each layer's tokens with the final head, which equals this at the last layer (and is
    :mod:`foveate.attribution.legrad_layers`). All steps that read from ``trace.stream`` count, or those in
    ``calls``. Raises CaptureError where there is none.
    """
    steps = [step for step in _reading_steps(trace) if calls is None or step.call in calls]
    if not steps:
        raise CaptureError(f"LeGrad: no attention reads from {trace.stream!r}")
    # Calls that hold parts of a clip are one layer together.
    layers = len({s.call if not trace.labels(s.call).partial else s.call[:2] for s in steps})

    def one(backward: Round, start: Tensor) -> Tensor:
        parts = [_column_means(trace, step, backward.gradients.get(step.call)) for step in steps]
        return torch.stack(parts).sum(0) / layers

    weights, needed = start_of_reading(trace, bound)[1], [step.call for step in steps]
    return by_round(trace, bound, weights, one, keep_graph=keep_graph, calls=needed)


def _column_means(trace: Trace, step: AttentionStep, gradient: Tensor | None) -> Tensor:
    """Mean over heads and queries of relu(dL/dA), ``(sample, 1, token)``."""
    record, labels = trace.record(step.call), trace.labels(step.call)
    queries, keys = record.shape[2:]
    count = len(stream_tokens(labels, "query"))
    ones = torch.full((len(trace.batch), 1, count), 1 / count, device=record.device)
    if gradient is None:
        return ones.new_zeros(len(trace.batch), 1, len(stream_tokens(labels)))
    return through_calls(ones, labels, (queries, keys), lambda r: _positive_left(record, r, gradient))


def _positive_left(record: Record, r: Tensor, gradient: Tensor) -> Tensor:
    """``r @ mean_h relu(dL/dA)``."""
    ready = record.prepared()
    blocks = (
        (positions, ready.weight_gradient(positions, gradient).relu_().mean(1)) for positions in record.positions()
    )
    return left_product(blocks, r, record.shape.keys)


def _reading_steps(trace: Trace) -> list[AttentionStep]:
    steps = (step for step in trace.flow if isinstance(step, AttentionStep))
    return [step for step in steps if step.key == trace.stream]
