"""Relevance through encoder and decoder against the paper's matrices, on real detectors and without our tap.

The truth never touches the capture engine: the same weights run in float64 with an attention function that
materialises every matrix, autograd differentiates the object's logit by those matrices, and equations 5 to 11 of
Chefer, Gur and Wolf 2021 are evaluated as they stand.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from detr_models import photos, tiny
from foveate.capture.gradient_maps import grad_attention
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import CaptureError
from foveate.interfaces import AttentionStep, MergeStep, Target
from foveate.testing.oracles import entropy_rows
from foveate.testing.tiny import tiny_samples
from foveate.testing.tiny_detector import CROSS, ENCODER, OWN, QUERIES, TOKENS, DetectorConfig, TinyDetector

SHAPES = ((60, 90), (90, 50))
"""Two pictures of different shapes: one is padded at the bottom, the other at the right."""


# ----------------------------------------------------------------------------- the paper, in float64


def positive(weights, gradient):
    """Equation 5: the mean over heads of the positive part of A * dL/dA."""
    return (weights * gradient).clamp(min=0).mean(0)


def normalised(joined):
    """Equations 8 and 9: rows of R - I divided by their sums, plus I; a row of zeros stays zero."""
    rest = joined - torch.eye(len(joined), dtype=joined.dtype)
    sums = rest.sum(-1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(rest), rest / sums) + torch.eye(len(joined), dtype=joined.dtype)


def paper(encoder, decoder):
    """R_qi of equations 6, 7 and 10, for lists of (A, dL/dA): encoder layers, (own, cross) of decoder layers."""
    tokens, queries = decoder[0][1][0].shape[-1], decoder[0][1][0].shape[-2]
    r_ii = torch.eye(tokens, dtype=torch.float64)
    r_qq, r_qi = torch.eye(queries, dtype=torch.float64), torch.zeros(queries, tokens, dtype=torch.float64)
    for pair in encoder:
        r_ii = r_ii + positive(*pair) @ r_ii
    for own, cross in decoder:
        a = positive(*own)
        r_qq, r_qi = r_qq + a @ r_qq, r_qi + a @ r_qi
        r_qi = r_qi + normalised(r_qq).T @ positive(*cross) @ normalised(r_ii)
    return r_qi


def materialised(source, batch):
    """Logits and every attention matrix in order of execution, (name, (sample, head, query, key)), float64."""
    found = []

    def attend(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **_):
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            hidden = ~attention_mask if attention_mask.dtype == torch.bool else attention_mask < -1
            scores = scores.masked_fill(hidden, -math.inf)
        weights = scores.softmax(-1)
        weights = weights if weights.requires_grad else weights.requires_grad_()  # queries that saw no pixel
        found.append((names[module], weights))
        return (weights @ value).transpose(1, 2).contiguous(), weights

    model = copy.deepcopy(source.module).double()
    names = {module: name for name, module in model.named_modules()}
    ALL_ATTENTION_FUNCTIONS.register("materialised", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("materialised", eager_mask)  # else padding is not masked at all
    model.set_attn_implementation({"": "materialised"})
    with torch.enable_grad():
        outputs = model(pixel_values=batch.inputs.double().requires_grad_(), **batch.per_sample)
    return outputs.logits, found


def truths(source, batch, bound):
    """R_qi's row of each target, and its cross-attention times gradient at the last layer."""
    logits, matrices = materialised(source, batch)
    rows = []
    for row in bound.rows:
        slopes = torch.autograd.grad(
            logits[row.sample, row.object, row.class_index], [a for _, a in matrices], retain_graph=True
        )
        pairs = {
            name: (a.detach()[row.sample], slope[row.sample])
            for (name, a), slope in zip(matrices, slopes, strict=True)
        }
        encoder = [pair for name, pair in pairs.items() if ".encoder.layers." in name]
        own = [p for name, p in pairs.items() if ".decoder." in name and name.endswith("self_attn")]
        cross = [p for name, p in pairs.items() if name.endswith("encoder_attn")]
        assert len(encoder) == len(own) == len(cross) > 0
        r = paper(encoder, list(zip(own, cross, strict=True)))
        rows.append((r[row.object], positive(*cross[-1])[row.object]))
    return rows


def traced(source, samples):
    batch = source.encode(samples)
    with torch.no_grad():
        bound = source.bind(source.forward(batch), batch, Target(object=1, scale="logit"))
        other = source.bind(source.forward(batch), batch, Target(object=3, scale="logit"))
    rows = (*bound.rows, *other.rows)
    context = {k: torch.cat([v, other.context[k]]) for k, v in bound.context.items()}
    return batch, replace(bound, rows=rows, context=context), trace(source, batch, grad=True)


def relative(found, truth):
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("name", ["DETR", "Conditional DETR"])
def test_a_detectors_relevance_is_the_papers(name):
    source = tiny(name)
    batch, bound, traces = traced(source, photos(*SHAPES))
    assert any((m == 0).any() for m in batch.per_sample.values()), "nothing is padded"
    cross = [r for call, r in traces.records.items() if call.site == "decoder.cross"]
    peaked = min(float(entropy_rows(record.rows(slice(None))).median()) for record in cross)
    assert peaked < 0.6 * math.log(cross[0].shape.keys)
    found, last = relevance(traces, bound), grad_attention(traces, bound)
    for i, (whole, final) in enumerate(truths(source, batch, bound)):
        assert whole.abs().max() > 0
        assert relative(found[i], whole) < 2e-4
        assert relative(last[i], final) < 2e-4


def test_a_batch_gives_what_each_picture_gives_alone():
    source = tiny("Conditional DETR")
    samples = photos(*SHAPES)
    _, bound, traces = traced(source, samples)
    together = {f: f(traces, bound) for f in (relevance, rollout, grad_attention)}
    for i, sample in enumerate(samples):
        _, alone, one = traced(source, [sample])
        for method, values in together.items():
            mine = values[[j for j, row in enumerate(bound.rows) if row.sample == i]]
            assert torch.allclose(method(one, alone), mine, atol=2e-4 * float(mine.abs().max()))


# ------------------------------------------------------------------------------- the authors' trap


def test_one_decoder_layer_has_a_map():
    """With one layer R_qq - I comes from queries that saw nothing; 0/0 there empties the authors' whole map."""
    source = TinyDetector(DetectorConfig(layers=1, queries=4))
    for layer in source.module.own:
        torch.nn.init.zeros_(layer.v.weight)  # values alike for all queries: dL/dA of the first layer is constant
    batch = source.encode(tiny_samples(2))
    t = trace(source, batch, grad=True)
    bound = source.bind(t.outputs, batch, Target(scale="logit"))
    found = relevance(t, bound)
    assert torch.isfinite(found).all()
    assert (found.amax(-1) > 0).all()


def test_no_relevance_anywhere_is_a_map_of_zeros_not_of_nan():
    source = TinyDetector(DetectorConfig(layers=2))
    torch.nn.init.zeros_(source.module.head.weight)
    batch = source.encode(tiny_samples(2))
    t = trace(source, batch, grad=True)
    found = relevance(t, source.bind(t.outputs, batch, Target(scale="logit")))
    assert (found == 0).all()


# -------------------------------------------------------------------- decoders that read some tokens

SOME = [0, 3, 5, 6, 9, 10, 12, 15]


class LevelDetector(TinyDetector):
    """A decoder that reads every other token only, as masked decoders read one level of a pyramid at a time."""

    mix = False

    def __init__(self):
        super().__init__(DetectorConfig(layers=2))
        for layer in self.module.cross:
            layer.forward = self._some(layer.forward)

    @staticmethod
    def _some(forward):
        return lambda x, memory, valid=None: forward(x, memory[:, SOME], valid[:, SOME])

    @property
    def sites(self):
        return tuple(replace(s, key="level") if s.id == CROSS else s for s in super().sites)

    def label(self, call, batch, outputs):
        labels = super().label(call, batch, outputs)
        return replace(labels, key=labels.key.take(SOME)) if call.site == CROSS else labels

    def flow(self, batch, outputs):
        steps = [replace(s, key="level") if s.query != s.key else s for s in super().flow(batch, outputs)]
        chosen = F.one_hot(torch.tensor(SOME), 16).float()
        chosen = chosen * 0.5 + 0.5 / 16 if self.mix else chosen
        return [*steps[:2], MergeStep(TOKENS, "level", chosen, "one level"), *steps[2:]]


def test_a_level_of_the_encoder_is_a_selection_of_its_rows():
    source = LevelDetector()
    batch = source.encode(tiny_samples(2))
    t = trace(source, batch, grad=True)
    bound = source.bind(t.outputs, batch, Target(scale="logit"))
    found, last = relevance(t, bound), grad_attention(t, bound)
    for i, row in enumerate(bound.rows):
        score = source.score(t.outputs, batch, replace(bound, rows=(row,))).sum()
        pairs = {}
        for call, record in t.records.items():
            (slope,) = torch.autograd.grad(score, record.node, retain_graph=True)
            gradient = slope[row.sample].double() @ record.v[row.sample].double().transpose(-1, -2)
            weights = record.rows(slice(None))[row.sample].double()
            if call.site == CROSS:  # tokens that are not read have no weight
                whole = torch.zeros(2, *weights.shape[:2], 16, dtype=torch.float64)
                whole[0][..., SOME], whole[1][..., SOME] = weights, gradient
                weights, gradient = whole
            pairs[call.site, call.layer] = weights, gradient
        decoder = [(pairs[OWN, layer], pairs[CROSS, layer]) for layer in range(2)]
        truth = paper([pairs[ENCODER, layer] for layer in range(2)], decoder)[row.object]
        assert relative(found[i], truth) < 1e-4
        assert relative(last[i], positive(*pairs[CROSS, 1])[row.object]) < 1e-4


def test_mixed_tokens_have_no_rule():
    source = LevelDetector()
    source.mix = True
    batch = source.encode(tiny_samples(1))
    t = trace(source, batch, grad=True)
    with pytest.raises(CaptureError, match="no rule in the paper"):
        relevance(t, source.bind(t.outputs, batch, Target()))


def test_a_decoder_that_reads_something_else_is_refused():
    source = LevelDetector()
    batch = source.encode(tiny_samples(1))
    t = trace(source, batch, grad=True)
    t.__dict__["flow"] = [s for s in t.flow if isinstance(s, AttentionStep) and s.query in (QUERIES, TOKENS)]
    with pytest.raises(CaptureError, match="does not read"):
        grad_attention(t, source.bind(t.outputs, batch, Target()))
