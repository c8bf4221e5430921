"""Norm-weighted attention against vectors written out in float64, one query, key and head at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capture.edited import HEADS, SPELLINGS, WIDTH, B, Block, N, inputs, twin
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout
from foveate.capture.norms import NormWeights, value_error
from foveate.capture.value_paths import ValueTap, trace_values
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey
from foveate.metrics.artefacts import find_artefacts, without_tokens
from foveate.testing.tiny import SITE, TinyConfig, TinySource, tiny_samples

ALL = slice(None)
CHANNELS = WIDTH // HEADS
SEEN = [s for s in SPELLINGS if s != "einsum"]


class Layer(nn.Module):
    """A residual block around attention: pre-norm or post-norm, with or without a layer scale."""

    def __init__(self, spelling="sdpa", order="post", scaled=False, seed=0):
        super().__init__()
        self.block, self.order = Block(spelling, seed=seed), order
        self.norm = nn.LayerNorm(WIDTH, eps=1e-3)
        random = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            self.norm.weight.normal_(1, 0.4, generator=random)
            self.norm.bias.normal_(0, 0.4, generator=random)
        self.gamma = torch.rand(WIDTH, generator=random) + 0.5 if scaled else None

    def forward(self, x):
        y = self.block(x)
        if self.gamma is not None:
            y = y * self.gamma
        return self.norm(x + y) if self.order == "post" else self.norm(y.add_(x))


def vectors(layer, x):
    """α^h_ij f^h(x_j) ``(batch, head, query, key, channel)``, x and the layer's output, all float64."""
    block = layer.block
    weights = twin(block, x)[1]
    _, _, v = block.project(x.double())
    if block.spelling == "grouped":
        v = v.repeat_interleave(2, 1)
    gamma = torch.ones(WIDTH) if layer.gamma is None else layer.gamma
    found = torch.zeros(B, HEADS, N, N, WIDTH, dtype=torch.float64)
    for h in range(HEADS):
        part = block.mha.out_proj.weight.double()[:, h * CHANNELS : (h + 1) * CHANNELS]
        for j in range(N):
            moved = (v[:, h, j] @ part.T) * gamma.double()
            found[:, h, :, j] = weights[:, h, :, j, None] * moved[:, None]
    out = layer.double()(x.double()).detach()
    layer.float()
    return found.detach(), x.double(), out


def path_of(layer, x=None):
    with torch.no_grad(), ValueTap(layer) as tap:
        layer(inputs() if x is None else x)
    assert [path.record for path in tap.paths] == tap.records
    return tap.paths[0]


def normalised(layer, moved, x, biased):
    """γ * (c - mean c) / s for every contribution, where ``biased`` is x + y."""
    deviation = (((biased - biased.mean(-1, keepdim=True)) ** 2).mean(-1) + layer.norm.eps).sqrt()
    centred = moved - moved.mean(-1, keepdim=True)
    return layer.norm.weight.double() * centred / deviation[:, :, None, None]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("spelling", SEEN)
def test_norms_of_heads_and_of_their_sum(spelling, scaled):
    layer = Layer(spelling, scaled=scaled)
    moved, _, _ = vectors(layer, inputs())
    path = path_of(layer)
    found = NormWeights(path)
    torch.testing.assert_close(found.heads(ALL), moved.norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.rows(ALL), moved.sum(1).norm(dim=-1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.rows([3, 0]), moved.sum(1)[:, [3, 0]].norm(dim=-1), atol=1e-5, rtol=1e-4)
    # heads that cancel: the norm of the sum is not the sum of norms
    assert (found.heads(ALL).sum(1) - found.rows(ALL)).max() > 0.1
    assert value_error(path) < 1e-5


@pytest.mark.parametrize("order", ["post", "in place"])
@pytest.mark.parametrize("spelling", ["sdpa", "manual", "mha", "mha_weights", "grouped"])
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_layer_norm_and_mixing_ratio(spelling, order, scaled):
    layer = Layer(spelling, order, scaled)
    moved, x, out = vectors(layer, inputs())
    with_residual = moved.sum(1)
    with_residual[:, range(N), range(N)] += x
    gamma = 1.0 if layer.gamma is None else layer.gamma.double()
    biased = with_residual.sum(2) + layer.block.mha.out_proj.bias.double() * gamma
    after = normalised(layer, with_residual, x, biased)
    whole = normalised(layer, biased[:, :, None], x, biased)[:, :, 0] + layer.norm.bias.double()
    torch.testing.assert_close(whole, out, atol=1e-9, rtol=0)  # all of it adds up to what the module put out
    path = path_of(layer)
    assert value_error(path) < 1e-5
    for parts, expected in (("residual", with_residual), ("norm", after)):
        weights = NormWeights(path, parts)
        torch.testing.assert_close(weights.rows(ALL), expected.norm(dim=-1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(weights.rows([5]), expected[:, [5]].norm(dim=-1), atol=1e-4, rtol=1e-4)
        kept = expected[:, range(N), range(N)]
        mixed = (expected.sum(2) - kept).norm(dim=-1)
        ratio = mixed / (mixed + kept.norm(dim=-1))
        torch.testing.assert_close(weights.mixing_ratio(), ratio, atol=1e-5, rtol=1e-4)
    single = normalised(layer, moved.flatten(0, 1), x, biased.repeat_interleave(HEADS, 0)).unflatten(0, (B, HEADS))
    torch.testing.assert_close(NormWeights(path, "norm").heads(ALL), single.norm(dim=-1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_encoder_layer_and_cross_attention(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=batch_first).eval()
    x = inputs() if batch_first else inputs().transpose(0, 1).contiguous()
    path = path_of(layer, x)
    assert value_error(path) < 1e-5
    torch.testing.assert_close(path.residual, inputs())
    cross = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval()
    with torch.no_grad(), ValueTap(cross) as tap:
        cross(inputs()[:, :4], inputs(2), inputs(2), need_weights=False)
    assert NormWeights(tap.paths[0]).rows(ALL).shape == (B, 4, N)
    assert value_error(tap.paths[0]) < 1e-5
    tap.paths[0].residual = inputs()[:, :4]
    with pytest.raises(UsageError, match="4 queries and 9 keys"):
        NormWeights(tap.paths[0], "residual")


@pytest.mark.parametrize("style", ["sdpa", "manual", "mha", "mha_weights"])
def test_every_layer_of_a_source(style):
    source = TinySource(TinyConfig(style=style))
    batch = source.encode(tiny_samples(3))
    paths = trace_values(source, batch)
    assert list(paths) == [CallKey(SITE, 0), CallKey(SITE, 1)]
    for path in paths.values():
        assert value_error(path) < 1e-5
        assert path.norm is not None
    single = trace_values(source, batch.replace(batch.inputs[[1]], [1]), sites=[SITE])
    for call, path in paths.items():
        together, alone = NormWeights(path, "norm").rows(ALL), NormWeights(single[call], "norm").rows(ALL)
        torch.testing.assert_close(together[[1]], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="no sites"):
        trace_values(source, batch, sites=["text"])


def test_an_ablated_head_moves_nothing_and_a_knockout_is_zero():
    layer = Layer("sdpa")
    with intervene(layer, [AblateHeads("block", heads=2), Knockout("block", query="at:0", key="at:1-4")]):
        path = path_of(layer)
    weights = NormWeights(path)
    assert (weights.heads(ALL)[:, 2] == 0).all()
    assert (weights.heads(ALL)[:, [0, 1, 3]] > 0).any()
    assert (weights.rows([0])[..., 1:5] == 0).all()
    assert value_error(path) < 1e-5


def test_mistakes_in_the_projection_do_not_pass():
    path = path_of(Layer("sdpa"))
    honest = value_error(path)
    weight = path.weight
    for wrong in (weight.flip(0), weight.flip(1), weight * 1.01):
        path.weight = wrong
        assert value_error(path) > 100 * max(honest, 1e-6)
    path.weight, path.bias = weight, None
    assert value_error(path) > 1e-2


class Interleaved(Block):
    """Channels of all heads side by side, ``(channel head)``, as some rearrangements leave them."""

    def forward(self, x):
        out = self._sdpa(*self.project(x)).permute(2, 0, 3, 1).reshape(N * B, WIDTH)
        return self.mha.out_proj(out).view(N, B, WIDTH).transpose(0, 1)


def test_columns_of_the_projection_are_found_whatever_their_order():
    block = Interleaved()
    path = path_of(block)
    weights = twin(block, inputs())[1]
    v = block.project(inputs().double())[2]
    moved = 0
    for h in range(HEADS):
        part = block.mha.out_proj.weight.double()[:, h::HEADS]
        moved = moved + weights[:, h, :, :, None] * (v[:, h] @ part.T)[:, None]
    torch.testing.assert_close(NormWeights(path).rows(ALL), moved.norm(dim=-1).detach(), atol=1e-5, rtol=1e-4)
    assert value_error(path) < 1e-5


class Gated(nn.Module):
    """Attention whose output is changed before the projection."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q = x.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.out(out * torch.sigmoid(x))


def test_a_path_that_cannot_be_followed_is_an_error():
    gated = path_of(Gated())
    with pytest.raises(CaptureError, match="the projection of the root module was not seen"):
        NormWeights(gated)
    with pytest.raises(CaptureError, match="the projection"):
        value_error(gated)
    with pytest.raises(CaptureError, match="the projection of the root module"):
        NormWeights(path_of(Block("einsum")))
    path = path_of(Block("sdpa"))
    with pytest.raises(CaptureError, match="the residual of the root module was not seen"):
        NormWeights(path, "residual")
    with pytest.raises(UsageError, match="no parts"):
        NormWeights(path, "all")
    with pytest.raises(UsageError, match="needs the residual"):
        NormWeights(path).mixing_ratio()


def test_what_every_key_moves_is_the_mean_of_rows():
    path = path_of(Layer())
    for parts in ("attention", "residual", "norm"):
        weights = NormWeights(path, parts)
        torch.testing.assert_close(weights.received(), weights.rows(ALL).mean(1))


def test_planted_artefacts_are_found_in_a_model():
    """Patches that every query attends to, with norms far above the rest: found by both signs, and removed."""
    source = TinySource(TinyConfig(image=64))
    model, planted = source.module, [9, 30]
    with torch.no_grad():
        model.position.mul_(0.3)
        # all queries look for the direction that the planted tokens carry
        direction = torch.zeros(model.config.width)
        direction[0] = 60.0
        model.position[0, planted] += direction
        attention = model.blocks[1].attention
        attention.qkv.weight[: 2 * model.config.width].mul_(0.05)
        attention.qkv.bias[: model.config.width].fill_(1.0)
        attention.qkv.weight[model.config.width : 2 * model.config.width, 0] = 3.0
    batch = source.encode(tiny_samples(2, height=64, width=64))
    paths = trace_values(source, batch)
    path = paths[CallKey(SITE, 1)]
    key = source.label(CallKey(SITE, 1), batch, None).key
    received = path.record.stats().received.mean(1)
    found = find_artefacts(received, path.token_norms(), key=key)
    assert [sorted(row.nonzero().flatten().tolist()) for row in found.flagged] == [planted, planted]
    rows = path.record.rows([0])
    left, removed = without_tokens(rows, found.flagged[:, None])
    torch.testing.assert_close(left.nansum(-1), torch.ones(2, 3, 1))
    torch.testing.assert_close(removed, rows[..., planted].sum(-1))
    assert removed.min() > 0.5
    with pytest.raises(CaptureError, match="residual"):
        path_of(Block("sdpa")).token_norms()
