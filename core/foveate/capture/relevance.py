"""Relevance propagation through self- and cross-attention, for one row a target, without N x N matrices.

Chefer, Gur and Wolf 2021 (ICCV, arXiv:2103.15679). With Ā = mean_h relu(A * dL/dA) (eq. 5):

- self-attention (eq. 6, 7): R_ss += Ā R_ss, R_sq += Ā R_sq
- cross-attention (eq. 8-10): R_sq += R̄_ssᵀ Ā_sq R̄_qq, with R̄ = rownorm(R - I) + I

The authors hold every R. Here the wanted row ``w R`` is swept from the last step to the first. What R̄ needs
of the keys' stream is only the row sums of R - I, one forward sweep of a column vector; of the queries'
stream (learned queries: few) R itself. Sums are carried without the identity: forming R 1 and subtracting
one cancels (1e-4 in float32). A row of R - I that sums to zero stays zero: the authors' 0/0 becomes NaN and,
once replaced by zero, empties the whole map.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.capture.gradients import Round, by_round
from foveate.capture.merging import pull_back
from foveate.capture.streams import bottom_rows, own_part, start_of_reading, stream_tokens, through_calls
from foveate.capture.trace import Trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionStep, BoundTarget, MergeStep, OpaqueStep, Site

RULES = ("chefer_iccv21",)


def relevance(trace: Trace, bound: BoundTarget, *, rule: str = "chefer_iccv21", keep_graph: bool = True) -> Tensor:
    """Relevance of every token of ``trace.stream`` for each row of ``bound``: float32 ``(target, token)``.

    The trace must have been made with ``grad=True``; without ``keep_graph`` it can be explained only once, in
    less memory. The readout row itself counts one (R starts as the
    identity). Raises UsageError for an unknown rule, CaptureError where gradients or the stream are missing.
    """
    if rule not in RULES:
        raise UsageError(f"relevance: no rule {rule!r}", remedy=f"choose from {', '.join(RULES)}")
    site, weights = start_of_reading(trace, bound)
    return by_round(
        trace,
        bound,
        weights,
        lambda backward, start: _Sweep(trace, backward).run(site, start),
        keep_graph=keep_graph,
    )


@dataclass(eq=False)
class _Flowing:
    """Vectors of one stream, ``(sample, 1, token)``.

    ``moving`` is multiplied by what lies below; ``total`` is what has arrived: the same, except where
    R̄ divides the moving part only.
    """

    moving: Tensor
    total: Tensor


@dataclass(eq=False)
class _Normaliser:
    """What a cross step needs: R̄ of its queries ``(sample, query, query)``, row sums of R - I of its keys."""

    queries: Tensor | None
    keys: Tensor | None


@dataclass(eq=False)
class _Sweep:
    """One backward pass's rows through the flow."""

    trace: Trace
    backward: Round
    state: dict[str, _Flowing] = field(default_factory=dict)

    def run(self, site: Site, start: Tensor) -> Tensor:
        """From readout weights ``(sample, 1, query)`` to ``(sample, 1, token)`` over the bottom stream."""
        self.state[site.query] = _Flowing(start, start)
        normalisers = self._forward()
        stopped = ""
        for number, step in reversed(list(enumerate(self.trace.flow))):
            if isinstance(step, OpaqueStep):
                if step.stream in self.state:
                    stopped = step.name
                    break
            elif isinstance(step, MergeStep):
                self._unmerge(step)
            elif step.query in self.state:
                self._attend(step, normalisers.get(number))
        arrived = self.state.get(self.trace.stream)
        return bottom_rows(self.trace, None if arrived is None else arrived.total, stopped, list(self.state))

    def _attend(self, step: AttentionStep, normaliser: _Normaliser | None) -> None:
        if normaliser is None:
            here = self.state[step.query]
            moved = self._left(step, here.moving)
            kept = here if step.residual else self._others(step, here)
            self.state[step.query] = _Flowing(kept.moving + moved, kept.total + moved)
            return
        here = self.state[step.query]
        read = here.total if normaliser.queries is None else here.total @ normaliser.queries.transpose(-1, -2)
        moved = self._left(step, read)
        if not step.residual:
            self.state[step.query] = self._others(step, here)
        scaled = moved if normaliser.keys is None else _divide(moved, normaliser.keys.transpose(-1, -2))
        before = self.state.get(step.key)
        if before is not None:
            scaled, moved = before.moving + scaled, before.total + moved
        self.state[step.key] = _Flowing(scaled, moved)

    def _others(self, step: AttentionStep, here: _Flowing) -> _Flowing:
        """What a step's queries do not hold of their stream."""
        labels = self.trace.labels(step.call)
        return _Flowing(here.moving - own_part(here.moving, labels), here.total - own_part(here.total, labels))

    def _unmerge(self, step: MergeStep) -> None:
        if step.target not in self.state:
            return
        here = self.state.pop(step.target)
        for source, weights in step.parts:
            moving, total = pull_back(here.moving, weights), pull_back(here.total, weights)
            before = self.state.get(source)
            if before is not None:
                moving, total = before.moving + moving, before.total + total
            self.state[source] = _Flowing(moving, total)

    # ------------------------------------------------------------------- what R̄ needs, first step to last

    def _forward(self) -> dict[int, _Normaliser]:
        """R̄ parts at every cross step of the flow, by position."""
        crosses = [s for s in self.trace.flow if isinstance(s, AttentionStep) and s.query != s.key]
        if not crosses:
            return {}
        columns: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        keys, queries = _read_from(self.trace, crosses), {s.query for s in crosses}
        _refuse_carried(self.trace, queries)
        found = {}
        for number, step in enumerate(self.trace.flow):
            if isinstance(step, MergeStep) and step.target in keys:
                if step.source in columns:
                    columns[step.target] = _selected(step, columns[step.source])
                continue
            if not isinstance(step, AttentionStep):
                continue
            if step.query != step.key:
                found[number] = _Normaliser(_normalised(squares.get(step.query)), columns.get(step.key))
                continue
            if step.query in keys:
                columns[step.query] = self._grow(step, columns.get(step.query), square=False)
            if step.query in queries:
                squares[step.query] = self._grow(step, squares.get(step.query), square=True)
        return found

    def _grow(self, step: AttentionStep, before: Tensor | None, *, square: bool) -> Tensor:
        """X + Ā (I + X), for X = R - I itself (``square``) or its row sums ``(sample, token, column)``."""
        record = self.trace.record(step.call)
        samples, tokens = len(self.trace.batch), len(stream_tokens(self.trace.labels(step.call), "query"))
        if before is None:
            before = torch.zeros(samples, tokens, tokens if square else 1, device=record.device)
        identity = torch.eye(tokens, device=record.device) if square else 1.0
        return before + self._right(step, identity + before)

    def _left(self, step: AttentionStep, r: Tensor) -> Tensor:
        record, gradient = self.trace.record(step.call), self.backward.gradients.get(step.call)
        product = (
            (lambda x: x.new_zeros(*x.shape[:2], record.shape.keys))
            if gradient is None
            else (lambda x: record.grad_left(x, gradient))
        )
        return through_calls(r, self.trace.labels(step.call), record.shape[2:], product)

    def _right(self, step: AttentionStep, u: Tensor) -> Tensor:
        record, gradient = self.trace.record(step.call), self.backward.gradients.get(step.call)
        if gradient is None:
            return torch.zeros_like(u)
        sizes = (record.shape.keys, record.shape.queries)
        return through_calls(
            u.transpose(1, 2),
            self.trace.labels(step.call),
            sizes,
            lambda x: record.grad_right(x.transpose(1, 2), gradient).transpose(1, 2),
            reverse=True,
        ).transpose(1, 2)


def _refuse_carried(trace: Trace, queries: set[str]) -> None:
    """Raise CaptureError where queries of cross-attention come from a merge: R_qq of these has no rule."""
    for step in trace.flow:
        if isinstance(step, MergeStep) and step.target in queries:
            raise CaptureError(
                f"chefer_iccv21: queries of {step.target!r} that are made of others ({step.name or step.source}) "
                "and read again have no rule in the paper",
                remedy="use rollout or grad_attention",
            )


def _read_from(trace: Trace, crosses: list[AttentionStep]) -> set[str]:
    """Streams that cross-attention reads, directly or as a selection of their tokens."""
    keys = {step.key for step in crosses}
    for step in reversed(trace.flow):
        if isinstance(step, MergeStep) and step.target in keys:
            keys.add(step.source)
    return keys


def _selected(step: MergeStep, columns: Tensor) -> Tensor:
    """Row sums of R - I for tokens that are some of another stream's (one level of a pyramid): theirs.

    Raises CaptureError where tokens are mixed: R - I of a mixture has no rule in the paper.
    """
    if step.others or not _selects(step.matrix):
        raise CaptureError(
            f"chefer_iccv21: merged tokens ({step.name or step.target}) under cross-attention "
            "have no rule in the paper",
            remedy="use rollout or grad_attention",
        )
    return pull_back(columns.transpose(1, 2), step.matrix.transpose(-1, -2)).transpose(1, 2)


def _selects(matrix: Tensor) -> bool:
    """Whether every row of a matrix, dense or sparse, is one 1 and zeros."""
    entries, sums = matrix, matrix.sum(-1)
    if matrix.is_sparse:
        entries, sums = matrix.coalesce().values(), sums.to_dense()
    return bool(((entries == 0) | (entries == 1)).all() & (sums == 1).all())


def _normalised(grown: Tensor | None) -> Tensor | None:
    """R̄ = rownorm(R - I) + I from R - I; None stands for the identity."""
    if grown is None:
        return None
    identity = torch.eye(grown.shape[-1], device=grown.device)
    return _divide(grown, grown.sum(-1, keepdim=True)) + identity


def _divide(value: Tensor, by: Tensor) -> Tensor:
    """value / by with 0 where ``by`` is 0."""
    return torch.where(by != 0, value / by, torch.zeros_like(value))
