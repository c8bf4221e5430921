"""What each decoder layer would answer: the model's own heads on the output of every layer.

DETR, Conditional DETR and Table Transformer are trained with the same heads after each decoder layer (auxiliary
losses), but put out the last answer only. Here the model runs again for each layer with that layer's output
(through the decoder's norm) in place of the last one; heads and reference points stay the model's. Models with
``auxiliary_loss`` norm every layer's output on the way and the last one twice: their earlier layers were trained
to be read after one norm, which is how they are read here, and the last is always the model's own answer.
Detectors that refine boxes from layer to layer are read by :mod:`foveate_detr.refined_layers`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from foveate.detection.readouts import LayerAnswers
from foveate.errors import ModelError, UsageError
from foveate_detr.refined_layers import READERS, refined_answers

if TYPE_CHECKING:
    from foveate.interfaces import Batch
    from foveate_detr.detections import Detections
    from foveate_detr.detector import DetectorSource

SHARED_HEADS = (
    "DetrForObjectDetection",
    "ConditionalDetrForObjectDetection",
    "TableTransformerForObjectDetection",
)
"""Classes of transformers whose heads serve every decoder layer without boxes that are refined on the way."""
TOLERANCE = 1e-4


def layer_answers(source: DetectorSource, batch: Batch) -> list[LayerAnswers]:
    """Answers of every decoder layer, first to last; the last are the model's own.

    Raises UsageError for models without heads for all layers, ModelError where the last layer,
    read in this way, is not the model's own last state.
    """
    name = type(source.module).__name__
    if name in READERS:
        outputs = refined_answers(source, batch)
        return [_answers(layer, source.detections(output, batch)) for layer, output in enumerate(outputs)]
    if name not in SHARED_HEADS:
        raise UsageError(
            f"{source.card.id}: {name} has no heads that read every decoder layer",
            remedy=f"available for {', '.join((*SHARED_HEADS, *READERS))}",
        )
    base: Any = source.module.model
    own, states = _layer_states(source, batch, base.decoder)
    with torch.no_grad():
        read = [base.decoder.layernorm(state) for state in states]
        _check_last(name, base.decoder.layernorm, read[-1], own.last_hidden_state)
    answers = []
    for number, state in enumerate(read[:-1]):
        with base.register_forward_hook(_instead(state)):
            answers.append(_answers(number, source.detections(source.forward(batch), batch)))
    return [*answers, _answers(len(read) - 1, source.detections(own, batch))]


def _layer_states(source: DetectorSource, batch: Batch, decoder: Any) -> tuple[Any, list[torch.Tensor]]:
    """The model's output and what each decoder layer put out."""
    states: list[torch.Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks, torch.no_grad():
        for layer in decoder.layers:
            hooks.enter_context(layer.register_forward_hook(keep))
        return source.forward(batch), states


def _instead(state: torch.Tensor) -> Any:
    """A hook that gives the base model's output another last hidden state."""

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        return type(output)(**{**output, "last_hidden_state": state})

    return replace


def _answers(layer: int, found: Detections) -> LayerAnswers:
    assert found.boxes is not None  # detectors that are read layer by layer have boxes
    probabilities, boxes = (t.detach().cpu().double().numpy() for t in (found.probabilities, found.boxes))
    return LayerAnswers(layer, probabilities, boxes)


def _check_last(name: str, norm: Any, read: torch.Tensor, own: torch.Tensor) -> None:
    """The decoder's own last state is the last layer's after one norm, or two."""
    off = min(float((state - own).abs().amax()) for state in (read, norm(read)))
    if not off <= TOLERANCE * max(1.0, float(own.abs().amax())):
        raise ModelError(
            f"{name}: its last decoder layer, read through the decoder's norm, is off by {off:.1e}",
            remedy="this version of transformers lays the decoder out otherwise",
        )
