"""What a plain vision transformer is, for methods that are defined for nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.errors import UsageError
from foveate.interfaces import AttentionStep, CallKey

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource, Batch, Outputs


def plain_steps(
    source: AttentionSource, batch: Batch, outputs: Outputs, *, method: str, instead: str
) -> list[CallKey]:
    """The self-attention calls of a plain ViT, first layer first, all of one site and each layer once.

    Raises UsageError, naming ``method`` and what to use ``instead``, where tokens meet in any other way: pooling
    heads, cross-attention, windows, merged tokens, layers that run twice.
    """
    stream, calls = source.stream(batch), []

    def refuse(why: str) -> UsageError:
        return UsageError(
            f"{method}: defined for plain vision transformers, {source.card.id} is none: {why}", remedy=instead
        )

    for step in source.flow(batch, outputs):
        if not isinstance(step, AttentionStep):
            raise refuse(f"its flow has a {type(step).__name__} ({step.name})")
        if not step.residual or not step.query == step.key == stream:
            raise refuse(f"{step.call.site} attends from {step.query} to {step.key}")
        if [name for name, _ in source.label(step.call, batch, outputs).leading] != ["sample"]:
            raise refuse(f"{step.call.site} attends within parts of an image")
        calls.append(step.call)
    if len({call.site for call in calls}) != 1 or any(call.number for call in calls):
        raise refuse("its layers are not one site whose layers run once each")
    return calls
