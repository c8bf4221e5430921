"""What wrap finds, names, refuses and says; captures under every mode in which models run."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import foveate
from capture.any_models import HEADS, TOKENS, WIDTH, AnyViT, Attention, explicit, images
from capture.test_deformable import Deformable, call, dense
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.capture.rollout import rollout
from foveate.capture.tap import Tap
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target, TokenAxis
from foveate.testing.oracles import attention_weights, rollout_matrix

SITE = "blocks.attn"


def tokens(count=2, length=TOKENS, seed=1):
    return torch.randn(count, length, WIDTH, generator=torch.Generator().manual_seed(seed))


def values(captured, site=SITE):
    return torch.from_numpy(captured[site].attention.transpose("layer", ...).values)


def exact(captured, model, x, tolerance=2e-5):
    return all(
        (got - truth).abs().max() < tolerance
        for got, truth in zip(values(captured), explicit(model, x), strict=True)
    )


# ------------------------------------------------------------------------------- names and groups


def test_layers_are_grouped_by_the_number_that_varies():
    class Residual(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.fn = nn.Sequential(*parts)

        def forward(self, x):
            return x + self.fn(x)

    model = nn.Sequential(
        *(Residual(nn.LayerNorm(WIDTH), Attention("fused")) for _ in range(3)), nn.Linear(WIDTH, 3)
    )
    w = foveate.wrap(model.eval(), tokens())
    (found,) = w.sites.values()
    assert found.pattern == "*.fn.1"
    assert found.site.modules == {"0.fn.1": 0, "1.fn.1": 1, "2.fn.1": 2}


def test_layers_of_different_shape_are_sites_of_their_own():
    class Reduced(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Attention("fused") for _ in range(4))

        def forward(self, x):
            for number, block in enumerate(self.blocks):
                x = block(x[:, : TOKENS - 8 * (number // 2)])
            return x

    w = foveate.wrap(Reduced().eval(), tokens())
    assert [found.site.layers for found in w.sites.values()] == [(0, 1), (2, 3)]
    assert list(w.sites) == ["blocks", "blocks-2"]
    captured = w.capture(rows={"blocks-2": [0]})
    assert list(captured.datasets) == ["blocks-2"]
    assert captured["blocks-2"].attention.shape == (2, 2, HEADS, 1, TOKENS - 8)
    with pytest.raises(UsageError, match="no site 'blocks'"):
        captured["blocks"]


def test_a_module_that_runs_again_gets_an_axis_for_its_calls():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Attention("unfused")

        def forward(self, x):
            return self.block(self.block(self.block(x)))

    model = Shared().eval()
    captured = foveate.wrap(model, tokens()).capture()
    assert captured["block"].attention.dims == ("sample", "frame", "layer", "head", "query", "key")
    with torch.no_grad():
        second = model.block(tokens())
        q, k = (heads(t) for t in (model.block.q(second), model.block.kv(second).chunk(2, -1)[0]))
    got = torch.from_numpy(captured["block"].attention.values)[:, 1, 0]
    assert (got - attention_weights(q, k)).abs().max() < 2e-6


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_batch_axis_may_be_the_second():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, HEADS, 32), 1, enable_nested_tensor=False
    ).eval()
    w = foveate.wrap(encoder, torch.randn(6, 3, WIDTH))
    assert w.capture()["layers.self_attn"].attention.shape == (3, 1, HEADS, 6, 6)
    assert w.capture(torch.randn(9, 4, WIDTH))["layers.self_attn"].attention.shape == (4, 1, HEADS, 9, 9)


def test_cross_attention_from_learned_queries_and_the_table():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.probe = nn.Parameter(torch.randn(1, 1, WIDTH))
            self.inner = Attention("fused")
            self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

        def forward(self, x):
            x = self.inner(x)
            pooled = self.attention(self.probe.expand(len(x), -1, -1), x, x)[0]
            return pooled[:, 0].softmax(-1)

    w = foveate.wrap(Pool().eval(), tokens())
    assert w.sites["attention"].site.kind == "cross"
    assert w.sites["attention"].reason == "q comes from learned parameters, k from the output of inner"
    assert w.elsewhere == {"": 1}
    text = repr(w)
    assert "Pool: 2 attention calls in 2 sites" in text
    assert "1 x 17" in text
    assert "softmaxes that met no values, taken for no attention: the model x 1" in text


# ------------------------------------------------------------------------------- what is kept


def test_rows_reductions_and_labels():
    model, x = AnyViT(), images()
    w = foveate.wrap(model, x)
    labels = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(4, 4, height=16, width=16))
    w.relabel(SITE, query=labels, key=labels, name="self")
    captured = w.capture(rows=[0, 5], reductions=("topk", "head_mean"), topk=3)
    site = captured["self"]
    truth = torch.stack(explicit(model, x), 1)
    assert site["query"].values.tolist() == [0, 5]
    assert site.query_y.values[1] == 6
    assert np.array_equal(site.key_x.values, labels.x, equal_nan=True)
    assert (torch.from_numpy(site.attention.values) - truth[..., [0, 5], :]).abs().max() < 2e-5
    assert (torch.from_numpy(site.head_mean.values) - truth.mean(2)).abs().max() < 2e-5
    assert (torch.from_numpy(site.topk_value.values) - truth.topk(3).values).abs().max() < 2e-5
    assert captured.tree["sites/self"].attrs["kind"] == "self"
    assert captured.tree.attrs["passed"]


def test_other_sizes_than_the_examples():
    torch.manual_seed(0)
    attention = nn.Sequential(Attention("fused"), Attention("fused")).eval()
    w = foveate.wrap(attention, tokens())
    captured = w.capture(tokens(5, 9))
    assert next(iter(captured.datasets.values())).attention.shape == (5, 2, HEADS, 9, 9)
    assert len(captured.certificate.checks) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": [17]}, "queries 0 to 16"),
        ({"rows": [-1]}, "queries 0 to 16"),
        ({"sites": ["nope"]}, "no site 'nope'"),
        ({"rows": {"nope": [0]}}, "no site 'nope'"),
        ({"reductions": ("nope",)}, "no reduction 'nope'"),
    ],
)
def test_what_does_not_exist_is_a_usage_error(options, message):
    w = foveate.wrap(AnyViT(depth=1), images())
    with pytest.raises(UsageError, match=message):
        w.capture(**options)


def test_wrong_labels_are_refused():
    w = foveate.wrap(AnyViT(depth=1), images())
    with pytest.raises(UsageError, match="has 17 key tokens, not 3"):
        w.relabel(SITE, key=TokenAxis.of_kind("patch", 3))
    with pytest.raises(UsageError, match="group axes"):
        w.relabel(SITE, group=("window",))


def test_full_matrices_that_do_not_fit_are_refused(monkeypatch):
    from foveate.capture import wrap_capture

    w = foveate.wrap(AnyViT(depth=1), images())
    monkeypatch.setattr(wrap_capture, "LARGEST", 1000)
    with pytest.raises(UsageError, match="take more than"):
        w.capture()
    w.capture(rows=[0])


# ------------------------------------------------------------------------------- how models run


@pytest.mark.parametrize("spelling", ["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(spelling, dtype):
    model, x = AnyViT(spelling, depth=1), images()
    with torch.autocast("cpu", dtype):
        w = foveate.wrap(model, x)
        captured = w.capture(x)
    # One layer: the only differences to float64 are the roundings of q and k.
    truth = explicit(model, x)[0]
    assert (values(captured)[0] - truth).abs().max() < (0.15 if dtype == torch.bfloat16 else 0.02)
    assert captured.certificate.passed


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_grad_modes(mode):
    model, x = AnyViT(), images()
    with mode():
        assert exact(foveate.wrap(model, x).capture(x), model, x)


def test_source_from_inside_inference_mode():
    model = AnyViT(depth=2)
    with torch.inference_mode():
        source = foveate.wrap(model, images()).source()
    assert source.gaps == ()


def test_nested_captures():
    model, x = AnyViT(), images()
    w = foveate.wrap(model, x)
    with torch.no_grad(), Tap(model) as outer:
        captured = w.capture(x)
    assert exact(captured, model, x)
    assert len(outer.records) == 3


def test_compiled_models_run_eagerly():
    model, x = AnyViT(), images()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    w = foveate.wrap(compiled, x)
    assert list(w.sites) == [SITE]
    assert exact(w.capture(x), model, x)
    parts = AnyViT()
    parts.blocks[1].compile(backend="eager")
    assert exact(foveate.wrap(parts, x).capture(x), parts, x)


def test_a_compiled_function_inside_a_model():
    @torch.compile(backend="eager")
    def attend(q, k, v):
        return (q @ k.mT).softmax(-1) @ v

    class Inner(nn.Module):
        def forward(self, x):
            return attend(x, x, x)

    x = tokens()
    with torch.no_grad():
        Inner()(x)
    captured = foveate.wrap(Inner(), x).capture(x)
    got = torch.from_numpy(captured["Inner"].attention.values)[:, 0]
    assert (got - attention_weights(x[:, None], x[:, None], scale=1.0)).abs().max() < 2e-6


def test_active_dropout_is_refused():
    model = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True).train()
    with pytest.raises(CaptureError, match=r"dropout is active(.|\n)*model.eval\(\)"):
        foveate.wrap(model, tokens())
    w = foveate.wrap(model.eval(), tokens())
    model.train()
    with pytest.raises(CaptureError, match="dropout is active"):
        w.capture()


def test_dropout_called_as_a_function_fails_the_certificate():
    class Dropping(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    w = foveate.wrap(Dropping(), tokens()[:, None])
    with pytest.raises(CaptureError, match=r"does not reproduce(.|\n)*eval mode"):
        w.capture()


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention("fused")

        def forward(self, x):
            return checkpoint(self.attn, x, use_reentrant=reentrant)

    model, x = Checkpointed().eval(), tokens().requires_grad_()
    w = foveate.wrap(model, x)
    assert w.capture(x)["attn"].attention.shape == (2, 1, HEADS, TOKENS, TOKENS)
    if reentrant:
        with pytest.raises(CaptureError, match="checkpointing"):
            w.records(x, grad=True)
        return
    out, records = w.records(x, grad=True)
    (record,) = records.values()
    found = record.weight_gradient(slice(None), torch.autograd.grad(out.sum(), record.node)[0])
    out, records = foveate.wrap(model.attn, x).records(x, grad=True)
    (plain,) = records.values()
    expected = plain.weight_gradient(slice(None), torch.autograd.grad(out.sum(), plain.node)[0])
    assert torch.equal(found, expected)


def test_an_exception_in_mid_forward_leaves_the_model_usable():
    model, x = AnyViT(), images()
    w = foveate.wrap(model, x)
    with pytest.raises(RuntimeError):
        w.capture(images()[:, :2])
    assert torch.overrides._get_current_function_mode_stack() == []
    assert exact(w.capture(x), model, x)


def test_wrapping_leaves_the_model_as_it_was():
    model, x = AnyViT(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [value.requires_grad for value in model.parameters()]
    with torch.no_grad():
        plain = model(x)
        foveate.wrap(model, x).source()
        assert torch.equal(plain, model(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [value.requires_grad for value in model.parameters()]
    assert all(value.grad is None for value in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_pre_hooks


# ------------------------------------------------------------------------------- what cannot be seen


def test_parallel_replicas_are_refused_wherever_they_are():
    for model in (nn.DataParallel(AnyViT()), nn.Sequential(nn.DataParallel(AnyViT()))):
        with pytest.raises(CaptureError, match=r"DataParallel(.|\n)*\.module"):
            foveate.wrap(model, images())


def test_other_threads_are_refused():
    class Threaded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention("fused"), Attention("fused")

        def forward(self, x):
            x, found = self.first(x), []
            worker = threading.Thread(target=lambda: found.append(self.second(x)))
            worker.start()
            worker.join()
            return found[0]

    with pytest.raises(CaptureError, match=r"second, .* ran on another thread"):
        foveate.wrap(Threaded().eval(), tokens())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_scripted_code_is_refused():
    class Plain(nn.Module):
        def forward(self, x):
            return torch.softmax(x @ x.transpose(-2, -1), -1) @ x

    for scripted in (torch.jit.script(Plain()), torch.jit.trace(Plain(), tokens())):
        with pytest.raises(CaptureError, match="scripted or traced"):
            foveate.wrap(nn.Sequential(scripted), tokens())


def test_tracing_and_function_transforms_are_refused():
    model = Attention("unfused").eval()
    w = foveate.wrap(model, tokens())
    with pytest.raises(CaptureError, match=r"torch.func \(vmap"):
        torch.vmap(lambda x: w.capture(x).outputs)(tokens()[None])

    class Mapped(nn.Module):
        def forward(self, x):
            return torch.vmap(lambda t: torch.softmax(t @ t.mT, -1) @ t)(x)

    with pytest.raises(CaptureError, match="hidden axes"):
        foveate.wrap(Mapped(), tokens())


def test_kernels_below_torchs_functions_are_found_by_the_census():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention("fused")

        def forward(self, x):
            x = self.attn(x)[:, None]
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]

    with pytest.raises(CaptureError, match=r"the tap did not see\n  the model itself: 1 attention kernels ran, 0"):
        foveate.wrap(Hidden().eval(), tokens())


def test_models_without_attention_are_refused():
    with pytest.raises(CaptureError, match=r"no attention was seen(.|\n)*met no values: 1"):
        foveate.wrap(nn.Sequential(nn.Linear(WIDTH, 3), nn.Softmax(-1)), tokens())
    with pytest.raises(CaptureError, match=r"expected a torch.nn.Module"):
        foveate.wrap("model", tokens())


def test_calls_that_the_example_did_not_show_are_errors():
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = Attention("fused")

        def forward(self, x, times):
            for _ in range(times):
                x = self.attn(x)
            return x

    w = foveate.wrap(Looping().eval(), tokens(), 2)
    w.capture(tokens(), 2)
    with pytest.raises(CaptureError, match=r"attends for the 3\. time"):
        w.capture(tokens(), 3)
    with pytest.raises(CaptureError, match="was not seen"):
        w.capture(tokens(), 1)


# ------------------------------------------------------------------------------- as a source


def test_a_wrapped_source_passes_the_full_certification():
    class Probable(AnyViT):
        def forward(self, x):
            return super().forward(x).softmax(-1)

    for kind in (AnyViT, Probable):
        source = foveate.wrap(kind(), images()).source()
        proof = certify(source, source.batch(images(3)))
        proof.require()
        assert proof.certificate.value_error < 1e-5
        assert len(proof.census) == (3 if kind is AnyViT else 4)


def test_a_wrapped_source_through_the_engine():
    model = AnyViT()
    w = foveate.wrap(model, images())
    source = w.source(classes=list("abcde"), preprocess=lambda samples: images(len(samples)))
    samples = [Sample(f"s{i}", np.zeros((20, 30, 3), np.uint8)) for i in range(3)]
    batch = source.encode(samples)
    assert batch.geometry[0].scale_x == pytest.approx(16 / 30)
    captured = capture_batch(source, batch, CapturePlan((SitePlan(SITE),)))
    site = captured.sites[SITE]
    assert site.rule == "token 0"
    assert site.query_index == (0,)
    truth = torch.stack(explicit(model, images(3)), 1)[..., :1, :]
    assert (torch.from_numpy(site.arrays["attention"]) - truth).abs().max() < 2e-5
    with torch.no_grad():
        logits = model(images(3))
    best = source.predictions(captured.outputs, batch)[0][0]
    assert best.class_index == int(logits[0].argmax())
    assert best.label == "abcde"[best.class_index]
    bound = source.bind(captured.outputs, batch, Target(label="c", scale="logit"))
    assert torch.equal(source.score(captured.outputs, batch, bound), logits[:, 2])
    assert torch.equal(source.score(logits, batch, bound.at("probability")), logits.softmax(-1)[:, 2])


def test_a_source_says_what_it_does_not_know():
    source = foveate.wrap(AnyViT(pool=None), images()).source()
    batch = source.batch(images())
    assert source.readout(batch, None) == {}
    with pytest.raises(CaptureError, match="names no readout"):
        rollout(trace(source, batch))
    with pytest.raises(UsageError, match=r"source\(logits="):
        source.predictions(torch.zeros(2, 3, 4), batch)
    with pytest.raises(UsageError, match=r"preprocess"):
        source.encode([])
    # The user can say it instead.
    weights = torch.zeros(TOKENS)
    weights[3] = 1.0
    source.rows = (SITE, weights, "token 3")
    found = rollout(trace(source, batch))
    truth = rollout_matrix([a[0] for a in explicit(AnyViT(), images())])
    assert (found[0] - truth[3]).abs().max() < 1e-5


def test_deformable_attention_is_captured_but_its_flow_is_not_guessed():
    points, logits, levels = call()
    model = Deformable()
    w = foveate.wrap(model, points, logits, levels)
    assert w.sites["Deformable"].site.form == "deformable"
    captured = w.capture()
    got = torch.from_numpy(captured["Deformable"].attention.values)[:, 0]
    assert (got - dense(points, model.weights)).abs().max() < 1e-6
    with pytest.raises(CaptureError, match="it samples points"):
        w.source()


# ------------------------------------------------------------------------------- samples in the batch


class Framed(nn.Module):
    """Attention within frames, whose batch holds samples block by block ("slow") or interleaved ("fast")."""

    def __init__(self, order):
        super().__init__()
        self.order, self.attn = order, Attention("fused")

    def forward(self, x):
        frames = x.transpose(0, 1) if self.order == "fast" else x
        if self.order == "mixed":
            frames = frames + frames.mean((0, 1))
        return self.attn(frames.flatten(0, 1))


def clips(count=2):
    return torch.randn(count, 3, TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("order", ["slow", "fast"])
def test_how_samples_lie_in_the_batch_is_found_out(order):
    model = Framed(order).eval()
    w = foveate.wrap(model, clips())
    assert w.sites["attn"].order == order
    got = w.capture(clips(4))["attn"].attention
    assert got.dims[:2] == ("sample", "window")
    with torch.no_grad():
        x = clips(4).flatten(0, 1)
        q, k = heads(model.attn.q(x)), heads(model.attn.kv(x).chunk(2, -1)[0])
    truth = attention_weights(q, k).unflatten(0, (4, 3))
    assert (torch.from_numpy(got.values)[:, :, 0] - truth).abs().max() < 2e-6


def test_samples_that_cannot_be_told_apart_stay_one_axis():
    w = foveate.wrap(Framed("mixed").eval(), clips())
    assert w.sites["attn"].per_sample == 0
    assert w.capture(clips())["attn"].attention.dims[0] == "batch"


def test_one_sample_does_not_show_the_order():
    w = foveate.wrap(Framed("fast").eval(), clips(1))
    assert w.capture(clips(1))["attn"].attention.shape[:2] == (1, 3)
    with pytest.raises(UsageError, match="at least two samples"):
        w.capture(clips(2))
