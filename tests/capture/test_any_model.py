"""``foveate.wrap`` on models that no plugin knows: weights against float64, rollout against dense products."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import foveate
from capture import any_models as zoo
from capture.any_models import AnyViT, explicit, images, sharpen
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.interfaces import Target
from foveate.testing.oracles import attention_weights, entropy_rows, rollout_matrix

WIDTH, HEADS = 24, 4


def values(dataset, name="attention"):
    return torch.from_numpy(dataset[name].transpose("layer", ...).values)


# ------------------------------------------------------------------------------- hand-written blocks


@pytest.mark.parametrize("spelling", zoo.SPELLINGS)
def test_hand_written_attention_equals_float64(spelling):
    model, x = AnyViT(spelling), images()
    truth = explicit(model, x)
    assert entropy_rows(torch.cat(truth)).median() < 0.6 * math.log(zoo.TOKENS)
    w = foveate.wrap(model, x)
    assert list(w.sites) == ["blocks.attn"]
    found = w.sites["blocks.attn"]
    assert found.pattern == "blocks.*.attn"
    assert found.site.layers == (0, 1, 2)
    assert found.site.kind == "self"
    assert w.identical
    captured = w.capture(x, reductions=("entropy", "received"))
    assert torch.equal(captured.outputs, model(x))
    site = captured["blocks.attn"]
    assert site.attention.dims == ("sample", "layer", "head", "query", "key")
    for layer, expected in enumerate(truth):
        assert (values(site)[layer] - expected).abs().max() < 2e-5
        assert (values(site, "entropy")[layer] - entropy_rows(expected)).abs().max() < 2e-5
        assert (values(site, "received")[layer] - expected.mean(-2)).abs().max() < 2e-5
    assert captured.certificate.passed
    verified = spelling not in ("einsum", "heads_last")  # an einsum's product with values is not repeated
    assert (len(captured.certificate.unverified) == 0) == verified


@pytest.mark.parametrize("spelling", zoo.SPELLINGS)
def test_rollout_needs_no_label_where_gradients_show_the_flow(spelling):
    model, x = AnyViT(spelling), images(3)
    source = foveate.wrap(model, images()).source()
    assert source.gaps == ()
    assert source.rows[2] == "token 0"
    found = rollout(trace(source, source.batch(x)))
    truth = explicit(model, x)
    for sample in range(3):
        expected = rollout_matrix([a[sample] for a in truth])[0]
        assert (found[sample] - expected).abs().max() < 1e-5 * expected.max()


def test_a_mean_over_patches_is_found_as_readout():
    model, x = AnyViT(pool="mean"), images()
    source = foveate.wrap(model, x).source()
    assert source.rows[2] == "equal weights over the 16 tokens the answer reads"
    found = rollout(trace(source, source.batch(x)))
    expected = rollout_matrix([a[1] for a in explicit(model, x)])[1:].mean(0)
    assert (found[1] - expected).abs().max() < 1e-6


def test_token_places_are_read_off_the_pixels():
    source = foveate.wrap(AnyViT(), images()).source()
    tokens = source.tokens[source.bottom]
    assert tokens.where("cls").tolist() == [0]
    assert tokens.y[1:].reshape(4, 4)[:, 0].tolist() == [2, 6, 10, 14]
    assert tokens.x[1:].reshape(4, 4)[0].tolist() == [2, 6, 10, 14]
    assert set(tokens.height[1:]) == set(tokens.width[1:]) == {4}
    assert source.cells(source.batch(images())).shape == (4, 4)


def test_relevance_of_a_wrapped_model_equals_explicit_autograd():
    model, x = AnyViT("unfused"), images()
    source = foveate.wrap(model, x).source()
    traced = trace(source, source.batch(x), grad=True)
    found = relevance(traced, source.bind(traced.outputs, traced.batch, Target(scale="logit")))
    truth = _chefer(model, x)
    assert (found - truth).abs().max() < 1e-5 * truth.max()


def _chefer(model, x):
    """Chefer et al. 2021, eq. 5 and 6, by whole matrices: the CLS row for the predicted class."""
    twin, kept = copy.deepcopy(model).double(), []

    def attend(self, q, k, v):
        weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        kept.append(weights)
        return weights @ v

    for block in twin.blocks:
        block.attn._unfused = attend.__get__(block.attn)
    logits = twin(x.double())
    slopes = torch.autograd.grad(logits.max(-1).values.sum(), kept)
    joined = torch.eye(zoo.TOKENS, dtype=torch.float64).expand(len(x), -1, -1)
    for weights, slope in zip(kept, slopes, strict=True):
        joined = joined + (weights * slope).relu().mean(1) @ joined
    return joined[:, 0].detach()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (AnyViT(mix=True), "one token reaches several"),
        (nn.Sequential(AnyViT(pool=None, depth=2), nn.Flatten(1)), None),
    ],
)
def test_where_the_flow_cannot_be_shown_it_is_refused(model, why):
    source = foveate.wrap(model, images()).source()
    if why is None:
        assert source.gaps == ()
        assert source.rows is not None
        return
    assert why in source.gaps[0]
    with pytest.raises(foveate.FoveateError, match="could not be established"):
        rollout(trace(source, source.batch(images())))


# ------------------------------------------------------------------------------- torch's own modules


def tokens(count=2, length=11, seed=1):
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def mha_explicit(module, query, key, mask=None):
    """A ``(sample, head, query, key)`` and the output of ``nn.MultiheadAttention``, batch first, float64."""
    wq, wk, wv = module.in_proj_weight.double().chunk(3)
    bq, bk, bv = module.in_proj_bias.double().chunk(3)
    given = ((query, wq, bq), (key, wk, bk), (key, wv, bv))
    q, k, v = (zoo.heads(x.double() @ w.T + b, HEADS) for x, w, b in given)
    weights = attention_weights(q, k, mask=mask)
    out = (weights @ v).transpose(1, 2).flatten(2)
    return weights, out @ module.out_proj.weight.double().T + module.out_proj.bias.double()


@pytest.mark.parametrize("ask", [False, True])
@pytest.mark.parametrize("form", ["self", "cross", "padded"])
def test_multihead_attention_alone(ask, form):
    module = sharpen(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), 2.2, "in_proj_weight")
    x, y = tokens(), tokens(length=7, seed=2) if form == "cross" else None
    y = x if y is None else y
    padding = torch.arange(11)[None] >= torch.tensor([[11], [6]])
    options = {"need_weights": ask, **({"key_padding_mask": padding} if form == "padded" else {})}
    w = foveate.wrap(module, x, y, y, **options)
    (name,) = w.sites
    assert name == "MultiheadAttention"
    assert w.sites[name].site.kind == ("cross" if form == "cross" else "self")
    captured = w.capture(x, y, y, **options)
    with torch.no_grad():
        truth, out = mha_explicit(module, x, y, ~padding[:, None, None] if form == "padded" else None)
    assert (values(captured[name])[0] - truth).abs().max() < 2e-6
    assert (captured.outputs[0] - out).abs().max() < 1e-5


@pytest.mark.parametrize("ask", [False, True])
def test_attention_is_in_the_autograd_graph(ask):
    module = sharpen(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), 2.2, "in_proj_weight")
    x = tokens()
    w = foveate.wrap(module, x, x, x, need_weights=ask)
    (out, _), records = w.records(grad=True)
    (record,) = records.values()
    (slope,) = torch.autograd.grad(out.square().sum(), record.node)
    found = record.weight_gradient(slice(None), slope)
    assert (found - _mha_slope(module, x)).abs().max() < 1e-4 * found.abs().max()


def _mha_slope(module, x):
    """dL/dA of L = sum out^2, with A a leaf in float64."""
    with torch.no_grad():
        weights, _ = mha_explicit(module, x, x)
        wv, bv = module.in_proj_weight.double().chunk(3)[2], module.in_proj_bias.double().chunk(3)[2]
        v = zoo.heads(x.double() @ wv.T + bv, HEADS)
        projection, bias = module.out_proj.weight.double(), module.out_proj.bias.double()
    leaf = weights.clone().requires_grad_()
    out = (leaf @ v).transpose(1, 2).flatten(2) @ projection.T + bias
    return torch.autograd.grad(out.square().sum(), leaf)[0]


def after(layer, x, attended, norm):
    """Post-norm residual in float64."""
    return F.layer_norm(x + attended, (WIDTH,), norm.weight.double(), norm.bias.double())


def feed_forward(layer, x, norm):
    hidden = (x @ layer.linear1.weight.double().T + layer.linear1.bias.double()).relu()
    return after(layer, x, hidden @ layer.linear2.weight.double().T + layer.linear2.bias.double(), norm)


@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_and_decoder_in_eval(batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, HEADS, 2, 2, 32, batch_first=batch_first)
    model = sharpen(model, 2.2, "in_proj_weight")
    memory, target = tokens(3), tokens(3, 6, seed=2)
    causal = torch.ones(6, 6, dtype=torch.bool).triu(1)
    given = [t if batch_first else t.transpose(0, 1) for t in (memory, target)]
    w = foveate.wrap(model, *given, tgt_mask=causal)
    kinds = {name: found.site.kind for name, found in w.sites.items()}
    assert kinds == {
        "encoder.layers.self_attn": "self",
        "decoder.layers.self_attn": "self",
        "decoder.layers.multihead_attn": "cross",
    }
    assert "encoder.layers.1.self_attn" in w.sites["decoder.layers.multihead_attn"].reason
    captured = w.capture(*given, tgt_mask=causal)
    with torch.no_grad():
        truth = transformer_explicit(model, memory, target, ~causal)
    for name, layers in truth.items():
        assert captured[name].sizes["sample"] == 3
        for layer, expected in enumerate(layers):
            assert (values(captured[name])[layer] - expected).abs().max() < 1e-5


def transformer_explicit(model, memory, target, mask):
    found = {"encoder.layers.self_attn": [], "decoder.layers.self_attn": [], "decoder.layers.multihead_attn": []}
    x, y = memory.double(), target.double()
    for layer in model.encoder.layers:
        weights, out = mha_explicit(layer.self_attn, x, x)
        found["encoder.layers.self_attn"].append(weights)
        x = feed_forward(layer, after(layer, x, out, layer.norm1), layer.norm2)
    x = F.layer_norm(x, (WIDTH,), model.encoder.norm.weight.double(), model.encoder.norm.bias.double())
    for layer in model.decoder.layers:
        weights, out = mha_explicit(layer.self_attn, y, y, mask)
        found["decoder.layers.self_attn"].append(weights)
        y = after(layer, y, out, layer.norm1)
        weights, out = mha_explicit(layer.multihead_attn, y, x)
        found["decoder.layers.multihead_attn"].append(weights)
        y = feed_forward(layer, after(layer, y, out, layer.norm2), layer.norm3)
    return found


def test_encoder_decoder_flow_joins_both_streams():
    torch.manual_seed(0)
    model = sharpen(nn.Transformer(WIDTH, HEADS, 1, 1, 32, batch_first=True), 2.2, "in_proj_weight")
    memory, target = tokens(), tokens(2, 6, seed=2)
    source = foveate.wrap(model, memory, target).source(logits=lambda out: out[:, 0])
    assert source.gaps == ()
    assert source.rows[2] == "token 0"
    batch = source.batch(memory)
    found = rollout(trace(source, batch))
    with torch.no_grad():
        truth = transformer_explicit(model, memory, target, torch.ones(6, 6, dtype=torch.bool))
    own, cross, encoder = (
        truth[name][0].mean(1)
        for name in ("decoder.layers.self_attn", "decoder.layers.multihead_attn", "encoder.layers.self_attn")
    )
    eye = torch.eye(11, dtype=torch.float64)
    # R_yx = (0.5 cross) R_xx from query 0; what stays with the queries is lost to the encoder's tokens.
    expected = (0.5 * cross @ (0.5 * eye + 0.5 * encoder))[:, 0]
    assert (found - expected).abs().max() < 1e-6
    assert not torch.allclose(own[0], torch.eye(6, dtype=torch.float64))


# ------------------------------------------------------------------------------- windows and time


def swin():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                value.normal_(0, 1)
    return sharpen(model, 2.5, "query.weight", "key.weight", "q_proj.weight", "k_proj.weight")


CLASSES = 5


def swin_dense(model, x):
    """Rollout ``(sample, query patch, first patch)`` by N x N matrices over patches in raster order, float64.

    Weights are the eager model's own; windows and shifts are index arithmetic on the grid of patches.
    """
    eager = copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    kept, shifts = [], []
    for stage in eager.swin.encoder.layers:
        for block in stage.blocks:
            shifts.append(block.shift_size)
            block.attention.register_forward_hook(lambda module, args, out: kept.append(_weights_of(out)))
    with torch.no_grad():
        eager(x.double(), output_attentions=True)
    joined, side = torch.eye(256, dtype=torch.float64).expand(len(x), -1, -1), 16
    for number, (weights, shift) in enumerate(zip(kept, shifts, strict=True)):
        if number == 2:
            joined = _pooling(side) @ joined
            side //= 2
        fused = weights.mean(1).unflatten(0, (len(x), -1))
        places = _windows(side, 4, shift)
        dense = torch.zeros(len(x), side * side, side * side, dtype=torch.float64)
        for window, place in enumerate(places):
            dense[:, place[:, None], place[None]] = fused[:, window]
        joined = (0.5 * torch.eye(side * side, dtype=torch.float64) + 0.5 * dense) @ joined
    return joined


def _weights_of(out):
    found = [t for t in (out if isinstance(out, tuple) else (out,)) if t.dim() == 4 and t.shape[-1] == t.shape[-2]]
    assert found, "the eager model returned no weights"
    return found[0]


def _windows(side, size, shift):
    """Raster positions of each window's tokens after a cyclic shift, (window, token)."""
    grid = torch.arange(side * side).view(side, side)
    rows = [(torch.arange(size) + size * w + shift) % side for w in range(side // size)]
    return torch.stack([grid[r[:, None], c[None]].flatten() for r in rows for c in rows])


def _pooling(side):
    """Mean over 2 x 2 patches, (merged, patch)."""
    matrix = torch.zeros(side * side // 4, side * side, dtype=torch.float64)
    for y in range(side):
        for x in range(side):
            matrix[(y // 2) * (side // 2) + x // 2, y * side + x] = 0.25
    return matrix


def test_swin_rollout_through_windows_shifts_and_merging_equals_the_dense_product():
    model, x = swin(), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    w = foveate.wrap(model, x)
    assert [found.per_sample for found in w.sites.values()] == [16, 4]
    captured = w.capture(x, rows=None, reductions=("entropy",))
    assert next(iter(captured.datasets.values())).entropy.dims == ("sample", "window", "layer", "head", "token")
    source = w.source()
    assert source.gaps == ()
    found = rollout(trace(source, source.batch(x)))
    tokens = source.tokens[source.bottom]
    raster = torch.from_numpy(tokens.y // 2 * 16 + tokens.x // 2).long()
    assert sorted(raster.tolist()) == list(range(256))
    expected = swin_dense(model, x).mean(1)  # the answer reads the mean over patches
    assert (found - expected[:, raster]).abs().max() < 1e-5 * expected.max()
    unshifted = rollout_matrix([torch.eye(256)[None]])
    assert (expected[0] - unshifted.mean(0)).abs().max() > 1e-3


def timesformer():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.TimesformerConfig(
        image_size=32,
        patch_size=8,
        num_frames=3,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=48,
        num_labels=CLASSES,
    )
    torch.manual_seed(0)
    return sharpen(transformers.TimesformerForVideoClassification(config), 2.5, "qkv.weight")


def test_divided_space_time():
    model = timesformer()
    clip = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    w = foveate.wrap(model, clip)
    time, space = w.sites.values()
    assert (time.site.kind, space.site.kind) == ("temporal", "self")
    assert (time.per_sample, space.per_sample) == (16, 3)
    w.relabel(time.site.id, group=("position",)).relabel(space.site.id, group=("frame",))
    captured = w.capture(clip)
    truth = {}
    twin = copy.deepcopy(model).double()
    for path, module in twin.named_modules():
        if type(module).__name__ == "TimesformerSelfAttention":
            module.register_forward_hook(partial(_note_weights, truth, path))
    with torch.no_grad():
        twin(clip.double())
    for found, axis in ((time, "position"), (space, "frame")):
        site = captured[found.site.id]
        assert site.attention.dims[:2] == ("sample", axis)
        assert {path for path in truth if path in found.site.modules} == set(found.site.modules)
        for path, layer in found.site.modules.items():
            got = torch.from_numpy(site.attention.sel(layer=layer).values).flatten(0, 1)
            assert (got - truth[path]).abs().max() < 1e-5
    source = w.source()
    assert any("CLS added or copied" in gap for gap in source.gaps)
    with pytest.raises(foveate.FoveateError, match="write a plugin"):
        rollout(trace(source, source.batch(clip)))


def _note_weights(found, path, module, args, out):
    found[path] = _qkv_weights(module, args[0])


def _qkv_weights(module, x):
    """A from the module's own projection in float64."""
    q, k, _ = (x @ module.qkv.weight.T + module.qkv.bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return attention_weights(q, k)
