"""What each decoder layer would answer, where boxes are refined from layer to layer.

DAB-DETR, Deformable DETR, RT-DETR (v2), D-FINE and RF-DETR pass a reference box from each decoder layer to the
next (iterative refinement; Zhu et al. 2021, arXiv:2010.04159, section 4.2), so a layer's answer is its class head
and its box on top of the reference that it was given. All these states are in the base model's output; the rules
here are those by which each model reads its auxiliary answers in training. One forward gives all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from foveate.errors import ModelError

if TYPE_CHECKING:
    from foveate.interfaces import Batch
    from foveate_detr.detector import DetectorSource

EPSILON = 1e-5
"""Of transformers' inverse sigmoid: references are kept this far from 0 and 1."""
TOLERANCE = 1e-4


class Read(NamedTuple):
    """``logits`` (layer, sample, query, class) and normalised ``boxes`` (layer, sample, query, 4)."""

    logits: Tensor
    boxes: Tensor


def refined_answers(source: DetectorSource, batch: Batch) -> list[Any]:
    """The model's output once for each decoder layer, with that layer's logits and boxes in place of the last's.

    Raises ModelError where the last layer, read in this way, is not the model's own answer.
    """
    model: Any = source.module
    name = type(model).__name__
    read, context = READERS[name]
    heard: list[Any] = []
    hook = model.model.register_forward_hook(lambda _module, _inputs, output: heard.append(output))
    try:
        with torch.no_grad(), context(model):
            own = source.forward(batch)
            found = read(model, heard[-1])
    finally:
        hook.remove()
    _check_last(name, found, own)
    return [
        type(own)(**{**own, "logits": logits, "pred_boxes": boxes})
        for logits, boxes in zip(found.logits, found.boxes, strict=True)
    ]


def _dab(model: Any, base: Any) -> Read:
    """Class and box heads on every layer's state; boxes on the anchors that the layer was given."""
    states = base.intermediate_hidden_states
    deltas = model.bbox_predictor(states)
    deltas[..., : model.query_dim] += _logit(base.reference_points)
    return Read(model.class_embed(states), deltas.sigmoid())


def _deformable(model: Any, base: Any) -> Read:
    """A head a layer (copies of one without refinement); boxes on the reference that the layer was given."""
    states, given = base.intermediate_hidden_states, base.intermediate_reference_points
    logits, boxes = [], []
    for layer in range(states.shape[1]):
        reference = _logit(base.init_reference_points if layer == 0 else given[:, layer - 1])
        delta = model.bbox_embed[layer](states[:, layer])
        delta[..., : reference.shape[-1]] += reference
        logits.append(model.class_embed[layer](states[:, layer]))
        boxes.append(delta.sigmoid())
    return Read(torch.stack(logits), torch.stack(boxes))


def _rt(_: Any, base: Any) -> Read:
    """The decoder itself keeps logits and boxes of all layers."""
    return Read(base.intermediate_logits.transpose(0, 1), base.intermediate_reference_points.transpose(0, 1))


def _fine(model: Any, base: Any) -> Read:
    """As RT-DETR; the first entry is the first layer's preliminary answer, before distributions are refined."""
    every = _rt(model, base)
    return Read(every.logits[1:], every.boxes[1:])


def _rf(model: Any, base: Any) -> Read:
    """Shared heads; each box is on the reference of its layer (one for all where none is refined)."""
    states = base.intermediate_hidden_states
    return Read(*model.predict_class_and_boxes(states, base.intermediate_reference_points))


@contextmanager
def _all_scores(model: Any) -> Iterator[None]:
    """D-FINE's decoder scores its last layer only, unless it trains; everything else stays in eval."""
    decoder = model.model.decoder
    before = decoder.training
    decoder.training = True  # this module's own flag: train() would reach the dropout in its layers
    try:
        yield
    finally:
        decoder.training = before


READERS: Mapping[str, tuple[Callable[[Any, Any], Read], Callable[[Any], Any]]] = {
    "DabDetrForObjectDetection": (_dab, nullcontext),
    "DeformableDetrForObjectDetection": (_deformable, nullcontext),
    "RTDetrForObjectDetection": (_rt, nullcontext),
    "RTDetrV2ForObjectDetection": (_rt, nullcontext),
    "DFineForObjectDetection": (_fine, _all_scores),
    "RfDetrForObjectDetection": (_rf, nullcontext),
}
"""How each class of transformers is read, and what must hold meanwhile."""


def _logit(reference: Tensor) -> Tensor:
    """transformers' inverse sigmoid."""
    inside = reference.clamp(0, 1)
    return torch.log(inside.clamp(min=EPSILON) / (1 - inside).clamp(min=EPSILON))


def _check_last(name: str, found: Read, own: Any) -> None:
    """The last layer's answers are the model's own."""
    for what, read, said in (("logits", found.logits[-1], own.logits), ("boxes", found.boxes[-1], own.pred_boxes)):
        off = float((read - said).abs().amax()) if read.shape == said.shape else float("inf")
        if not off <= TOLERANCE * max(1.0, float(said.abs().amax())):
            raise ModelError(
                f"{name}: {what} of the last decoder layer, read by the model's own heads, are off by {off:.1e}",
                remedy="this version of transformers lays the decoder out otherwise",
            )
