"""What the sources say of real forwards: maps, masks, levels, objects, batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detr_models import CASES, photos, tiny
from foveate.capture.trace import trace
from foveate.errors import ModelError, UsageError
from foveate.interfaces import CallKey, Sample, Target

SHAPES = ((64, 90), (100, 60))
EAGER = {  # model -> site -> field of transformers' output
    "DETR": {
        "encoder.self": "encoder_attentions",
        "decoder.self": "decoder_attentions",
        "decoder.cross": "cross_attentions",
    },
    "Conditional DETR": {
        "encoder.self": "encoder_attentions",
        "decoder.self": "decoder_attentions",
        "decoder.cross": "cross_attentions",
    },
    "DAB-DETR": {"decoder.self": "decoder_attentions", "decoder.cross": "cross_attentions"},
    "Table Transformer": {"decoder.self": "decoder_attentions", "decoder.cross": "cross_attentions"},
    "YOLOS": {"encoder.self": "attentions"},
    "EoMT": {"encoder.self": "attentions"},
}


def entropy_ratio(rows: torch.Tensor) -> float:
    keys = rows.shape[-1]
    return float((-(rows * rows.clamp_min(1e-30).log()).sum(-1)).median() / np.log(keys))


@pytest.mark.parametrize("name", EAGER)
def test_maps_equal_transformers_eager_ones(name: str) -> None:
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    found = trace(source, batch)
    module: Any = source.module
    module.set_attn_implementation({"": "eager"})
    try:
        with torch.no_grad():
            eager = module(pixel_values=batch.inputs, output_attentions=True, **batch.per_sample)
    finally:
        module.set_attn_implementation({"": "sdpa"})
    peaked = []
    for site, field in EAGER[name].items():
        maps = eager[field]
        for layer in next(s for s in source.sites if s.id == site).layers:
            record = found.records[CallKey(site, layer)]
            rows = record.rows(range(record.shape.queries))
            theirs = maps[layer].reshape(rows.shape)
            torch.testing.assert_close(rows, theirs, atol=3e-5, rtol=0)
            peaked.append(entropy_ratio(rows))
    assert min(peaked) < 0.6, f"attention is near uniform everywhere: {peaked}"


@pytest.mark.parametrize(
    "name",
    [
        "Deformable DETR",
        "Deformable DETR, two stages",
        "RT-DETR",
        "RT-DETRv2, discrete",
        "D-FINE",
        "D-FINE, discrete",
        "RF-DETR",
        "Mask2Former",
    ],
)
def test_splat_equals_the_modules_output_in_float64(name: str) -> None:
    source = tiny(name, dtype="float64")
    batch = source.encode(photos(*SHAPES))
    found = trace(source, batch)
    errors = [
        record.certificate(range(record.shape.queries)).value_error
        for record in found.records.values()
        if record.form == "deformable"
    ]
    assert errors
    assert max(errors) < 1e-12


# ------------------------------------------------------------------------------- padding and levels


@pytest.mark.parametrize("name", ["DETR", "Conditional DETR", "DAB-DETR"])
def test_padding_receives_nothing_and_the_mask_is_where_the_image_is(name: str) -> None:
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    found = trace(source, batch)
    rows, columns = source.levels(batch)[0]
    mask = F.interpolate(batch.per_sample["pixel_mask"][:, None].float(), size=(rows, columns)).flatten(1) > 0
    assert not mask.all()
    for layer in (0, 1):
        record = found.records[CallKey("decoder.cross", layer)]
        weights = record.rows(range(record.shape.queries)).amax((1, 2))
        assert float(weights[~mask].max()) == 0.0
        assert bool((weights[mask] > 0).all())


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETR", "D-FINE", "Mask2Former"])
def test_levels_tile_the_input_in_the_models_order(name: str) -> None:
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    outputs = source.forward(batch)
    site = next(s for s in source.sites if s.form == "deformable")
    key = source.label(CallKey(site.id, site.layers[0]), batch, outputs).key
    height, width = batch.inputs.shape[-2:]
    assert sorted(set(key.level.tolist())) == list(range(len(source.strides)))
    start = 0
    for level, stride in enumerate(source.strides):
        rows, columns = -(-height // int(stride)), -(-width // int(stride))
        part = key.take(range(start, start + rows * columns))
        start += rows * columns
        assert set(part.level.tolist()) == {level}
        np.testing.assert_allclose(part.y[0], height / rows / 2)
        np.testing.assert_allclose(part.x[-1], width - width / columns / 2)
    assert start == len(key)


def test_masked_attention_reads_one_level_a_layer() -> None:
    source = tiny("Mask2Former")
    read = {
        layer: site.key for site in source.sites if site.id.startswith("decoder.cross") for layer in site.layers
    }
    assert read == {0: "encoder.p5", 1: "encoder.p4", 2: "encoder.p3", 3: "encoder.p5", 4: "encoder.p4"}
    batch = source.encode(photos(*SHAPES))
    found = trace(source, batch)
    assert found.records[CallKey("decoder.cross.p4", 4)].shape.keys == 8 * 8


# ------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("name", ["DETR", "Deformable DETR", "RT-DETR", "YOLOS"])
def test_predictions_equal_transformers_post_processing(name: str) -> None:
    from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
        DeformableDetrImageProcessorPil,
    )
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    source = tiny(name)
    samples = photos(*SHAPES)
    batch = source.encode(samples)
    outputs = source.forward(batch)
    sizes = torch.tensor(SHAPES)
    softmax = name in ("DETR", "YOLOS")
    processor = DetrImageProcessorPil() if softmax else DeformableDetrImageProcessorPil()
    more = {} if softmax else {"top_k": 10_000}
    expected = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes, **more)
    for theirs, ours in zip(expected, source.predictions(outputs, batch), strict=True):
        scores = theirs["scores"].tolist()
        for answer in ours:
            nearest = int(np.argmin([abs(s - answer.score) for s in scores]))
            assert scores[nearest] == pytest.approx(answer.score, abs=1e-6)
            assert int(theirs["labels"][nearest]) == answer.class_index
            left, top, right, bottom = theirs["boxes"][nearest].tolist()
            assert answer.box == pytest.approx((top, left, bottom, right), abs=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_each_target_is_read_from_its_own_query(name: str) -> None:
    source = tiny(name, threshold=0.0, max_objects=3)
    batch = source.encode(photos(*SHAPES))
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    assert len(bound) == 6
    (site, readout), *_ = source.readout(batch, outputs, bound).items()
    axis = source.label(CallKey(site, source._by_id[site].layers[-1]), batch, outputs).query
    kind = "patch" if name == "OWLv2" else "object"
    objects = axis.where(kind)
    for weights, row in zip(readout.weights, bound.rows, strict=True):
        assert int(weights.argmax()) == objects[row.object]
        assert float(weights.sum()) == float(weights.max()) == 1.0


@pytest.mark.parametrize("name", ["DETR segmentation", "Mask2Former"])
def test_masks_lie_on_the_original_pixels(name: str) -> None:
    source = tiny(name, threshold=0.0)
    batch = source.encode(photos(*SHAPES))
    outputs = source.forward(batch)
    logits = source.detections(outputs, batch).masks
    for i, answers in enumerate(source.predictions(outputs, batch)):
        for answer in answers:
            assert answer.mask is not None
            assert answer.mask.shape == SHAPES[i]
            # the pixel in the middle of a mask cell agrees with the cell where neighbours do
            rows, columns = logits.shape[-2:]
            geometry = batch.geometry[i]
            y, x = geometry.to_input(SHAPES[i][0] / 2, SHAPES[i][1] / 2)
            r, c = int(y / batch.inputs.shape[-2] * rows), int(x / batch.inputs.shape[-1] * columns)
            near = logits[i, answer.object, r - 1 : r + 2, c - 1 : c + 2] > 0
            if bool(near.all()) or not bool(near.any()):
                assert bool(answer.mask[SHAPES[i][0] // 2, SHAPES[i][1] // 2]) == bool(near.all())


# ------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("name", [n for n in CASES if n != "YOLOS"])
def test_a_sample_does_not_depend_on_its_batch_mates(name: str) -> None:
    """Encoded alone or with larger and smaller pictures: in float64 the same numbers but for rounding."""
    exact = name != "DAB-DETR"  # makes float32 positions
    source = tiny(name, dtype="float64" if exact else "float32")
    samples = photos((64, 90), (100, 60), (40, 200))
    together = source.encode(samples)
    found = source.detections(source.forward(together), together)
    for i, sample in enumerate(samples):
        single = source.encode([sample])
        alone = source.detections(source.forward(single), single)
        scale = float(found.answers[i].abs().max())
        assert float((alone.answers[0] - found.answers[i]).abs().max()) < (1e-9 if exact else 1e-4) * scale


def test_batch_canvas_depends_on_batch_mates_and_fixed_does_not() -> None:
    samples = photos((64, 90), (100, 60))
    moved = {}
    for canvas in ("fixed", "batch"):
        source = tiny("DETR", canvas=canvas)
        one, two = source.encode(samples[:1]), source.encode(samples)
        a, b = (source.detections(source.forward(x), x).answers[0] for x in (one, two))
        moved[canvas] = float((a - b).abs().max())
    assert moved["fixed"] < 1e-4 < moved["batch"]


# ------------------------------------------------------------------------------- bad input


def test_no_object_above_the_threshold_is_no_row_and_no_error() -> None:
    source = tiny("DETR", threshold=1.0)
    batch = source.encode(photos(*SHAPES))
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    assert len(bound) == 0
    assert source.score(outputs, batch, bound).shape == (0,)
    assert len(source.predictions(outputs, batch)[0]) == 7


@pytest.mark.parametrize("name", ["DETR", "Deformable DETR", "Mask2Former", "OWLv2"])
def test_one_pixel_and_a_thread_of_pixels_are_pictures(name: str) -> None:
    source = tiny(name)
    samples = [Sample("dot", np.full((1, 1, 3), 90, np.uint8)), Sample("thread", np.full((1, 40, 3), 9, np.uint8))]
    for sample in samples:
        batch = source.encode([sample])
        outputs = source.forward(batch)
        assert np.isfinite([p.score for p in source.predictions(outputs, batch)[0]]).all()


@pytest.mark.parametrize("name", ["DETR", "Deformable DETR"])
def test_an_all_padded_sample_is_a_result_and_leaves_the_others_alone(name: str) -> None:
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    mask = batch.per_sample["pixel_mask"].clone()
    mask[1] = 0
    batch = dataclasses.replace(batch, per_sample={**batch.per_sample, "pixel_mask": mask})
    outputs = source.forward(batch)
    answers = source.predictions(outputs, batch)
    assert np.isfinite([p.score for p in answers[1]]).all()
    alone = source.encode(photos(*SHAPES)[:1])
    expected = [p.score for p in source.predictions(source.forward(alone), alone)[0]]
    assert [p.score for p in answers[0]] == pytest.approx(expected, abs=1e-5)


def test_open_vocabulary_needs_prompts_and_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="what to look for"):
        tiny("OWLv2", prompts=None)
    with pytest.raises(ModelError, match="no tokenizer"):
        tiny("Grounding DINO", prompt_ids=None)
    with pytest.raises(UsageError, match="2 lists of token ids for 3 prompts"):
        tiny("OWLv2", prompt_ids=[[1], [2]])
    with pytest.raises(UsageError, match="the model reads 16"):
        tiny("Grounding DINO", prompt_ids=[[7] * 9, [8] * 9, [9]])


def test_prompts_are_scored_by_their_best_token() -> None:
    source = tiny("Grounding DINO")
    batch = source.encode(photos(*SHAPES))
    outputs = source.forward(batch)
    found = source.detections(outputs, batch).logits
    # [CLS] 7 8 . 7 9 . 7 11 12 . [SEP]
    for number, span in enumerate(((1, 2), (4, 5), (7, 8, 9))):
        torch.testing.assert_close(found[..., number], outputs.logits[..., list(span)].amax(-1))
    axis = source.label(CallKey("decoder.text", 0), batch, outputs).key
    assert axis.label == ("101", "7", "8", "1012", "7", "9", "1012", "7", "11", "12", "1012", "102")
    assert source.labels == ["a cat", "a dog", "a grey bird"]


def test_unknown_kinds_are_refused() -> None:
    source = tiny("Mask2Former")
    batch = source.encode(photos(*SHAPES))
    with pytest.raises(UsageError, match="no target kind 'box_top'"):
        source.bind(source.forward(batch), batch, Target(kind="box_top"))


@pytest.mark.parametrize(("name", "step"), [("RF-DETR", 32), ("RT-DETR", 32), ("D-FINE", 32), ("DETR", 1)])
def test_sizes_that_the_model_cannot_read_are_refused_when_it_is_opened(name: str, step: int) -> None:
    """Without the check windows or feature maps do not fit in the first forward, deep in the model."""
    source: Any = tiny(name, image_size=(2 * step + 64, 64))
    assert source.size_step == step
    assert source.forward(source.encode(photos((50, 70)))) is not None
    if step > 1:
        with pytest.raises(UsageError, match=f"multiples of {step}"):
            tiny(name, image_size=(64, 64 + step // 2))
