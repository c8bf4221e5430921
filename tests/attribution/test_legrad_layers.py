"""LeGrad as published, against eager autograd with the head applied by hand to each layer's tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from attribution_fakes import bound_batch, only, snapshot, two_targets_a_sample
from foveate.attribution.attention import LeGrad
from foveate.attribution.early_exit import answering_from, blocks_of
from foveate.attribution.legrad_layers import LeGradLayers
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import Target
from foveate.testing.oracles import entropy_rows
from foveate.testing.tiny import TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import TinyDetector
from vit_models import open_tiny, photos


def published(weights, tokens, head, bound, scale):
    """Mean over layers, heads, queries of relu(ds^l / dA^l), ``(target, token)``; ``head``: tokens to logits."""
    maps = []
    for row in bound.rows:
        layers = []
        for A, Z in zip(weights, tokens, strict=True):
            logits = head(Z)[row.sample]
            score = logits if scale == "logit" else logits.softmax(-1)
            (slope,) = torch.autograd.grad(score[row.class_index], A, retain_graph=True)
            layers.append(slope[row.sample].clamp(min=0).mean((0, 1)))
        maps.append(torch.stack(layers).mean(0))
    return torch.stack(maps).detach().numpy()


def tiny_by_hand(model, inputs):
    """A and the tokens behind each block, float64, in the graph."""
    model = model.double()
    weights, tokens = [], []
    patches = model.embed(inputs.double()).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(inputs), -1, -1), patches], 1) + model.position
    for block in model.blocks:
        qkv = block.attention.qkv(block.norm1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (model.config.heads, -1)).transpose(1, 2) for part in qkv)
        weights.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        x = x + block.attention.proj((weights[-1] @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        tokens.append(x)
    return weights, tokens, lambda z: model.head(model.norm(z)[:, 0])


@pytest.fixture
def tiny():
    source = TinySource(TinyConfig(layers=4, sharpness=8.0))
    return source, *bound_batch(source, 3)


@pytest.mark.parametrize("style", ["sdpa", "manual"])
@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_equals_the_head_applied_to_each_layers_tokens(tiny, style, scale):
    source = TinySource(TinyConfig(layers=4, sharpness=8.0, style=style))
    batch, bound = tiny[1], two_targets_a_sample(tiny[2], 3).at(scale)
    made = LeGradLayers(rows=4).attribute(source, batch, bound)
    weights, tokens, head = tiny_by_hand(TinySource(source.config).module, batch.inputs)
    assert entropy_rows(torch.cat(weights).detach()).median() < 0.6 * math.log(17)
    want = published(weights, tokens, head, bound, scale)[:, 1:].reshape(6, 4, 4)
    np.testing.assert_allclose(made.values, want, atol=1e-5 * want.max())
    assert made.info["backward_passes"] == 4
    own = LeGrad().attribute(source, batch, bound).values
    assert np.abs(own - want).max() > 0.05 * want.max()  # the variant is another map


@pytest.mark.parametrize(
    "case", ["ViTForImageClassification", "Dinov2ForImageClassification", "CLIPForImageClassification"]
)
def test_equals_it_on_the_librarys_classifiers(case):
    source = open_tiny(case)
    batch = source.encode(photos())
    bound = source.bind(source.forward(batch), batch, Target(scale="logit"))
    made = LeGradLayers().attribute(source, batch, bound)

    model = open_tiny(case).module
    model.set_attn_implementation("eager")
    tokens = []
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        block.register_forward_hook(
            lambda _, inputs, out: tokens.append(out[0] if isinstance(out, tuple) else out)
        )
    outputs = model(batch.inputs.clone().requires_grad_(), output_attentions=True)

    def head(z):
        if case.startswith("CLIP"):
            return model.classifier(z[:, 1:].mean(1))
        z = (model.vit if case.startswith("ViT") else model.dinov2).layernorm(z)
        return model.classifier(z[:, 0] if case.startswith("ViT") else torch.cat([z[:, 0], z[:, 1:].mean(1)], 1))

    assert torch.allclose(head(tokens[-1]), outputs.logits, atol=1e-6)
    want = published(outputs.attentions, tokens, head, bound, "logit")[:, 1:].reshape(-1, 4, 4)
    np.testing.assert_allclose(made.values, want, atol=1e-5 * want.max())


def test_one_layer_is_the_models_own_score():
    source = TinySource(TinyConfig(layers=1, sharpness=8.0))
    batch, bound = bound_batch(source, 2)
    ours, own = (method().attribute(source, batch, bound).values for method in (LeGradLayers, LeGrad))
    np.testing.assert_array_equal(ours, own)


def test_a_batch_equals_its_images_and_the_model_is_left_alone(tiny):
    source, batch, bound = tiny
    before = snapshot(source.module)
    whole = LeGradLayers().attribute(source, batch, bound).values
    for sample in range(3):
        alone = LeGradLayers().attribute(source, *only(bound, batch, sample)).values
        np.testing.assert_allclose(whole[sample : sample + 1], alone, atol=1e-5 * whole.max())
    assert snapshot(source.module) == before


def test_hooks_are_gone_after_an_error_in_an_early_exit(tiny):
    source, batch, bound = tiny
    before, forward, hooked = snapshot(source.module)["hooks"], source.forward, []

    def failing(*args, **kwargs):
        hooked.append(snapshot(source.module)["hooks"] != before)
        return 1 / 0 if hooked[-1] else forward(*args, **kwargs)

    source.forward = failing
    with pytest.raises(ZeroDivisionError):
        LeGradLayers(rows=3).attribute(source, batch, bound)
    assert hooked == [False, True]
    assert snapshot(source.module)["hooks"] == before


def test_the_exit_is_the_chosen_block(tiny):
    source, batch, _ = tiny
    blocks = blocks_of(source.module, source.sites[0])
    assert list(blocks.values()) == list(source.module.blocks)
    _, tokens, head = tiny_by_hand(TinySource(source.config).module, batch.inputs)
    for layer in range(4):
        with answering_from(blocks, layer), torch.no_grad():
            found = source.forward(batch)
        assert torch.allclose(found.double(), head(tokens[layer]), atol=1e-5)


class Penultimate(TinySource):
    """Reads its answer before the last block, as some vision-language models do."""

    def forward(self, batch, *, grad=False):
        seen = []
        hook = self.module.blocks[-2].register_forward_hook(lambda _, inputs, output: seen.append(output))
        super().forward(batch, grad=grad)
        hook.remove()
        with torch.set_grad_enabled(grad):
            return self.module.head(self.module.norm(seen[0])[:, 0])


def test_models_without_such_an_exit_are_refused(tiny):
    source = Penultimate(TinyConfig(layers=4, sharpness=8.0))
    with pytest.raises(CaptureError, match="depends on the attention of"):
        LeGradLayers().attribute(source, *tiny[1:])

    detector = TinyDetector()
    batch = detector.encode(tiny_samples(1))
    bound = detector.bind(detector.forward(batch), batch, Target())
    with pytest.raises(UsageError, match="legrad_layers: defined for plain vision transformers"):
        LeGradLayers().attribute(detector, batch, bound)

    longer = TinySource(TinyConfig(layers=2))
    longer.module.blocks.append(nn.Identity())
    with pytest.raises(UsageError, match="not the last members"):
        blocks_of(longer.module, longer.sites[0])

    narrow = TinySource(TinyConfig(layers=2))
    blocks = blocks_of(narrow.module, narrow.sites[0])
    narrow.module.blocks[1].register_forward_hook(lambda _, inputs, output: output[:, :5])
    with answering_from(blocks, 0), pytest.raises(UsageError, match="the head wants"):
        narrow.forward(tiny[1])
