"""Interventions by site, layer and label on a source; captures, rollout and relevance of the changed model."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.capture.head_means import head_means
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout, Replace
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.tap import Tap
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey, CallLabels, CapturePlan, SitePlan, Target
from foveate.testing.oracles import rollout_matrix
from foveate.testing.tiny import SITE, TinyConfig, TinySource, TinyViT, tiny_samples

STYLES = ["sdpa", "manual", "mha", "mha_weights"]
CLS_PATCH = {"query": "cls", "key": "patch"}
ALL = slice(None)


def opened(style="sdpa", **options):
    source = TinySource(TinyConfig(style=style, layers=3, **options))
    return source, source.encode(tiny_samples(3))


def hand_edited(source, batch, edit=lambda layer, a: a, outputs=None):
    """Logits and A by layer of the same weights, float64, where ``edit(layer, A)`` follows each softmax.

    ``outputs``, a list, receives every layer's A V.
    """
    model, config = source.module, source.config
    state = {name: value.double() for name, value in model.state_dict().items()}
    twin = TinyViT(config).double()
    twin.load_state_dict(state)
    x = torch.cat([twin.cls.expand(len(batch), -1, -1), twin.embed(batch.inputs.double()).flatten(2).mT], 1)
    x = x + twin.position
    maps = []
    for layer, block in enumerate(twin.blocks):
        mha = block.attention
        names = ("in_proj_weight", "in_proj_bias", "out_proj") if config.style.startswith("mha") else None
        weight, bias, out = (getattr(mha, n) for n in names) if names else (mha.qkv.weight, mha.qkv.bias, mha.proj)
        y = block.norm1(x) @ weight.T + bias
        q, k, v = y.unflatten(-1, (3, config.heads, -1)).permute(2, 0, 3, 1, 4)
        a = edit(layer, torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1))
        maps.append(a)
        if outputs is not None:
            outputs.append((a @ v).detach())
        x = x + (a @ v).transpose(1, 2).flatten(2) @ out.weight.T + out.bias
        x = x + block.mlp(block.norm2(x))
    return twin.head(twin.norm(x)[:, 0]), maps


def without_cls_to_patch(layer, a):
    if layer != 1:
        return a
    a = a.clone()
    a[:, 2, 0, 1:] = 0
    return a / a.sum(-1, keepdim=True)


@pytest.mark.parametrize("style", STYLES)
def test_a_labelled_knockout_equals_the_hand_edited_model(style):
    source, batch = opened(style)
    with intervene(source, [Knockout(SITE, 1, 2, **CLS_PATCH)], on=batch) as editor:
        traced = trace(source, batch)
    logits, maps = hand_edited(source, batch, without_cls_to_patch)
    torch.testing.assert_close(traced.outputs.double(), logits, atol=2e-5, rtol=1e-5)
    for layer, expected in enumerate(maps):
        found = traced.records[CallKey(SITE, layer)].rows(ALL).double()
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert [(a.layer, a.calls, a.edges) for a in editor.applied] == [(1, 1, 16)]
    assert traced.certify().passed
    intact, _ = hand_edited(source, batch)
    assert (logits - intact).abs().max() > 1e-3


@pytest.mark.parametrize("style", ["sdpa", "manual"])
def test_rollout_and_relevance_are_those_of_the_changed_model(style):
    source, batch = opened(style)
    with intervene(source, [Knockout(SITE, [0, 1, 2], query="cls", key="patch")], on=batch):
        traced = trace(source, batch, grad=True)
        bound = source.bind(traced.outputs, batch, Target(scale="logit"))
    cut = rollout(traced)
    # CLS reads from itself alone, so nothing of any patch arrives
    expected = torch.zeros_like(cut)
    expected[:, 0] = 1
    torch.testing.assert_close(cut, expected)
    assert (relevance(traced, bound)[:, 1:] == 0).all()
    with intervene(source, [Knockout(SITE, 1, 2, **CLS_PATCH)], on=batch):
        partly = rollout(trace(source, batch))
    _, maps = hand_edited(source, batch, without_cls_to_patch)
    for sample in range(len(batch)):
        joined = rollout_matrix([a[sample].detach() for a in maps])
        torch.testing.assert_close(partly[sample].double(), joined[0], atol=1e-5, rtol=1e-4)


def test_gradients_of_the_input_flow_through_an_intervention():
    source, batch = opened()
    twin_inputs = batch.inputs.double().requires_grad_()
    logits, _ = hand_edited(source, replace(batch, inputs=twin_inputs), without_cls_to_patch)
    logits[:, 0].sum().backward()
    with intervene(source, [Knockout(SITE, 1, 2, **CLS_PATCH)], on=batch):
        traced = trace(source, batch, grad=True)
        traced.outputs[:, 0].sum().backward()
    torch.testing.assert_close(traced.batch.inputs.grad.double(), twin_inputs.grad, atol=1e-4, rtol=1e-3)


def test_patching_a_whole_layer_in_from_another_batch():
    source, batch = opened()
    other = source.encode(tiny_samples(3, seed=5))
    donor = trace(source, other)
    _, donor_maps = hand_edited(source, other)
    with intervene(source, [Replace(SITE, 0, by=donor.records)]):
        patched = source.forward(batch)
    logits, _ = hand_edited(source, batch, lambda layer, a: donor_maps[0] if layer == 0 else a)
    torch.testing.assert_close(patched.double(), logits, atol=2e-5, rtol=1e-5)


def test_what_a_run_captures_under_an_intervention_is_certified():
    source, batch = opened()
    plan = CapturePlan((SitePlan(SITE, rows="all"),))
    with intervene(source, [Knockout(SITE, query="patch", key="cls")], on=batch):
        captured = capture_batch(source, batch, plan)
        assert certify(source, batch).passed
    attention = captured.sites[SITE].arrays["attention"]
    assert (attention[..., 1:, 0] == 0).all()
    np.testing.assert_allclose(attention.sum(-1), 1, atol=1e-5)


def test_a_batch_gives_the_same_as_its_samples_one_by_one():
    source, batch = opened()
    changes = [Replace(SITE, 0, by="shuffled", seed=4), AblateHeads(SITE, 2, 1, to="mean")]
    with intervene(source, changes):
        together = source.forward(batch)
        alone = torch.cat([source.forward(batch.replace(batch.inputs[[i]], [i])) for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_labels_come_from_a_batch_a_trace_or_by_hand():
    source, batch = opened()
    axis = trace(source, batch).labels(CallKey(SITE, 0)).query
    outputs = []
    for on in (batch, trace(source, batch), CallLabels((("sample", 3),), axis, axis)):
        with intervene(source, [Knockout("vision.*", 1, **CLS_PATCH)], on=on):
            outputs.append(source.forward(batch))
            source.forward(batch)  # a second forward is changed alike
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_a_plain_module_numbers_its_modules_as_layers():
    source, batch = opened()
    with intervene(source, [Knockout(SITE, 1, 2, **CLS_PATCH)], on=batch):
        expected = source.forward(batch)
    with intervene(source.module, [Knockout("blocks.*.attention", 1, 2, query="at:0", key="!at:0")]):
        assert torch.equal(source.forward(batch), expected)


def test_the_model_is_the_same_afterwards():
    source, batch = opened("mha")
    before = {name: value.clone() for name, value in source.module.state_dict().items()}
    plain = trace(source, batch).outputs
    with intervene(source, [AblateHeads(SITE)]):
        changed = source.forward(batch)
    assert not torch.allclose(changed, plain)
    assert torch.equal(trace(source, batch).outputs, plain)
    assert all(torch.equal(before[name], value) for name, value in source.module.state_dict().items())


@pytest.mark.parametrize("style", STYLES)
def test_head_means_are_those_of_all_samples_and_queries(style):
    source, batch = opened(style)
    outputs = []
    hand_edited(source, batch, outputs=outputs)
    whole = head_means(source, [batch])
    parts = head_means(source, [batch.replace(batch.inputs[:2], [0, 1]), batch.replace(batch.inputs[2:], [2])])
    for layer, heads in enumerate(outputs):
        for means in (whole, parts):
            torch.testing.assert_close(means[CallKey(SITE, layer)], heads.mean((0, 2)), atol=1e-5, rtol=1e-5)
    with intervene(source, [AblateHeads(SITE, 0, 1, to=whole)]), Tap(source.module) as tap:
        source.forward(batch)
    found = tap.records[0].out[:, 1].double()
    torch.testing.assert_close(found, whole[CallKey(SITE, 0)][1].expand_as(found), atol=1e-5, rtol=1e-5)


def test_what_does_not_exist_or_fit_is_an_error():
    source, batch = opened()
    for change, message in (
        (Knockout("text.self"), "no site 'text.self' in tiny"),
        (Knockout(SITE, [1, 9]), r"no layers \[9\]"),
        (Knockout(SITE, heads=[3]), r"heads 0 to 2, not \[3\]"),
        (Knockout(SITE, **CLS_PATCH), "need labels"),
    ):
        with pytest.raises(UsageError, match=message), intervene(source, [change]):
            source.forward(batch)
    short = trace(source, batch).labels(CallKey(SITE, 0)).query.take(range(4))
    labels = CallLabels((("sample", 3),), short, short)
    wrong = intervene(source, [Knockout(SITE, **CLS_PATCH)], on=labels)
    with pytest.raises(CaptureError, match="17 queries and 17 keys, but labels for 4 and 4"), wrong:
        source.forward(batch)
    with pytest.raises(CaptureError, match="never ran"), intervene(source, [AblateHeads(SITE)]):
        pass


def test_softmax_over_queries_is_refused():
    source, _ = opened()
    (site,) = source.sites
    other = replace(site, normalised_over="query")
    type(source).sites, kept = property(lambda self: (other,)), type(source).sites
    try:
        with pytest.raises(UsageError, match="only attention over keys"), intervene(source, [AblateHeads(SITE)]):
            pass
    finally:
        type(source).sites = kept
