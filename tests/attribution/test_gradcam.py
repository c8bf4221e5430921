"""Grad-CAM on tokens: the paper's formula in float64 by hand, special layouts, and a clean model after errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from attribution_fakes import bound_batch, only, snapshot, two_targets_a_sample
from foveate.attribution.gradcam import GradCam, lay, watched
from foveate.errors import CaptureError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import AttentionStep, CallKey, CallLabels, TokenAxis
from foveate.testing.tiny import SITE, STREAM, TinyConfig, TinySource


def _slow(source, batch, bound, relu):
    """Selvaraju 2017, eq. 1 and 2, by loops in float64; activations are the output of the last norm1."""
    model = source.module.double()
    maps = []
    for row in bound.rows:
        x = batch.inputs[row.sample : row.sample + 1].double()
        tokens = torch.cat([model.cls, model.embed(x).flatten(2).transpose(1, 2)], 1) + model.position
        *before, last = model.blocks
        for block in before:
            tokens = block(tokens)
        A = last.norm1(tokens).detach().requires_grad_()
        out = tokens + last.attention(A)
        out = out + last.mlp(last.norm2(out))
        model.head(model.norm(out)[:, 0])[0, row.class_index].backward()
        cam = np.zeros((4, 4))
        for d in range(A.shape[-1]):
            alpha = np.mean([float(A.grad[0, 1 + k, d]) for k in range(16)])
            for k in range(16):
                cam[k // 4, k % 4] += alpha * float(A[0, 1 + k, d].detach())
        maps.append(np.maximum(cam, 0) if relu else cam)
    model.float()
    return np.stack(maps)


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("style", ["sdpa", "mha", "manual"])
def test_equals_the_formula(style, relu):
    source = TinySource(TinyConfig(style=style))
    batch, bound = bound_batch(source, 3)
    made = GradCam(relu=relu).attribute(source, batch, bound)
    want = _slow(source, batch, bound, relu)
    np.testing.assert_allclose(made.values, want, atol=1e-5 * np.abs(want).max())
    assert np.abs(want).max() > 0
    assert made.signed is not relu
    assert made.grid == source.cells(batch)
    assert made.info["activations"].endswith(f"{SITE}, layer 1")


def test_batch_equals_singles_and_blocks():
    source = TinySource()
    batch, bound = bound_batch(source, 3)
    bound = two_targets_a_sample(bound, 3)
    whole, tight = (
        GradCam(relu=False).attribute(source, batch, bound),
        GradCam(relu=False, rows=2).attribute(source, batch, bound),
    )
    np.testing.assert_allclose(tight.values, whole.values, atol=1e-5)
    for sample in range(3):
        alone = GradCam(relu=False).attribute(source, *only(bound, batch, sample))
        np.testing.assert_allclose(whole.values[2 * sample : 2 * sample + 2], alone.values, atol=1e-5)


def grad_cam(activations, gradients, axis):
    values = GradCam().weigh(activations, gradients, axis)
    return lay(values, axis, CellGrid.regular(1, 1, height=8, width=12), relu=False)[0]


def test_other_tokens_do_not_count():
    """Permuting patches with their labels changes nothing; CLS and registers weigh nothing."""
    random = torch.Generator().manual_seed(0)
    A, G = (torch.randn(2, 7, 5, generator=random, dtype=torch.float64) for _ in range(2))
    axis = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(2, 3, height=8, width=12))
    values = grad_cam(A, G, axis)
    A2, G2 = A.clone(), G.clone()
    A2[:, 0], G2[:, 0] = 99.0, 99.0
    np.testing.assert_array_equal(values, grad_cam(A2, G2, axis))
    order = torch.randperm(7, generator=random)
    shuffled = TokenAxis(
        *(getattr(axis, n)[order] for n in ("kind", "y", "x", "height", "width", "level", "frame"))
    )
    np.testing.assert_allclose(values, grad_cam(A[:, order], G[:, order], shuffled), rtol=1e-6)


class _CrossPool(nn.Module):
    """A pooling head as SigLIP's: one learned probe reads all tokens through token-first attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 8, stride=8)
        self.probe = nn.Parameter(torch.randn(1, 1, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=False)
        self.head = nn.Linear(8, 3)

    def forward(self, pixels):
        tokens = self.embed(pixels).flatten(2).permute(2, 0, 1)
        probe = self.probe.expand(-1, len(pixels), -1)
        return self.head(self.attention(probe, tokens, tokens)[0][0])


class _PoolSource(TinySource):
    def __init__(self):
        super().__init__()
        self._module = _CrossPool().eval()

    @property
    def sites(self):
        from foveate.interfaces import Site

        return (Site("pool", {"attention": 0}, 2, "probe", STREAM, kind="cross", form="pool"),)

    def flow(self, batch, outputs):
        return [AttentionStep(CallKey("pool", 0), "probe", STREAM, residual=False)]

    def label(self, call, batch, outputs):
        patches = TokenAxis.patches(4, 4, height=32, width=32)
        return CallLabels((("sample", len(batch)),), TokenAxis.of_kind("pool", 1), patches)


@pytest.mark.parametrize("count", [2, 16])  # 16 samples of 16 tokens: shapes alone cannot tell the axes apart
def test_keys_of_a_token_first_pooling_head(count):
    source = _PoolSource()
    batch, bound = bound_batch(source, count)
    got = GradCam(relu=False).attribute(source, batch, bound).values
    model = source.module
    A = model.embed(batch.inputs).flatten(2).permute(2, 0, 1).detach().requires_grad_()
    scores = model.head(model.attention(model.probe.expand(-1, count, -1), A, A)[0][0])
    classes = [row.class_index for row in bound.rows]
    (G,) = torch.autograd.grad(scores[range(count), classes].sum(), A)
    want = (G.mean(0, keepdim=True) * A).sum(-1).T.reshape(count, 4, 4)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-6)


def test_the_model_is_left_alone_even_after_an_exception():
    source = TinySource()
    batch, bound = bound_batch(source)
    before = snapshot(source.module)
    GradCam().attribute(source, batch, bound)
    assert snapshot(source.module) == before

    def broken(outputs, batch, bound):
        raise RuntimeError("in mid-score")

    source.score = broken
    with pytest.raises(RuntimeError, match="mid-score"):
        GradCam().attribute(source, batch, bound)
    with pytest.raises(ZeroDivisionError), watched(source):
        _ = 1 / 0
    assert snapshot(source.module) == before


def test_what_it_refuses():
    source = TinySource()
    batch, bound = bound_batch(source)
    label = source.label

    def windows(call, batch, outputs):
        made = label(call, batch, outputs)
        return CallLabels((("sample", len(batch)), ("window", 4)), made.query, made.key)

    source.label = windows
    with pytest.raises(UsageError, match="window"):
        GradCam().attribute(source, batch, bound)
    source.label = lambda *_: CallLabels(
        (("sample", 3),), TokenAxis.of_kind("cls", 1), TokenAxis.patches(3, 3, height=32, width=32)
    )
    with pytest.raises(CaptureError, match="takes no tokens of shape"):
        GradCam().attribute(source, batch, bound)
    source.label = label
    source.flow = lambda *_: []
    with pytest.raises(UsageError, match="no attention"):
        GradCam().attribute(source, batch, bound)
    del source.flow
    source.score = lambda outputs, batch, bound: batch.inputs.mean((1, 2, 3))
    with pytest.raises(CaptureError, match="does not depend"):
        GradCam().attribute(source, batch, bound)


def test_where_key_and_value_differ_the_value_is_what_entered():
    """The gradient at keys (value plus positions) sums to 0 over tokens: softmax ignores what all keys share."""
    from foveate.attribution.gradcam import _entering
    from foveate.interfaces import CallKey

    attention = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 5, 8, generator=generator).requires_grad_()
    key = value + torch.randn(1, 5, 8, generator=generator)
    query = torch.randn(1, 3, 8, generator=generator)
    entries = {("cross", 0): [(attention, {"query": query, "key": key, "value": value})]}
    assert _entering(entries, CallKey("cross", 0), 1, 5) is value
    score = attention(query, key, value)[0].square().sum()
    at_key, at_value = torch.autograd.grad(score, (key, value))
    assert at_key.sum(1).abs().max() < 1e-4 * at_key.abs().max() + 1e-6
    assert at_value.sum(1).abs().max() > 1e-2
