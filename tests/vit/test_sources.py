"""Every family: attention against the library's own eager maps, readouts against gradients, batches, targets."""

from __future__ import annotations

from math import log
from typing import Any

import numpy as np
import pytest
import torch

from foveate.capture.engine import capture_batch
from foveate.capture.trace import trace
from foveate.errors import SampleError, UsageError
from foveate.interfaces import TOKEN_KINDS, Batch, CallKey, CapturePlan, Sample, SitePlan, Target
from foveate_vit.vision import ENCODER, POOL
from vit_models import CASES, CLASSIFIERS, ENCODERS, open_tiny, photos


def eager_maps(source: Any, batch: Batch) -> list[torch.Tensor]:
    """The library's own maps, layer by layer, ``(sample, head, query, key)``."""
    tower = source.tower
    tower.set_attn_implementation("eager")
    try:
        arguments: dict[str, Any] = {"pixel_values": batch.inputs, "output_attentions": True}
        with torch.no_grad():
            found = tower(**arguments) if not hasattr(source, "_input_size") else naflex_call(source, batch)
        return list(found.attentions)
    finally:
        tower.set_attn_implementation("sdpa")


def naflex_call(source: Any, batch: Batch) -> Any:
    def call(**arguments: Any) -> Any:
        return source.tower(**arguments, output_attentions=True)

    return source._call(call, batch.inputs)


def pool_maps(source: Any, batch: Batch) -> torch.Tensor:
    """The pooling head's weights, from its own projections, float64 ``(sample, head, 1, key)``."""
    head = source.tower.head
    seen: list[torch.Tensor] = []
    hook = head.attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:2]))
    source.forward(batch)
    hook.remove()
    attention = head.attention
    probe, tokens = (value.detach().double() for value in seen)
    (wq, wk, _), (bq, bk, _) = attention.in_proj_weight.double().chunk(3), attention.in_proj_bias.double().chunk(3)
    q = (probe @ wq.T + bq).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    k = (tokens @ wk.T + bk).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


@pytest.mark.parametrize("case", CASES)
def test_captured_attention_is_the_librarys_own_and_not_uniform(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos())
    theirs = eager_maps(source, batch)
    plan = CapturePlan((SitePlan(ENCODER, rows="all"),), dtype="float32")
    captured = capture_batch(source, batch, plan).sites[ENCODER]
    mine = captured.arrays["attention"]  # (sample, layer, head, query, key)
    assert mine.shape[1] == len(theirs) == 3
    assert list(captured.layers) == [0, 1, 2]
    for layer, expected in enumerate(theirs):
        np.testing.assert_allclose(mine[:, layer], expected.numpy(), atol=5e-6)
    entropy = -np.sum(mine * np.log(np.maximum(mine, 1e-30)), -1)
    assert np.median(entropy) < 0.6 * log(mine.shape[-1])


@pytest.mark.parametrize("case", ["SiglipVisionModel", "SiglipModel", "Siglip2Model"])
def test_the_pooling_head_is_a_site_of_its_own(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos())
    captured = capture_batch(source, batch, CapturePlan((SitePlan(POOL),), dtype="float32")).sites[POOL]
    assert captured.rule == "pooling head"
    np.testing.assert_allclose(
        captured.arrays["attention"].reshape(3, 4, 1, 16), pool_maps(source, batch).numpy(), atol=3e-6
    )


@pytest.mark.parametrize("case", CASES)
def test_a_batch_is_its_singles(case: str) -> None:
    source = open_tiny(case)
    samples = photos()
    together = source.encode(samples)
    outputs = source.forward(together)
    scores = source.score(outputs, together, source.bind(outputs, together, Target(scale="logit")))
    for i, sample in enumerate(samples):
        alone = source.encode([sample])
        out = source.forward(alone)
        score = source.score(out, alone, source.bind(out, alone, Target(scale="logit")))
        torch.testing.assert_close(score[0], scores[i], atol=2e-5, rtol=2e-5)
        assert alone.geometry[0] == together.geometry[i]


def last_tokens(source: Any, batch: Batch) -> tuple[Any, torch.Tensor]:
    """Outputs, and the last encoder layer's output ``(sample, token, channel)`` with its graph."""
    site = next(site for site in source.sites if site.id == ENCODER)
    path = max(site.modules, key=lambda name: site.modules[name])
    seen: list[torch.Tensor] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        hidden.retain_grad()
        seen.append(hidden)

    hook = source.module.get_submodule(path.rsplit(".", 1)[0]).register_forward_hook(keep)
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    hook.remove()
    return outputs, seen[0]


@pytest.mark.parametrize("case", CASES)
def test_the_answer_depends_on_exactly_the_tokens_of_the_readout(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos(2))
    outputs, tokens = last_tokens(source, batch)
    bound = source.bind(outputs, batch, Target(scale="logit"))
    source.score(outputs, batch, bound).sum().backward()
    touched = tokens.grad.abs().sum(-1) > 1e-9
    readout = source.readout(batch, outputs, bound)
    if ENCODER in readout:
        expected = readout[ENCODER].weights > 0
        torch.testing.assert_close(readout[ENCODER].weights.sum(1), torch.ones(2))
    else:  # the pooling head reads every patch
        assert list(readout) == [POOL]
        expected = torch.ones(2, 16, dtype=torch.bool)
    assert torch.equal(touched, expected)


@pytest.mark.parametrize("case", CASES)
def test_what_is_known_before_the_forward_is_the_readout(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos(2))
    fixed, late = source.fixed_readout(batch), source.readout(batch, source.forward(batch))
    assert fixed.keys() == late.keys()
    for name, readout in late.items():
        assert readout.rule == fixed[name].rule
        assert torch.equal(readout.weights, fixed[name].weights)


@pytest.mark.parametrize(
    ("case", "prefix"),
    [
        ("ViTModel", ["cls"]),
        ("DeiTModel", ["cls", "cls"]),
        ("Dinov2WithRegistersModel", ["cls", *["register"] * 3]),
        ("DINOv3ViTModel", ["cls", *["register"] * 2]),
        ("SiglipModel", []),
    ],
)
def test_tokens_are_named_and_placed(case: str, prefix: list[str]) -> None:
    source = open_tiny(case)
    batch = source.encode(photos(1))
    axis = source.label(CallKey(ENCODER, 0), batch, source.forward(batch)).key
    assert [TOKEN_KINDS[k] for k in axis.kind] == prefix + ["patch"] * 16
    assert axis.label is None or axis.label[:2] == ("cls", "distillation")
    patches = axis.where("patch")
    np.testing.assert_array_equal(axis.y[patches].reshape(4, 4)[:, 0], [3.5, 10.5, 17.5, 24.5])
    np.testing.assert_array_equal(axis.x[patches].reshape(4, 4)[0], [3.5, 10.5, 17.5, 24.5])
    assert source.cells(batch).shape == (4, 4)
    assert source.facts()["prefix"] == len(prefix)


@pytest.mark.parametrize("case", ["ViTModel", "Dinov2WithRegistersModel", "SiglipModel"])
def test_a_bright_square_lights_the_embedding_of_its_own_token(case: str) -> None:
    source = open_tiny(case)
    grey = np.full((28, 28, 3), 120, np.uint8)
    lit = grey.copy()
    lit[14:21, 7:14] = 255  # row 2, column 1
    batch = source.encode([Sample("grey", grey), Sample("lit", lit)])
    name = next(n for n, _ in source.tower.named_modules() if n.endswith(("patch_embeddings", "patch_embedding")))
    seen: list[torch.Tensor] = []
    hook = source.tower.get_submodule(name).register_forward_hook(lambda _, __, out: seen.append(out))
    outputs = source.forward(batch)
    hook.remove()
    patches = seen[0] if seen[0].ndim == 3 else seen[0].flatten(2).transpose(1, 2)
    changed = (patches[1] - patches[0]).abs().sum(-1) > 1e-6
    tokens = source.label(CallKey(ENCODER, 0), batch, outputs).key
    at = tokens.where("patch")[changed.numpy()]
    assert [(float(tokens.y[i]), float(tokens.x[i])) for i in at] == [(17.5, 10.5)]


@pytest.mark.parametrize("case", ENCODERS)
def test_the_feature_target_has_a_gradient_where_cosine_and_dot_product_have_none(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos(2))
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    bound = source.bind(outputs, batch, Target())
    assert bound.scale == "value"
    scores = source.score(outputs, batch, bound)
    (gradient,) = torch.autograd.grad(scores.sum(), batch.inputs, retain_graph=True)
    embedding = source.embedding(outputs)
    own = embedding.detach() / embedding.detach().norm(dim=-1, keepdim=True)
    cosine = (torch.nn.functional.normalize(embedding, dim=-1) * own).sum()
    (vanishing,) = torch.autograd.grad(cosine, batch.inputs)
    assert gradient.norm() > 1e3 * vanishing.norm() * scores.norm()
    blank = batch.replace(torch.zeros_like(batch.inputs).detach(), [0, 1])
    torch.testing.assert_close(
        source.score(source.forward(blank), blank, bound), torch.zeros(2), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("case", ["ViTForImageClassification", "DINOv3ViTModel", "SiglipModel"])
def test_gradients_reach_the_pixels_as_finite_differences_say(case: str) -> None:
    source = open_tiny(case, dtype="float64")
    batch = source.encode(photos(2))
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    bound = source.bind(outputs, batch, Target(scale="logit"))
    (gradient,) = torch.autograd.grad(source.score(outputs, batch, bound).sum(), batch.inputs)
    step = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(h: float) -> float:
        moved = batch.replace((batch.inputs + h * step).detach(), [0, 1])
        return float(source.score(source.forward(moved), moved, bound).double().sum())

    slope = (at(1e-3) - at(-1e-3)) / 2e-3
    assert slope == pytest.approx(float((gradient * step).sum()), rel=2e-2)


def test_a_frozen_target_survives_expansion() -> None:
    source = open_tiny("ViTForImageClassification")
    batch = source.encode(photos(3))
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    scores = source.score(outputs, batch, bound)
    index = [2, 0, 0, 1]
    expanded = batch.replace(batch.inputs[index], index)
    again = source.score(source.forward(expanded), expanded, bound.take(index))
    torch.testing.assert_close(again, scores[index])


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_predictions_scores_and_targets_agree(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(photos(2))
    outputs = source.forward(batch)
    probabilities = outputs.logits.double().softmax(-1)
    for sample, row in enumerate(source.predictions(outputs, batch)):
        assert [p.score for p in row] == sorted((p.score for p in row), reverse=True)
        assert row[0].class_index == int(probabilities[sample].argmax())
        assert row[0].score == pytest.approx(float(probabilities[sample].max()), rel=1e-5)
    label = source.predictions(outputs, batch)[0][-1].label
    for target in (Target(label=label), Target(label=label.lower()), Target(label=int(label.split("_")[1]))):
        bound = source.bind(outputs, batch, target)
        assert {row.label for row in bound.rows} == {label}
        index = bound.rows[0].class_index
        torch.testing.assert_close(source.score(outputs, batch, bound).double(), probabilities[:, index])
        torch.testing.assert_close(source.score(outputs, batch, bound.at("logit")), outputs.logits[:, index])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target(label="no such class"), "not one of"),
        (Target(label=5), "no class 5"),
        (Target(kind="feature"), "no target kind"),
        (Target(object=0), "no object"),
    ],
)
def test_an_impossible_target_is_refused_with_the_remedy(target: Target, message: str) -> None:
    source = open_tiny("ViTForImageClassification")
    batch = source.encode(photos(1))
    with pytest.raises(UsageError, match=message):
        source.bind(source.forward(batch), batch, target)


def test_another_input_size_interpolates_positions_and_moves_the_grid() -> None:
    source = open_tiny("ViTModel", image_size=42)
    batch = source.encode(photos(1))
    assert batch.inputs.shape == (1, 3, 42, 42)
    assert source.cells(batch).shape == (6, 6)
    record = trace(source, batch).record(CallKey(ENCODER, 0))
    assert record.shape == (1, 4, 37, 37)


def test_a_rim_narrower_than_a_patch_belongs_to_no_cell() -> None:
    source = open_tiny("Dinov2Model", image_size=(30, 40))
    batch = source.encode(photos(1))
    assert source.cells(batch).shape == (4, 5)
    assert (source.cells(batch).y[-1], source.cells(batch).x[-1]) == (28.0, 35.0)
    assert len(source.label(CallKey(ENCODER, 0), batch, source.forward(batch)).key) == 21


def test_an_empty_batch_stays_empty_and_a_clip_is_refused() -> None:
    source = open_tiny("ViTForImageClassification")
    assert source.encode([]).inputs.shape == (0, 3, 28, 28)
    with pytest.raises(SampleError, match="'film'"):
        source.encode([Sample("film", np.zeros((2, 30, 30, 3), np.uint8))])


@pytest.mark.parametrize("case", CASES)
def test_a_trace_follows_the_flow_to_the_readout(case: str) -> None:
    from foveate.capture.rollout import rollout

    source = open_tiny(case)
    batch = source.encode(photos(2))
    swept = rollout(trace(source, batch))
    values = torch.as_tensor(swept)
    torch.testing.assert_close(values.sum(-1).float(), torch.ones(2), atol=1e-4, rtol=0)
