"""Rollout, relevance and gradient maps against whole matrices in float64."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.twin import explicit
from foveate.capture.blocks import fuse_heads
from foveate.capture.fusion import exact_threshold
from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.gradients import rounds_of
from foveate.capture.relevance import relevance
from foveate.capture.rollout import COLLAPSED, rollout, rollout_distance
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import BoundTarget, CallKey, OpaqueStep, Target, TargetRow
from foveate.testing.oracles import (
    encoder_decoder_relevance,
    entropy_rows,
    positive_gradient,
    relevance_matrix,
    rollout_matrix,
)
from foveate.testing.tiny import TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import (
    CROSS,
    ENCODER,
    OWN,
    DetectorConfig,
    TinyDetector,
)

STYLES = ["sdpa", "manual", "mha", "mha_weights"]
ALL = slice(None)


def traced(style="sdpa", layers=3, count=3):
    source = TinySource(TinyConfig(style=style, layers=layers))
    return trace(source, source.encode(tiny_samples(count)), grad=True)


def explicit_pairs(source, batch, score):
    """(A, dL/dA) of every layer and sample, from an independent float64 forward with matrices."""
    logits, matrices = explicit(source, batch)
    slopes = torch.autograd.grad(score(logits), matrices)
    return [[(a.detach()[i], g[i]) for a, g in zip(matrices, slopes, strict=True)] for i in range(len(batch))]


def relative(found, truth):
    return float((found.double() - truth).abs().max() / truth.abs().max())


def test_the_oracle_models_attention_is_peaked():
    t = traced()
    for record in t.records.values():
        entropy = entropy_rows(record.rows(ALL))
        assert entropy.median() < 0.6 * math.log(record.shape.keys)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("fuse", "residual"), [("mean", 0.5), ("max", 0.5), ("min", 0.3), ("mean", 0.0)])
def test_rollout_equals_the_matrix_product(style, fuse, residual):
    t = traced(style)
    pairs = explicit_pairs(t.source, t.batch, torch.sum)
    found = rollout(t, residual=residual, fuse=fuse)
    for i, layers in enumerate(pairs):
        truth = rollout_matrix([a for a, _ in layers], residual=residual, fuse=fuse)[0]
        assert relative(found[i], truth) < 2e-5
    assert torch.allclose(found.sum(-1), torch.ones(3))


def without_lowest(matrix, fraction, over):
    """The discard ratio by sorting, one matrix ``(query, key)``."""
    kept = matrix.clone()
    for part in [kept.view(-1)] if over == "layer" else kept:
        count = int(fraction * part.numel())
        if count:
            part[part <= part.sort()[0][count - 1]] = 0
    return kept


@pytest.mark.parametrize("over", ["layer", "row"])
@pytest.mark.parametrize(("fuse", "fraction"), [("mean", 0.9), ("max", 0.5), ("min", 0.0), ("mean", 0.001)])
def test_discarding_equals_sorting(over, fuse, fraction):
    t = traced()
    found = rollout(t, fuse=fuse, discard=fraction, discard_over=over)
    for i in range(3):
        layers = []
        for record in t.records.values():
            fused = fuse_heads(record.rows(ALL), fuse)[i]
            layers.append(without_lowest(fused, fraction, over)[None])
        assert relative(found[i], rollout_matrix(layers)[0]) < 2e-5
    if fraction == 0.9:
        assert (found == 0).float().mean() > (rollout(t, fuse=fuse) == 0).float().mean()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), min_size=2, max_size=60), st.floats(0, 0.99))
def test_the_threshold_is_exact_without_sorting(values, fraction):
    matrix = torch.tensor([values, values[::-1]]).view(2, 1, -1)
    parts = [(slice(0, 1), part) for part in matrix.split(7, dim=-1)]
    count = int(fraction * len(values))
    found = exact_threshold(lambda: parts, 2, count)
    expected = -1.0 if count == 0 else sorted(matrix[0, 0].tolist())[count - 1]
    assert found.tolist() == [expected, expected]


def test_layers_limit_the_sweep():
    t = traced()
    a = [record.rows(ALL).double() for record in t.records.values()]
    found = rollout(t, layers=(0, 2))
    for i in range(3):
        assert relative(found[i], rollout_matrix([a[0][i], a[2][i]])[0]) < 2e-5


def test_distance_tells_alike_rows_from_different_ones():
    t = traced()
    whole = [rollout_matrix([r.rows(ALL)[i] for r in t.records.values()]) for i in range(3)]
    found = rollout_distance(t, rows=3)
    for i, matrix in enumerate(whole):
        rows = matrix[[0, 8, 16]]
        pairs = [(rows[j] - rows[k]).abs().sum() / 2 for j, k in ((0, 1), (0, 2), (1, 2))]
        assert found[i] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    assert found.min() > COLLAPSED
    for record in t.records.values():
        record.q.zero_()
    t.__dict__["flow"] = [step for step in t.flow for _ in range(5)]
    assert rollout_distance(t).max() < COLLAPSED


def test_models_in_float64():
    t = traced()
    source = TinySource(t.source.config)
    source.module.double()
    double = trace(source, source.encode(tiny_samples(3)), grad=True)
    bound = source.bind(double.outputs, double.batch, Target(scale="logit"))
    for method in (rollout, relevance, grad_attention, legrad):
        assert torch.allclose(method(double, bound), method(t, bound), atol=1e-4)
    assert double.certify().value_error < 1e-13


def test_rollout_by_target_repeats_the_samples_row():
    t = traced()
    bound = BoundTarget(tuple(TargetRow(i, "class", 0) for i in (2, 0, 2, 1)))
    assert torch.allclose(rollout(t, bound), rollout(t)[[2, 0, 2, 1]], atol=1e-7)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_relevance_equals_the_matrix_recursion(style, scale):
    t = traced(style)
    bound = t.source.bind(t.outputs, t.batch, Target(scale=scale))
    classes = [row.class_index for row in bound.rows]

    def score(logits):
        table = logits.softmax(-1) if scale == "probability" else logits
        return table[range(3), classes].sum()

    pairs = explicit_pairs(t.source, t.batch, score)
    found, last, mean = relevance(t, bound), grad_attention(t, bound), legrad(t, bound)
    for i, layers in enumerate(pairs):
        identity = torch.eye(17, dtype=torch.float64)[0]
        assert relative(found[i] - identity, relevance_matrix(layers)[0] - identity) < 1e-4
        assert relative(last[i], positive_gradient(layers[-1])[0]) < 1e-4
        legrad_truth = torch.stack([g.clamp(min=0).mean((0, 1)) for _, g in layers]).mean(0)
        assert relative(mean[i], legrad_truth) < 1e-4


def test_several_targets_of_one_sample_equal_singles():
    t = traced()
    rows = tuple(TargetRow(sample, "class", c) for sample in (1, 0) for c in (0, 1, 2))
    bound = BoundTarget(rows, "logit")
    together = relevance(t, bound)
    assert [len(r) for r in rounds_of(bound)] == [2, 2, 2]
    for i, row in enumerate(rows):
        single = relevance(t, BoundTarget((row,), "logit"))
        assert torch.allclose(single[0], together[i], atol=1e-7)
    assert not torch.allclose(together[0], together[1], atol=1e-4)
    assert relevance(t, BoundTarget(())).shape[0] == 0


@pytest.mark.parametrize("method", [relevance, grad_attention, legrad])
def test_a_graph_that_is_not_kept_serves_once(method):
    t, bound = traced(), BoundTarget(tuple(TargetRow(i, "class", c) for i in (0, 1) for c in (0, 1)))
    kept = method(t, bound)
    assert torch.equal(method(t, bound), kept)
    assert torch.equal(method(t, bound, keep_graph=False), kept)
    with pytest.raises(RuntimeError, match="second time"):
        method(t, bound)


def test_batch_equals_singles_in_any_order():
    source = TinySource(TinyConfig(layers=3))
    samples = tiny_samples(4)

    def maps(chosen):
        t = trace(source, source.encode(chosen), grad=True)
        bound = source.bind(t.outputs, t.batch, Target(label=1))
        return torch.stack([rollout(t), relevance(t, bound), legrad(t, bound), grad_attention(t, bound)], 1)

    together = maps(samples)
    for i, sample in enumerate(samples):
        assert torch.allclose(maps([sample])[0], together[i], atol=1e-6)
    assert torch.allclose(maps(samples[::-1]), together.flip(0), atol=1e-6)


def detector(*, valid=None, frozen=False, queries=5):
    source = TinyDetector(DetectorConfig(queries=queries, layers=3))
    source.module.requires_grad_(not frozen)
    batch = source.encode(tiny_samples(2))
    if valid is not None:
        batch.per_sample["valid"][1, valid:] = False
    return trace(source, batch, grad=True)


def detector_truth(t, row):
    """R_qi by matrices, from the records' own A and autograd's dL/dA on float64 copies."""
    pairs = {}
    score = t.source.score(t.outputs, t.batch, BoundTarget((row,), "logit")).sum()
    for call, record in t.records.items():
        weights = record.rows(ALL)[row.sample].double()
        (slope,) = torch.autograd.grad(score, record.node, retain_graph=True, allow_unused=True)
        slope = torch.zeros_like(record.node) if slope is None else slope
        values = record.v[row.sample].double()
        pairs[call] = (weights, slope[row.sample].double() @ values.transpose(-1, -2))
    stacks = [[pairs[CallKey(site, i)] for i in range(3)] for site in (ENCODER, OWN, CROSS)]
    return encoder_decoder_relevance(*stacks)[row.object]


@pytest.mark.parametrize("case", ["plain", "padded", "frozen", "one query"])
def test_encoder_decoder_relevance_equals_the_papers_matrices(case):
    t = detector(
        valid=10 if case == "padded" else None, frozen=case == "frozen", queries=1 if case == "one query" else 5
    )
    bound = t.source.bind(t.outputs, t.batch, Target(scale="logit"))
    found = relevance(t, bound)
    for i, row in enumerate(bound.rows):
        truth = detector_truth(t, row)
        assert truth.abs().max() > 0
        assert relative(found[i], truth) < 1e-4
    if case == "padded":
        padded = [i for i, row in enumerate(bound.rows) if row.sample == 1]
        assert found[padded][:, 10:].abs().max() == 0
        assert found[padded][:, :10].amax(-1).min() > 0


def test_rows_without_relevance_do_not_empty_the_map():
    """The authors divide 0 by 0 for tokens that nothing is relevant to, and then drop the whole layer."""
    t = detector(valid=10)
    bound = t.source.bind(t.outputs, t.batch, Target(scale="logit"))
    row = next(row for row in bound.rows if row.sample == 1)
    record = t.record(CallKey(ENCODER, 0))
    assert record.rows(ALL)[1, :, :, 10:].abs().max() == 0
    found = relevance(t, BoundTarget((row,), "logit"))
    assert torch.isfinite(found).all()
    assert found.max() > 0


def test_rollout_through_cross_attention():
    t = detector()
    bound = t.source.bind(t.outputs, t.batch, Target())
    found = rollout(t, bound)
    for i, row in enumerate(bound.rows):
        a = {call: r.rows(ALL)[row.sample].double().mean(0) for call, r in t.records.items()}
        encoder = rollout_matrix([a[CallKey(ENCODER, layer)][None] for layer in range(3)])
        queries, tokens = torch.zeros(5, 5, dtype=torch.float64), torch.zeros(5, 16, dtype=torch.float64)
        queries += torch.eye(5)
        for layer in range(3):
            own, cross = a[CallKey(OWN, layer)], a[CallKey(CROSS, layer)]
            queries, tokens = (queries + own @ queries) / 2, (tokens + own @ tokens) / 2
            queries, tokens = queries / 2, tokens / 2 + cross @ encoder / 2
        assert relative(found[i], tokens[row.object]) < 1e-5
        assert found[i].sum() + queries[row.object].sum() == pytest.approx(1, abs=1e-5)


def test_grad_attention_of_a_detector_is_its_last_cross_attention():
    t = detector()
    row = TargetRow(1, "object", 2, object=3)
    found = grad_attention(t, BoundTarget((row,), "logit"))[0]
    record = t.record(CallKey(CROSS, 2))
    score = t.source.score(t.outputs, t.batch, BoundTarget((row,), "logit")).sum()
    (slope,) = torch.autograd.grad(score, record.node, retain_graph=True)
    truth = (record.rows(ALL) * (slope @ record.v.transpose(-1, -2))).relu().mean(1)[1, 3]
    assert torch.allclose(found, truth, atol=1e-7)


class NeckSource(TinySource):
    """The same tokens said to have passed a convolution after the first layer."""

    @property
    def sites(self):
        return tuple(replace(site, query="deep", key="deep") for site in super().sites)

    def stream(self, batch):
        return "shallow"

    def flow(self, batch, outputs):
        first, *rest = super().flow(batch, outputs)
        deep = [replace(step, query="deep", key="deep") for step in rest]
        return [replace(first, query="shallow", key="shallow"), OpaqueStep("deep", "conv neck"), *deep]


def test_an_opaque_step_ends_the_sweep_with_its_name():
    source = NeckSource()
    t = trace(source, source.encode(tiny_samples(1)), grad=True)
    with pytest.raises(CaptureError, match="conv neck"):
        rollout(t)
    with pytest.raises(CaptureError, match="conv neck"):
        relevance(t, source.bind(t.outputs, t.batch, Target()))


def test_bad_requests():
    t = traced()
    with pytest.raises(UsageError, match="residual"):
        rollout(t, residual=1.0)
    with pytest.raises(UsageError, match="fusion"):
        rollout(t, fuse="median")
    with pytest.raises(UsageError, match="no rule"):
        relevance(t, BoundTarget((TargetRow(0, "class", 0),)), rule="lrp")
    plain = trace(t.source, t.batch)
    with pytest.raises(UsageError, match="no graph"):
        relevance(plain, BoundTarget((TargetRow(0, "class", 0),)))
    with pytest.raises(UsageError, match="no sites"):
        trace(t.source, t.batch, sites=["vision.decoder"])


@pytest.mark.parametrize("style", STYLES)
def test_low_precision_models_give_float32_maps(style):
    source = TinySource(TinyConfig(style=style))
    source.module.bfloat16()
    low = trace(source, source.encode(tiny_samples(3)), grad=True)
    bound = source.bind(low.outputs, low.batch, Target(label=1, scale="logit"))
    full = traced(style, layers=2)
    for method in (rollout, relevance, grad_attention, legrad):
        found, truth = method(low, bound), method(full, bound)
        assert found.dtype == torch.float32
        assert (found - truth).abs().max() < 0.1 * truth.abs().max()
