"""Text towers: the model's own embeddings, causal attention, and where the prompt is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from foveate.capture.engine import capture_batch
from foveate.errors import ModelError, SampleError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate_vit.text import ENCODER
from vit_models import TEXT, photos, sharpen, toy_tokenizer

CASES = {
    "CLIPTextModelWithProjection": TEXT | {"model_type": "clip_text_model"},
    "CLIPModel": {"text_config": TEXT, "model_type": "clip", "architectures": ["CLIPModel"]},
    "SiglipTextModel": TEXT | {"model_type": "siglip_text_model"},
    "Siglip2TextModel": TEXT | {"model_type": "siglip2_text_model"},
}


def open_text(case: str, **changes: Any) -> Any:
    config = {**CASES[case], "architectures": [case], **changes}
    if case == "CLIPModel":
        config["vision_config"] = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    source = open_source("clip-text", weights="random", config=config, tokenizer=toy_tokenizer())
    sharpen(source.module)
    return source


def own_call(source: Any, ids: torch.Tensor, **more: Any) -> Any:
    call = getattr(source.module, "get_text_features", source.module)
    with torch.no_grad():
        return call(input_ids=ids, **more)


@pytest.mark.parametrize("case", CASES)
def test_the_embedding_is_the_models_own(case: str) -> None:
    source = open_text(case)
    batch = source.encode(photos(3))
    theirs = own_call(source, batch.per_sample["input_ids"])
    expected = theirs.text_embeds if "text_embeds" in theirs else theirs.pooler_output
    assert torch.equal(source.forward(batch), expected)
    assert not source.tower.embeddings.token_embedding._forward_hooks


@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_librarys_own_and_causal_only_in_clip(case: str) -> None:
    source = open_text(case)
    batch = source.encode(photos(3))
    plan = CapturePlan((SitePlan(ENCODER, rows="all"),), dtype="float32")
    mine = capture_batch(source, batch, plan).sites[ENCODER].arrays["attention"]
    source.module.set_attn_implementation("eager")
    theirs = own_call(source, batch.per_sample["input_ids"], output_attentions=True).attentions
    for layer, expected in enumerate(theirs):
        np.testing.assert_allclose(mine[:, layer], expected.numpy(), atol=5e-6)
    future = np.triu(np.ones((16, 16), bool), 1)
    assert (mine[..., future] == 0).all() == source.is_causal
    assert source.sites[0].masks == (("causal",) if source.is_causal else ())


@pytest.mark.parametrize(("case", "end"), [("CLIPModel", 53), ("CLIPModel", 2), ("SiglipTextModel", 53)])
def test_the_readout_is_where_the_gradient_enters(case: str, end: int) -> None:
    source = open_text(case, **({} if end == 53 else {"text_config": TEXT | {"eos_token_id": 2}}))
    batch = source.encode(photos(3))
    seen: list[torch.Tensor] = []
    layer = source.tower.encoder.layers[-1]

    def keep(_: Any, __: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    hook = layer.register_forward_hook(keep)
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    hook.remove()
    bound = source.bind(outputs, batch, Target())
    source.score(outputs, batch, bound).sum().backward()
    touched = (seen[0].grad.abs().sum(-1) > 1e-9).float()
    torch.testing.assert_close(source.readout(batch, outputs, bound)[ENCODER].weights, touched)
    torch.testing.assert_close(source.fixed_readout(batch)[ENCODER].weights, touched)
    assert batch.inputs.grad.abs().sum() > 0


def test_the_empty_prompt_scores_zero_and_a_batch_is_its_singles() -> None:
    source = open_text("CLIPModel")
    samples = photos(3)
    batch = source.encode(samples)
    outputs = source.forward(batch)
    scores = source.score(outputs, batch, source.bind(outputs, batch, Target()))
    for i, sample in enumerate(samples):
        alone = source.encode([sample])
        out = source.forward(alone)
        torch.testing.assert_close(
            source.score(out, alone, source.bind(out, alone, Target()))[0], scores[i], atol=1e-4, rtol=1e-4
        )
    index = [2, 0]
    expanded = batch.replace(batch.inputs[index], index)
    bound = source.bind(outputs, batch, Target()).take(index)
    torch.testing.assert_close(source.score(source.forward(expanded), expanded, bound), scores[index])


def test_there_is_no_picture() -> None:
    source = open_text("CLIPModel")
    batch = source.encode(photos(1))
    with pytest.raises(UsageError, match="not pixels"):
        source.cells(batch)
    with pytest.raises(UsageError, match="'feature' only"):
        source.bind(source.forward(batch), batch, Target("class"))
    assert source.predictions(source.forward(batch), batch) == [[]]


def test_a_sample_needs_a_text_that_fits() -> None:
    source = open_text("CLIPModel")
    pixel = np.zeros((1, 1, 3), np.uint8)
    with pytest.raises(SampleError, match="no text"):
        source.encode([Sample("bare", pixel)])
    with pytest.raises(UsageError, match="16"):
        source.encode([Sample("long", pixel, columns={"text": "a" * 40})])


def test_a_tokenizer_is_needed() -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        open_source("clip-text", weights="random", config=CASES["SiglipTextModel"])
