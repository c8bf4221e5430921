"""The sweep of relevance from a score down to the attention weights, last operation first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.attribution.lrp.operations import give
from foveate.attribution.lrp.recording import Operation, Recording, Value
from foveate.errors import CaptureError


def relevance_at(recorded: Recording, score: Tensor, wanted: Sequence[Operation]) -> list[Tensor]:
    """Relevance of the results of ``wanted``, float64 in their shapes, when ``score`` starts with ones.

    The explained class starts with one and the others with zero (arXiv:2012.09838, sec. 3.1). Operations before
    the first of ``wanted`` are not visited and need no rule. Raises UsageError at an operation without one,
    CaptureError for a score that was not computed from the inputs.
    """
    start = recorded.exact(score)
    if start is None:
        raise CaptureError(
            "relevance: the score was not computed from the inputs",
            remedy="the source's forward or score detaches",
        )
    found: dict[Operation, Tensor] = {}
    arrived = {Value.of(start): torch.ones_like(start)}
    for operation in reversed(recorded.operations):
        if len(found) == len(wanted):
            break
        relevance = _taken(arrived, operation)
        if operation in wanted:
            found[operation] = relevance[0]
        if any(part.any() for part in relevance) or operation.in_place:
            _pass_on(arrived, operation, relevance, recorded)
    return [found[operation] for operation in wanted]


def _taken(arrived: dict[Value, Tensor], operation: Operation) -> list[Tensor]:
    """What arrived at each result (and is there no longer), zero where nothing did."""
    places = [Value.of(output) for output in operation.outputs]
    return [
        arrived.pop(place) if place in arrived else torch.zeros_like(output)
        for place, output in zip(places, operation.outputs, strict=True)
    ]


def _pass_on(
    arrived: dict[Value, Tensor], operation: Operation, relevance: list[Tensor], recorded: Recording
) -> None:
    """Add what the operation's rule gives to its operands: a tensor that was read twice gets the sum."""
    for operand, part in give(operation, relevance, recorded.depends):
        place, part = Value.of(operand), part.to(operand.device)
        arrived[place] = arrived[place] + part if place in arrived else part
