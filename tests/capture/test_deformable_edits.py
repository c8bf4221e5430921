"""Deformable attention changed by interventions equals a float64 matrix, splatted by loops, that is edited by
hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.capture.certificate import check_record
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout, Replace, ScaleAttention
from foveate.capture.tap import Tap
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey
from foveate.testing.oracles import deformable_matrix

B, Q, H, D, P = 2, 6, 2, 3, 4
SIZES = [(5, 7), (3, 4)]
KEYS = sum(h * w for h, w in SIZES)


class Sampler(nn.Module):
    """Deformable attention as Deformable DETR writes it, or with whole cells as RT-DETRv2's "discrete"."""

    def __init__(self, discrete=False):
        super().__init__()
        self.sampling_offsets = nn.Identity()  # by which a plain module is known to be deformable
        self.discrete = discrete

    def forward(self, points, logits, values):
        weights = F.softmax(logits.flatten(-2), -1).view_as(logits)
        read = self._cells if self.discrete else self._bilinear
        sampled = [read(points[:, :, :, i].transpose(1, 2).flatten(0, 1), v) for i, v in enumerate(values)]
        flat = weights.transpose(1, 2).reshape(B * H, 1, Q, -1)
        out = (torch.stack(sampled, -2).flatten(-2) * flat).sum(-1).view(B, H * D, Q)
        return out.transpose(1, 2).contiguous()

    def _bilinear(self, points, value):
        return F.grid_sample(value, 2 * points - 1, align_corners=False)

    def _cells(self, points, value):
        height, width = value.shape[-2:]
        place = points.flatten(1, 2)
        x = (place[..., 0] * width + 0.5).long().clamp(0, width - 1)
        y = (place[..., 1] * height + 0.5).long().clamp(0, height - 1)
        picture = torch.arange(B * H)[:, None].expand_as(x)
        return value[picture, :, y, x].transpose(1, 2).reshape(B * H, D, Q, P)


def arguments(seed=0, spread=1.4):
    random = torch.Generator().manual_seed(seed)
    points = (torch.rand(B, Q, H, len(SIZES), P, 2, generator=random) - 0.5) * spread + 0.5
    logits = torch.randn(B, Q, H, len(SIZES), P, generator=random) * 2
    values = [torch.randn(B * H, D, h, w, generator=random) for h, w in SIZES]
    return points, logits, values


def matrix(points, logits, *, discrete=False):
    """A of the untouched call ``(sample, head, query, cell)``, float64, by loops."""
    weights = torch.softmax(logits.double().flatten(-2), -1).view(logits.shape)
    if not discrete:
        return torch.stack([deformable_matrix(points[b], weights[b], SIZES) for b in range(B)]).transpose(1, 2)
    dense = torch.zeros(B, H, Q, KEYS, dtype=torch.float64)
    start = 0
    for level, (height, width) in enumerate(SIZES):
        for b, h, q, p in torch.cartesian_prod(*map(torch.arange, (B, H, Q, P))).tolist():
            x, y = points[b, q, h, level, p].tolist()
            column = min(max(int(x * width + 0.5), 0), width - 1)
            row = min(max(int(y * height + 0.5), 0), height - 1)
            dense[b, h, q, start + row * width + column] += weights[b, q, h, level, p]
        start += height * width
    return dense


def flat_values(values):
    return torch.cat([v.double().flatten(2) for v in values], -1).view(B, H, D, -1).transpose(-1, -2)


def output(attention, values):
    """``A V`` in the module's layout."""
    return (attention @ flat_values(values)).transpose(1, 2).flatten(2)


def edges(rows, keys, heads=range(H)):
    chosen = torch.zeros(1, H, Q, KEYS, dtype=torch.bool)
    for head in heads:
        for row in rows:
            chosen[0, head, row, list(keys)] = True
    return chosen


REGION = [*range(8, 20), 36, 37, 40]


def knocked(attention):
    return attention * ~edges([0, 2, 3], REGION)


def knocked_and_renormalised(attention):
    left = knocked(attention)
    rest = left.sum(-1, keepdim=True)
    return torch.where(rest > 0, left * attention.sum(-1, keepdim=True) / rest, left)


def scaled(attention):
    return torch.where(edges(range(Q), REGION, [1]), 0.3 * attention, attention)


def scaled_and_renormalised(attention):
    new = torch.where(edges(range(Q), REGION), 2.5 * attention, attention)
    return new * attention.sum(-1, keepdim=True) / new.sum(-1, keepdim=True)


def spread_evenly(attention):
    chosen = edges(range(Q), REGION)
    total = (attention * chosen).sum(-1, keepdim=True)
    return torch.where(chosen, total / len(REGION), attention)


def averaged(attention):
    new = attention.clone()
    new[:, 1] = attention[:, 1].mean(-2, keepdim=True)
    return new


KEY = "at:" + ",".join(map(str, REGION))
CASES = {
    "knockout": (Knockout("", query="at:0,2-3", key=KEY), knocked),
    "knockout, mass kept": (
        Knockout("", query="at:0,2-3", key=KEY, renormalise=True),
        knocked_and_renormalised,
    ),
    "scaling": (ScaleAttention("", key=KEY, heads=1, factor=0.3), scaled),
    "scaling by 0": (ScaleAttention("", query="at:0,2-3", key=KEY, factor=0.0), knocked),
    "scaling, mass kept": (ScaleAttention("", key=KEY, factor=2.5, renormalise=True), scaled_and_renormalised),
    "uniform": (Replace("", key=KEY), spread_evenly),
    "mean": (AblateHeads("", heads=1, to="mean"), averaged),
}


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("name", list(CASES))
def test_each_change_equals_the_edited_matrix(name, discrete):
    points, logits, values = arguments()
    change, by_hand = CASES[name]
    module = Sampler(discrete)
    intact = matrix(points, logits, discrete=discrete)
    truth = by_hand(intact)
    with torch.no_grad(), Tap(module) as outer, intervene(module, [change]) as done, Tap(module) as inner:
        out = module(points, logits, values)
    assert (truth - intact).abs().max() > 1e-2
    torch.testing.assert_close(out.double(), output(truth, values), atol=2e-6, rtol=1e-5)
    assert done.applied[0].calls == 1
    for tap in (inner, outer):  # what ran is what is recorded, in and around the context
        (record,) = tap.records
        assert not tap.unlinked
        torch.testing.assert_close(record.rows(slice(None)).double(), truth, atol=1e-6, rtol=1e-5)
        assert check_record(record).value_error < 2e-6
        left = torch.rand(B, 2, Q, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(record.left(left).double(), left.double() @ truth.mean(1), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["knockout", "knockout, mass kept", "scaling, mass kept", "uniform"])
def test_gradients_reach_points_logits_and_values(name):
    points, logits, values = arguments(seed=4)
    change, by_hand = CASES[name]
    slope = torch.randn(B, Q, H * D, generator=torch.Generator().manual_seed(7)).double()
    inputs = [t.double().requires_grad_() for t in (points, logits, *values)]
    module = Sampler()
    with intervene(module, [change]):
        out = module(inputs[0], inputs[1], inputs[2:])
    found = torch.autograd.grad((out * slope).sum(), inputs)

    again = [t.detach().clone().requires_grad_() for t in inputs]
    attention = differentiable_matrix(again[0], again[1])
    torch.testing.assert_close(attention.detach(), matrix(points, logits).double(), atol=1e-6, rtol=1e-6)
    flat = torch.cat([v.flatten(2) for v in again[2:]], -1).view(B, H, D, -1).transpose(-1, -2)
    truth = (by_hand(attention) @ flat).transpose(1, 2).flatten(2)
    expected = torch.autograd.grad((truth * slope).sum(), again)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-8)


def differentiable_matrix(points, logits):
    """The same matrix by hat functions over all cells, in the graph: max(0, 1 - |distance|) each way."""
    weights = torch.softmax(logits.flatten(-2), -1).view(logits.shape)
    parts = []
    for level, (height, width) in enumerate(SIZES):
        x, y = points[:, :, :, level, :, 0] * width - 0.5, points[:, :, :, level, :, 1] * height - 0.5
        across = (1 - (x[..., None] - torch.arange(width)).abs()).clamp_min(0)
        down = (1 - (y[..., None] - torch.arange(height)).abs()).clamp_min(0)
        parts.append(torch.einsum("bqhp,bqhpy,bqhpx->bhqyx", weights[:, :, :, level], down, across).flatten(-2))
    return torch.cat(parts, -1)


def test_shuffling_moves_the_weights_of_a_row():
    points, logits, values = arguments()
    module = Sampler()
    with torch.no_grad(), intervene(module, [Replace("", by="shuffled", seed=5)]), Tap(module) as tap:
        out = module(points, logits, values)
    (record,) = tap.records
    rows, intact = record.rows(slice(None)).double(), matrix(points, logits)
    torch.testing.assert_close(rows.sort(-1).values, intact.sort(-1).values, atol=1e-6, rtol=1e-5)
    assert (rows - intact).abs().max() > 1e-2
    torch.testing.assert_close(out.double(), output(rows, values), atol=2e-6, rtol=1e-5)


def test_rows_of_another_input_are_patched_in():
    points, logits, values = arguments()
    others = arguments(seed=9)
    module = Sampler()
    with torch.no_grad():
        with Tap(module) as tap:
            module(*others)
        with intervene(module, [Replace("", by={CallKey("", 0): tap.records[0]})]):
            out = module(points, logits, values)
    rows = matrix(*others[:2])  # with their own mass
    torch.testing.assert_close(out.double(), output(rows, values), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("to", ["zero", "means"])
def test_ablated_heads_put_out_what_was_said(to):
    points, logits, values = arguments()
    means = torch.randn(H, D, generator=torch.Generator().manual_seed(2))
    module = Sampler()
    change = AblateHeads("", heads=1, to="zero" if to == "zero" else {CallKey("", 0): means})
    with torch.no_grad(), intervene(module, [change]), Tap(module) as tap:
        out = module(points, logits, values).unflatten(-1, (H, D))
    intact = output(matrix(points, logits), values).unflatten(-1, (H, D))
    torch.testing.assert_close(out[:, :, 0].double(), intact[:, :, 0], atol=2e-6, rtol=1e-5)
    assert torch.equal(out[:, :, 1], (torch.zeros(D) if to == "zero" else means[1]).expand(B, Q, D))
    (record,) = tap.records  # what the head looked at is still seen
    torch.testing.assert_close(record.rows(slice(None)).double(), matrix(points, logits), atol=1e-6, rtol=1e-5)
    assert check_record(record).value_error < 2e-6


def test_changes_follow_each_other_in_one_context_and_in_two():
    points, logits, values = arguments()
    first, second = CASES["knockout"][0], CASES["scaling, mass kept"][0]
    truth = output(scaled_and_renormalised(knocked(matrix(points, logits))), values)
    module = Sampler()
    with torch.no_grad():
        with intervene(module, [first, second]):
            one = module(points, logits, values)
        with intervene(module, [second]), intervene(module, [first]):  # the inner one acts first
            two = module(points, logits, values)
        with intervene(module, [CASES["mean"][0]]), intervene(module, [first]):
            three = module(points, logits, values)
    torch.testing.assert_close(one.double(), truth, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(two.double(), truth, atol=2e-6, rtol=1e-5)
    after = output(averaged(knocked(matrix(points, logits))), values)
    torch.testing.assert_close(three.double(), after, atol=2e-6, rtol=1e-5)


def test_nothing_chosen_changes_nothing_to_the_bit():
    module, given = Sampler(), arguments()
    with torch.no_grad():
        plain = module(*given)
        with intervene(module, [Knockout("", key=torch.zeros(KEYS, dtype=torch.bool).numpy())]) as done:
            changed = module(*given)
    assert torch.equal(plain, changed)
    assert done.applied[0].edges == 0


def test_a_row_that_keeps_nothing():
    points, logits, values = arguments(spread=0.5)
    module = Sampler()
    everything = Knockout("", query="at:1", key="all")
    with torch.no_grad():
        with intervene(module, [everything]):
            out = module(points, logits, values)
        assert torch.equal(out[:, 1], torch.zeros(B, H * D))  # every point reads zeros
        renormalised = Knockout("", query="at:1", key="all", renormalise=True)
        with pytest.raises(CaptureError, match="would keep no key"), intervene(module, [renormalised]):
            module(points, logits, values)
        again = module(points, logits, values)  # and the error leaves nothing behind
    torch.testing.assert_close(again.double(), output(matrix(points, logits), values), atol=2e-6, rtol=1e-5)


def test_a_softmax_over_keys_cannot_lose_mass():
    class Dense(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x, x, x)

    module = Dense()
    change = Knockout("", key="at:0", renormalise=False)
    with pytest.raises(UsageError, match="renormalise"), intervene(module, [change]):
        module(torch.randn(1, 2, 5, 4))
