"""Attention's maps on cells, against matrix versions of the papers' formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribution_fakes import bound_batch, only, snapshot, two_targets_a_sample
from foveate.attribution import attention as a
from foveate.attribution.attention import on_cells
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import CallLabels, TokenAxis
from foveate.testing.tiny import TinyConfig, TinySource

ALL = [a.ReadoutAttention, a.Rollout, a.GradAttention, a.CheferICCV21, a.LeGrad]


@pytest.fixture(scope="module")
def tiny():
    source = TinySource(TinyConfig(layers=3, sharpness=8.0))
    return source, *bound_batch(source, 3)


@pytest.fixture(scope="module")
def matrices(tiny):
    """Attention (row, layer, head, query, key) and its gradient, by a hand-written forward in float64."""
    source, batch, bound = tiny
    source.module.double()
    weights, gradients = zip(*[_explicit(source.module, batch, row) for row in bound.rows], strict=True)
    source.module.float()
    A, G = np.stack(weights), np.stack(gradients)
    entropy = -(A * np.log(A + 1e-300)).sum(-1)
    assert np.median(entropy) < 0.6 * np.log(17)  # peaked, or equality would prove nothing
    return A, G


def _explicit(model, batch, row):
    x = batch.inputs[row.sample : row.sample + 1].double()
    x = torch.cat([model.cls, model.embed(x).flatten(2).transpose(1, 2)], 1) + model.position
    kept = []
    for block in model.blocks:
        y = block.norm1(x)
        heads = model.config.heads
        q, k, v = block.attention.qkv(y).view(1, 17, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        A = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        A.retain_grad()
        kept.append(A)
        x = x + block.attention.proj((A @ v).transpose(1, 2).reshape(1, 17, -1))
        x = x + block.mlp(block.norm2(x))
    model.head(model.norm(x)[0, 0])[row.class_index].backward()
    A = np.stack([A[0].detach().numpy() for A in kept])
    return A, np.stack([A.grad[0].numpy() for A in kept])


def _want(name, A, G):
    """(row, key) over CLS and patches, straight from the papers, N x N matrices and all."""
    eye = np.eye(A.shape[-1])
    if name == "readout":
        return A[:, -1].mean(1)[:, 0]
    if name == "grad_attention":
        return np.maximum(A[:, -1] * G[:, -1], 0).mean(1)[:, 0]
    if name == "legrad":
        return np.maximum(G, 0).mean((1, 2, 3))
    R = np.stack([eye] * len(A))
    for layer in range(A.shape[1]):
        if name == "rollout":
            R = (0.5 * A[:, layer].mean(1) + 0.5 * eye) @ R
        else:
            R = R + np.maximum(A[:, layer] * G[:, layer], 0).mean(1) @ R
    return R[:, 0]


@pytest.mark.parametrize("method", ALL)
def test_equals_the_matrix_formula(tiny, matrices, method):
    source, batch, bound = tiny
    made = method().attribute(source, batch, bound)
    want = _want(method.name, *matrices)[:, 1:].reshape(3, 4, 4)
    np.testing.assert_allclose(made.values, want, atol=2e-5 * np.abs(want).max())
    assert made.grid == source.cells(batch)
    assert not made.signed
    assert made.info["backward_passes"] == int(method.needs_gradients) == method().cost((4, 4)).backward


@pytest.mark.parametrize("layer", [0, 1, -1, "mean"])
@pytest.mark.parametrize("head", [0, -1, "mean"])
def test_readout_of_any_layer_and_head(tiny, matrices, layer, head):
    made = a.ReadoutAttention(layer=layer, head=head).attribute(*tiny)
    rows = matrices[0][:, :, :, 0, 1:]
    rows = rows.mean(1) if layer == "mean" else rows[:, layer]
    rows = rows.mean(1) if head == "mean" else rows[:, head]
    np.testing.assert_allclose(made.values, rows.reshape(3, 4, 4), atol=1e-5)


@pytest.mark.parametrize("method", ALL)
def test_a_batch_equals_its_images_one_by_one(tiny, method):
    source, batch, bound = tiny
    bound = two_targets_a_sample(bound, 3)
    whole, tight = method().attribute(source, batch, bound), method(rows=2).attribute(source, batch, bound)
    np.testing.assert_allclose(tight.values, whole.values, atol=1e-5 * whole.values.max())
    for sample in range(3):
        alone = method().attribute(source, *only(bound, batch, sample))
        got = whole.values[2 * sample : 2 * sample + 2]
        np.testing.assert_allclose(got, alone.values, atol=1e-5 * whole.values.max())
    by_class = np.abs(whole.values[0] - whole.values[1]).max() > 1e-6
    assert by_class == method.needs_gradients  # attention alone does not know the target


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_left_alone(tiny, method):
    source, batch, bound = tiny
    before = snapshot(source.module)
    method().attribute(source, batch, bound)
    assert {**snapshot(source.module), "grad": None} == {**before, "grad": None}
    assert not batch.inputs.requires_grad


def test_tokens_on_another_grid_go_by_area():
    tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(4, 4, height=32, width=32))
    values = torch.arange(34.0, dtype=torch.float64).reshape(2, 17)
    got = on_cells(values, tokens, CellGrid.regular(2, 2, height=32, width=32))
    want = values[:, 1:].reshape(2, 2, 2, 2, 2).mean((2, 4))
    np.testing.assert_allclose(got, want.numpy())


def test_bad_input(tiny):
    with pytest.raises(UsageError, match="no layer 3"):
        a.ReadoutAttention(layer=3).attribute(*tiny)
    with pytest.raises(UsageError, match="no head -4"):
        a.ReadoutAttention(head=-4).attribute(*tiny)
    source, batch, bound = TinySource(), *tiny[1:]
    label = source.label

    def windows(call, batch, outputs):
        made = label(call, batch, outputs)
        return CallLabels((("sample", 1), ("window", len(batch))), made.query, made.key)

    source.label = windows
    with pytest.raises(UsageError, match="window"):
        a.ReadoutAttention().attribute(source, batch, bound)
