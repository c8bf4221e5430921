"""The capture engine: what a plan asks for, exactly, and errors that name what is wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from capture.twin import explicit
from capture.windowed import FRAME, WINDOW, MislabelledSource, WindowSource, window_order
from foveate.capture.engine import capture_batch
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CapturePlan, Readout, SitePlan
from foveate.testing.oracles import entropy_rows
from foveate.testing.tiny import SITE, TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import CROSS, ENCODER, OWN, TinyDetector

STYLES = ["sdpa", "manual", "mha", "mha_weights"]
EVERYTHING = ("entropy", "received", "head_mean", "topk")


def plan(rows="readout", site=SITE, **options):
    options.setdefault("reductions", EVERYTHING)
    return CapturePlan((SitePlan(site, rows=rows, **options),))


def truth(source, batch):
    """(sample, layer, head, query, key) in float64, from an independent forward."""
    return torch.stack(explicit(source, batch)[1], 1).detach()


def opened(style="sdpa", **config):
    source = TinySource(TinyConfig(style=style, **config))
    return source, source.encode(tiny_samples(3))


@pytest.mark.parametrize("style", STYLES)
def test_all_rows_and_reductions_equal_explicit_matrices(style):
    source, batch = opened(style)
    expected = truth(source, batch)
    captured = capture_batch(source, batch, plan("all", topk=4))
    arrays = captured.sites[SITE].arrays
    assert arrays["attention"].dtype == np.float32
    for name, value in {
        "attention": expected,
        "entropy": entropy_rows(expected),
        "received": expected.mean(-2),
        "head_mean": expected.mean(-3),
        "topk_value": expected.topk(4)[0],
    }.items():
        assert arrays[name].shape == tuple(value.shape)
        assert np.abs(arrays[name] - value.numpy()).max() < 2e-5, name
    taken = np.take_along_axis(arrays["attention"], arrays["topk_index"].astype(int), -1)
    assert np.array_equal(taken, arrays["topk_value"])
    assert captured.certificate.passed
    assert torch.equal(captured.outputs, source.forward(batch))


def test_readout_rows_fixed_or_known_only_after_the_forward():
    source, batch = opened()
    now = capture_batch(source, batch, plan()).sites[SITE]
    source.fixed_readout = lambda batch: {}
    later = capture_batch(source, batch, plan()).sites[SITE]
    assert np.allclose(now.arrays["attention"], later.arrays["attention"], atol=1e-7)
    assert now.query_index == (0,)
    # what depends on the answer may agree in one batch and not in the next: it never has a position
    assert later.query_index == (-1,)
    assert (now.rule, len(now.query), len(now.token), len(now.key)) == ("cls", 1, 17, 17)
    assert now.query.kind[0] == now.token.kind[0]


@pytest.mark.parametrize("fixed", [True, False])
def test_weighted_readout_is_one_row_of_kind_readout(fixed):
    source, batch = opened()
    weights = torch.full((3, 17), 0.5 / 16)
    weights[:, 0] = 0.5
    readouts = {SITE: Readout(weights, "cls + patch mean")}
    source.readout = lambda batch, outputs, bound=None: readouts
    source.fixed_readout = lambda batch: readouts if fixed else {}
    site = capture_batch(source, batch, plan()).sites[SITE]
    expected = torch.einsum("sq,slhqk->slhk", weights.double(), truth(source, batch))
    assert np.abs(site.arrays["attention"][:, :, :, 0] - expected.numpy()).max() < 2e-6
    assert site.query_index == (-1,)
    assert len(site.query.where("readout")) == 1


def test_explicit_positions_layers_and_head_mean():
    source, batch = opened(layers=3)
    site = capture_batch(source, batch, plan((5, 2), layers=(2, 0), heads="mean", reductions=())).sites[SITE]
    expected = truth(source, batch)[:, [0, 2]].mean(2, keepdim=True)[..., [5, 2], :]
    assert site.layers == (0, 2)
    assert site.query_index == (5, 2)
    assert set(site.arrays) == {"attention"}
    assert np.abs(site.arrays["attention"] - expected.numpy()).max() < 2e-6


def test_head_mean_leaves_one_head_in_every_array():
    source, batch = opened(layers=2)
    kept = capture_batch(source, batch, plan("all")).sites[SITE].arrays
    mean = capture_batch(source, batch, plan("all", heads="mean")).sites[SITE].arrays
    for name, axis in (("attention", -3), ("entropy", -2), ("received", -2)):
        np.testing.assert_allclose(mean[name], kept[name].mean(axis, keepdims=True), atol=2e-6)


def test_no_rows_keeps_reductions_only():
    source, batch = opened()
    site = capture_batch(source, batch, plan("none")).sites[SITE]
    assert "attention" not in site.arrays
    assert len(site.query) == 0
    assert site.rule == "none"


def test_batch_equals_singles():
    source, batch = opened()
    together = capture_batch(source, batch, plan("all")).sites[SITE].arrays
    for i, sample in enumerate(tiny_samples(3)):
        single = capture_batch(source, source.encode([sample]), plan("all")).sites[SITE].arrays
        for name in single:
            assert np.allclose(single[name][0], together[name][i], atol=1e-6), name


def test_object_queries_of_each_sample():
    source = TinyDetector()
    batch = source.encode(tiny_samples(4))
    captured = capture_batch(source, batch, CapturePlan((SitePlan(CROSS), SitePlan(OWN, rows="all"))))
    chosen = captured.outputs.softmax(-1).amax(-1).argmax(-1)
    assert len(set(chosen.tolist())) > 1
    t = trace(source, batch)
    for layer in range(2):
        rows = t.record((CROSS, layer, 0)).rows(slice(None))
        for i, q in enumerate(chosen.tolist()):
            found = captured.sites[CROSS].arrays["attention"][i, layer, :, 0]
            assert np.allclose(found, rows[i, :, q].numpy(), atol=1e-6)
    assert captured.sites[OWN].arrays["attention"].shape == (4, 2, 3, 5, 5)
    assert ENCODER not in captured.sites


def test_windows_and_repeated_calls_become_axes():
    source = WindowSource()
    batch = source.encode(tiny_samples(2))
    captured = capture_batch(source, batch, CapturePlan((SitePlan(WINDOW, rows="all"), SitePlan(FRAME))))
    local, clip = captured.sites[WINDOW].arrays, captured.sites[FRAME].arrays
    assert local["attention"].shape == (2, 4, 1, 3, 4, 4)
    assert clip["attention"].shape == (2, 3, 1, 3, 1, 16)
    t = trace(source, batch)
    rows = t.record((WINDOW, 0, 0)).rows(slice(None))
    assert np.array_equal(local["attention"][1, 2, 0], rows[4 + 2].numpy())
    assert np.allclose(clip["attention"][:, 2, 0], t.record((FRAME, 0, 2)).rows([0]).numpy(), atol=1e-7)
    assert not np.allclose(clip["attention"][:, 0], clip["attention"][:, 2], atol=1e-4)


def test_rollout_through_windows_equals_matrices():
    source = WindowSource()
    t = trace(source, source.encode(tiny_samples(2)))
    order = window_order()
    for i in range(2):
        local = torch.zeros(16, 16, dtype=torch.float64)
        blocks = t.record((WINDOW, 0, 0)).rows(slice(None)).mean(1)[4 * i : 4 * i + 4].double()
        for w in range(4):
            mine = order[4 * w : 4 * w + 4]
            local[mine[:, None], mine] = blocks[w]
        step = (local + torch.eye(16)) / 2
        row = torch.zeros(16, dtype=torch.float64)
        for frame in range(3):
            reads = t.record((FRAME, 0, frame)).rows([0])[i].mean(0)[0].double()
            row = row / 2 + reads / 2
        assert torch.allclose(rollout(t)[i].double(), row @ step, atol=1e-6)


def test_repeated_calls_without_a_group_axis_are_an_error():
    source = WindowSource(group=())
    with pytest.raises(CaptureError, match=r"ran 3 times.*\n.*Site.group"):
        capture_batch(source, source.encode(tiny_samples(1)), CapturePlan((SitePlan(FRAME),)))


def test_a_missed_layer_is_an_error_that_names_it():
    class Lazy(TinySource):
        def forward(self, batch, *, grad=False):
            blocks = self.module.blocks
            self.module.blocks = blocks[:1]
            try:
                return super().forward(batch, grad=grad)
            finally:
                self.module.blocks = blocks

    source = Lazy()
    with pytest.raises(CaptureError, match=r"layers \[1\], expected in blocks.1.attention"):
        capture_batch(source, source.encode(tiny_samples(1)), plan())
    with pytest.raises(CaptureError, match=r"layers \[1\]"):
        trace(source, source.encode(tiny_samples(1)))


def test_a_model_whose_attention_is_elsewhere_is_an_error_that_names_where():
    class Elsewhere(TinySource):
        @property
        def sites(self):
            return tuple(replace(s, modules={"blocks.0.mlp": 0, "blocks.1.mlp": 1}) for s in super().sites)

    source = Elsewhere()
    with pytest.raises(CaptureError, match=r"undeclared modules: blocks.0.attention, blocks.1.attention"):
        capture_batch(source, source.encode(tiny_samples(1)), plan())


def test_undeclared_attention_is_listed_unless_ignored():
    class Partial(TinySource):
        @property
        def sites(self):
            return tuple(replace(s, modules={"blocks.0.attention": 0}) for s in super().sites)

    source = Partial()
    batch = source.encode(tiny_samples(1))
    assert capture_batch(source, batch, plan()).certificate.undeclared == {"blocks.1.attention": 1}
    source.ignored = {"blocks.1.*": "not of interest"}
    assert capture_batch(source, batch, plan()).certificate.undeclared == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (plan(site="text.encoder.self"), "no site 'text.encoder.self'"),
        (plan(layers=(0, 7)), r"no layers \[7\]"),
        (plan((17,)), "has queries 0 to 16"),
        (plan((-1,)), "has queries 0 to 16"),
        (plan(reductions=("gini",)), "no reduction 'gini'"),
    ],
)
def test_plans_that_do_not_fit(wrong, message):
    source, batch = opened()
    with pytest.raises(UsageError, match=message):
        capture_batch(source, batch, wrong)


def test_wrong_labels_modules_and_heads_are_named():
    source = MislabelledSource()
    batch = source.encode(tiny_samples(1))
    with pytest.raises(CaptureError, match="25 keys, but the call has batch 1, 17 queries and 17 keys"):
        capture_batch(source, batch, plan())

    class Misspelt(TinySource):
        @property
        def sites(self):
            return tuple(replace(s, modules={"block.0.attention": 0}) for s in super().sites)

    with pytest.raises(CaptureError, match=r"(?s)no module 'block.0.attention'.*blocks.0.attention"):
        capture_batch(Misspelt(), batch, plan())

    class Heads(TinySource):
        @property
        def sites(self):
            return tuple(replace(s, heads=4) for s in super().sites)

    with pytest.raises(CaptureError, match="declared with 4 heads but ran with 3"):
        capture_batch(Heads(), batch, plan())


def test_weights_that_are_not_numbers_and_dropout_fail_the_certificate():
    source, batch = opened()
    with torch.no_grad():
        source.module.blocks[1].attention.qkv.weight[0, 0] = float("nan")
    with pytest.raises(CaptureError, match="layer 1"):
        capture_batch(source, batch, plan())
    source, batch = opened("mha")
    for block in source.module.blocks:
        block.attention.dropout = 0.5
    source.module.train()
    with pytest.raises(CaptureError, match="eval mode"):
        capture_batch(source, batch, plan())


def test_weights_changed_before_their_values_are_recorded_but_listed_as_unverified():
    class Masked(nn.Module):
        """Attention whose second head is switched off after the softmax."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            q, k, v = self.inner.qkv(x).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            out = (weights * torch.tensor([1.0, 0.0, 1.0])[:, None, None]) @ v
            return self.inner.proj(out.transpose(1, 2).flatten(2))

    source, batch = opened()
    source.module.blocks[1].attention = Masked(source.module.blocks[1].attention)
    captured = capture_batch(source, batch, plan("all"))
    assert captured.certificate.unverified == ((SITE, 1, 0),)
    assert captured.certificate.summary()["unverified_calls"] == 1
    assert np.allclose(captured.sites[SITE].arrays["attention"][:, 1].sum(-1), 1, atol=1e-6)


def test_an_exception_in_the_model_leaves_no_trace():
    source, batch = opened()
    before = {name: value.clone() for name, value in source.module.state_dict().items()}

    class Boom(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    head, source.module.head = source.module.head, Boom()
    with pytest.raises(RuntimeError, match="on purpose"):
        capture_batch(source, batch, plan())
    source.module.head = head
    assert torch.overrides._get_current_function_mode_stack() == []
    assert all(torch.equal(before[name], value) for name, value in source.module.state_dict().items())
    assert not source.module.training
    assert capture_batch(source, batch, plan()).certificate.passed


def test_compiled_models_run_eagerly_under_the_tap():
    class Compiled(TinySource):
        @property
        def sites(self):
            modules = {f"_orig_mod.blocks.{i}.attention": i for i in range(2)}
            return tuple(replace(site, modules=modules) for site in super().sites)

    plain, batch = opened()
    source = Compiled(plain.config)
    source._module = torch.compile(plain.module, backend="eager")
    source.forward(batch)
    captured = capture_batch(source, batch, plan())
    assert torch.allclose(captured.outputs, plain.forward(batch), atol=1e-6)
    assert captured.sites[SITE].arrays["attention"].shape == (3, 2, 3, 1, 17)


def test_inference_mode_and_bfloat16():
    source, batch = opened()
    source.module.bfloat16()
    batch = replace(batch, inputs=batch.inputs.bfloat16())
    with torch.inference_mode():
        captured = capture_batch(source, batch, plan("all"))
    assert captured.certificate.value_error < 1e-2
    assert captured.certificate.row_error < 1e-6
    assert np.abs(captured.sites[SITE].arrays["attention"].sum(-1) - 1).max() < 1e-5
