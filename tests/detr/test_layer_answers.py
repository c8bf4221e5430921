"""Every decoder layer's own answer, against the auxiliary answers that transformers gives to the loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import CASES, photos, tiny
from foveate.detection.boxes import iou
from foveate.detection.readouts import LayerAnswers, LayeredDetector, layer_stability
from foveate.errors import ModelError, UsageError
from foveate_detr.detections import boxes_to_original
from foveate_detr.refined_layers import READERS, Read, _check_last

REFINED = (
    "DAB-DETR",
    "Deformable DETR",
    "Deformable DETR, refined",
    "Deformable DETR, two stages",
    "RT-DETR",
    "RT-DETRv2",
    "D-FINE",
    "RF-DETR",
)
LAYERS = 3


def opened(name: str) -> Any:
    """Three decoder layers; box heads are initialised to 0, so random ones make refinement visible."""
    base = "Deformable DETR" if name.endswith("refined") else name
    family, config = CASES[base]
    extra = {"decoder_layers": LAYERS} | ({"with_box_refine": True} if name.endswith("refined") else {})
    before = CASES[base]
    CASES[base] = (family, config | extra)
    try:
        source: Any = tiny(base)
    finally:
        CASES[base] = before
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path, value in source.module.named_parameters():
            if "bbox" in path and value.dim() == 2:
                value.normal_(0.0, 1.5 * value.shape[-1] ** -0.5, generator=generator)
    return source


def auxiliary(source: Any, batch: Any) -> list[Any]:
    """What transformers itself hands to its auxiliary losses: one dict for every layer but the last."""
    module = source.module
    module.config.auxiliary_loss = True
    objects = {"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]])}
    given: list[tuple[Any, Any]] = []

    def listen(
        logits: Any, labels: Any, device: Any, boxes: Any, config: Any, every: Any, coords: Any, *_: Any, **__: Any
    ) -> Any:
        given.append((every, coords))
        return torch.zeros(()), {}, []

    module.loss_function = listen
    with torch.no_grad():
        module(
            pixel_values=batch.inputs,
            pixel_mask=batch.per_sample.get("pixel_mask"),
            labels=[objects] * len(batch),
        )
    return given


def in_pixels(boxes: torch.Tensor, source: Any, batch: Any) -> np.ndarray:
    return boxes_to_original(boxes, batch.geometry, source._layout.get("boxes", "image")).double().numpy()


@pytest.mark.parametrize("name", [name for name in REFINED if name != "D-FINE"])
def test_layers_are_the_auxiliary_answers(name: str) -> None:
    source = opened(name)
    batch = source.encode(photos((64, 96), (80, 70)))
    found: list[LayerAnswers] = source.layer_answers(batch)
    assert [one.layer for one in found] == list(range(LAYERS))
    (logits, boxes) = auxiliary(source, batch)[-1]
    if name.startswith("RT"):  # (sample, layer, ...)
        logits, boxes = logits.transpose(0, 1), boxes.transpose(0, 1)
    assert len(logits) == len(boxes) == LAYERS
    for layer, answers in enumerate(found):
        scores = (
            logits[layer].softmax(-1)[..., :-1]
            if answers.probabilities.shape[-1] < logits.shape[-1]
            else logits[layer].sigmoid()
        )
        np.testing.assert_allclose(answers.probabilities, scores.double().numpy(), atol=1e-5)
        np.testing.assert_allclose(answers.boxes, in_pixels(boxes[layer], source, batch), atol=1e-3, rtol=1e-4)


def test_fine_layers_from_its_heads() -> None:
    """In eval D-FINE scores its last layer only; here every one by hand (Peng et al. 2024, arXiv:2410.13842)."""
    source = opened("D-FINE")
    decoder = source.module.model.decoder
    batch = source.encode(photos((64, 96), (80, 70)))
    states: list[torch.Tensor] = []
    given: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, out: states.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder.layers
    ]
    hooks.append(
        decoder.layers[0].register_forward_pre_hook(
            lambda _m, _a, kwargs: given.append(kwargs["reference_points"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        own = source.forward(batch)
    for hook in hooks:
        hook.remove()
    found = source.layer_answers(batch)
    assert not decoder.training
    assert not any(module.training for module in source.module.modules())
    from transformers.models.d_fine.modeling_d_fine import distance2bbox, weighting_function

    with torch.no_grad():
        project = weighting_function(decoder.max_num_bins, decoder.up, decoder.reg_scale)
        first = torch.special.logit(given[0][:, :, 0], eps=1e-5)
        start = torch.sigmoid(decoder.pre_bbox_head(states[0]) + first)
        corners, before = torch.zeros(()), torch.zeros(())
        for layer, (answers, state) in enumerate(zip(found, states, strict=True)):
            corners = decoder.bbox_embed[layer](state + before) + corners
            bins = corners.reshape(-1, decoder.max_num_bins + 1).softmax(-1) @ project
            box = distance2bbox(start, bins.reshape(*corners.shape[:2], 4), decoder.reg_scale)
            scores = decoder.lqe_layers[layer](decoder.class_embed[layer](state), corners)
            before = state
            np.testing.assert_allclose(answers.probabilities, scores.sigmoid().double().numpy(), atol=1e-5)
            np.testing.assert_allclose(answers.boxes, in_pixels(box, source, batch), atol=1e-3, rtol=1e-4)
    np.testing.assert_allclose(found[-1].probabilities, own.logits.sigmoid().double().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", REFINED)
def test_the_last_layer_is_the_models_own_answer(name: str) -> None:
    source = opened(name)
    batch = source.encode(photos((64, 96), (80, 70)))
    last = source.layer_answers(batch)[-1]
    with torch.no_grad():
        own = source.detections(source.forward(batch), batch)
    np.testing.assert_allclose(last.probabilities, own.probabilities.double().numpy(), atol=1e-5)
    np.testing.assert_allclose(last.boxes, own.boxes.double().numpy(), atol=1e-3, rtol=1e-4)
    assert isinstance(source, LayeredDetector)


def test_boxes_move_from_layer_to_layer_and_stability_says_how_far() -> None:
    source = opened("Deformable DETR, refined")
    batch = source.encode(photos((64, 96)))
    answers = source.layer_answers(batch)
    p, b = (np.stack([getattr(one, name)[0] for one in answers]) for name in ("probabilities", "boxes"))
    assert np.abs(b[0] - b[-1]).max() > 1.0
    queries = p[-1].max(-1).argsort()[::-1][:3]
    found = layer_stability(p, b, p[-1][queries].argmax(-1), b[-1][queries], size=(64, 96))
    assert found.same_query[-1] == 1.0
    assert found.overlap[-1] == pytest.approx(1.0)
    expected = [float(iou(torch.from_numpy(b[0][q]), torch.from_numpy(b[-1][q]))) for q in queries]
    assert found.overlap[0] == pytest.approx(float(np.mean(expected)))


def test_what_cannot_be_read_and_what_reads_wrong_is_said() -> None:
    source: Any = tiny("YOLOS")
    with pytest.raises(UsageError, match="DabDetrForObjectDetection"):
        source.layer_answers(source.encode(photos((64, 96))))
    good = Read(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))
    own = type("Output", (), {"logits": torch.ones(1, 3, 4), "pred_boxes": torch.zeros(1, 3, 4)})()
    with pytest.raises(ModelError, match="logits of the last decoder layer"):
        _check_last("Model", good, own)
    assert set(READERS) <= {
        f"{n}ForObjectDetection" for n in ("DabDetr", "DeformableDetr", "RTDetr", "RTDetrV2", "DFine", "RfDetr")
    }
