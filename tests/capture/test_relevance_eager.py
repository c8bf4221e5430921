"""Relevance, grad x attention and LeGrad against eager autograd in float32: A in the graph, dL/dA from torch.

This is the code that people write: the model's attention as matrices, ``torch.autograd.grad`` at each, the papers'
formulas on whole matrices. The engine has neither A nor its gradient in memory; both must agree to float32's own
accuracy, 1e-5 of a map's maximum, on peaked attention. The oracles of test_sweeps.py are float64.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.relevance import relevance
from foveate.capture.trace import trace
from foveate.interfaces import Target
from foveate.testing.oracles import entropy_rows
from foveate.testing.tiny import TinyConfig, TinySource, tiny_samples

TOLERANCE = 1e-5
STYLES = ["sdpa", "manual", "mha", "mha_weights"]
CASES = [
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "Dinov2ForImageClassification",
    "CLIPForImageClassification",
]
SCALES = ["logit", "probability"]


@dataclass
class Eager:
    """A and dL/dA of each layer ``(sample, head, query, key)``, as eager autograd gives them."""

    weights: list
    slopes: list

    def readout(self, start, layers):
        """``start`` (sample, query) through R <- R + Ā R (Chefer et al. 2021, eq. 5, 6), the start left out."""
        row = start[:, None]
        for number in reversed(layers):
            row = row + row @ (self.weights[number] * self.slopes[number]).clamp(min=0).mean(1)
        return row[:, 0] - start

    def maps(self, start):
        depth = len(self.weights)
        columns = [slope.clamp(min=0).mean((1, 2)) for slope in self.slopes]
        last = start[:, None] @ (self.weights[-1] * self.slopes[-1]).clamp(min=0).mean(1)
        return {
            relevance: self.readout(start, range(depth)),
            grad_attention: last[:, 0],
            legrad: torch.stack(columns).mean(0),
        }


def eager(weights, logits, bound):
    table = logits if bound.scale == "logit" else logits.softmax(-1)
    chosen = table[[row.sample for row in bound.rows], [row.class_index for row in bound.rows]]
    slopes = torch.autograd.grad(chosen.sum(), weights)
    return Eager([w.detach() for w in weights], list(slopes))


def eager_tiny(model, inputs):
    """A TinyViT written with matrices: A of each layer and the logits, in the graph."""
    heads, weights = model.config.heads, []
    patches = model.embed(inputs).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls.expand(len(inputs), -1, -1), patches], 1) + model.position
    for block in model.blocks:
        inside = block.attention
        fused = hasattr(inside, "qkv")
        joint = (inside.qkv.weight, inside.qkv.bias) if fused else (inside.in_proj_weight, inside.in_proj_bias)
        parts = F.linear(block.norm1(x), *joint).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
        weights.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        mixed = (weights[-1] @ v).transpose(1, 2).flatten(2)
        x = x + (inside.proj if fused else inside.out_proj)(mixed)
        x = x + block.mlp(block.norm2(x))
    return weights, model.head(model.norm(x)[:, 0])


def assert_alike(source, batch, bound, truth):
    """Every map, off the readout's own share, to the tolerance; batched equals singles."""
    traced = trace(source, batch, grad=True)
    start = next(iter(source.readout(batch, traced.outputs, bound).values())).weights
    alone = [batch.replace(batch.inputs[[i]], [i]) for i in range(len(batch))]
    for method, wanted in truth.maps(start).items():
        found = method(traced, bound)
        singles = torch.cat(
            [method(trace(source, one, grad=True), bound.take([i])) for i, one in enumerate(alone)]
        )
        top = found.abs().amax(-1, keepdim=True)
        assert ((found - singles).abs() <= TOLERANCE * top).all(), method.__name__
        if method is relevance:
            assert (found - start - wanted).abs().max() <= TOLERANCE * top.max()
            free = start[0] == 0  # where the identity's 1 does not hide small numbers
            found, wanted = found[:, free], wanted[:, free]
        error = (found - wanted).abs().amax(-1) / wanted.abs().amax(-1) if found.numel() else torch.zeros(1)
        assert error.max() < TOLERANCE, (method.__name__, error)


def assert_peaked(weights):
    for matrix in weights:
        assert entropy_rows(matrix.detach()).median() < 0.6 * math.log(matrix.shape[-1])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("style", STYLES)
def test_a_hand_written_vit(style, scale):
    source = TinySource(TinyConfig(style=style, layers=3, sharpness=8.0))
    batch = source.encode(tiny_samples(3))
    bound = source.bind(source.forward(batch), batch, Target(scale=scale))
    weights, logits = eager_tiny(source.module, batch.inputs)
    assert_peaked(weights)
    assert_alike(source, batch, bound, eager(weights, logits, bound))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("case", CASES)
def test_transformers_eager_attention(case, scale):
    pytest.importorskip("transformers", reason="transformers is not installed")
    from vit_models import open_tiny, photos

    source = open_tiny(case)
    batch = source.encode(photos())
    bound = source.bind(source.forward(batch), batch, Target(scale=scale))
    library = open_tiny(case).module
    library.set_attn_implementation("eager")
    outputs = library(batch.inputs.clone().requires_grad_(), output_attentions=True)
    weights = list(outputs.attentions)
    assert_peaked(weights)
    assert_alike(source, batch, bound, eager(weights, outputs.logits, bound))


def test_the_comparison_notices_a_lost_scale_of_one_layer():
    source = TinySource(TinyConfig(layers=3, sharpness=8.0))
    batch = source.encode(tiny_samples(2))
    bound = source.bind(source.forward(batch), batch, Target(scale="logit"))
    weights, logits = eager_tiny(source.module, batch.inputs)
    truth = eager(weights, logits, bound)
    for lost in range(3):
        slopes = [g * (1.0001 if number == lost else 1.0) for number, g in enumerate(truth.slopes)]
        with pytest.raises(AssertionError):
            assert_alike(source, batch, bound, replace(truth, slopes=slopes))
