"""Deformable attention is a dense matrix: splatted, it reproduces what the model computed by sampling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.capture.certificate import check_record
from foveate.capture.deformable import DeformableRecord, Level
from foveate.capture.tap import Tap
from foveate.testing.oracles import deformable_matrix

B, Q, H, D, P = 2, 6, 2, 3, 4
SIZES = [(5, 7), (3, 4)]


class Deformable(nn.Module):
    """Multi-scale deformable attention in plain torch, as Deformable DETR writes it."""

    def forward(self, points, logits, values):
        weights = F.softmax(logits.flatten(-2), -1).view_as(logits)
        self.weights = weights
        sampled = []
        for level, value in enumerate(values):
            grid = (2 * points[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
            sampled.append(F.grid_sample(value, grid, align_corners=False))
        flat = weights.transpose(1, 2).reshape(B * H, 1, Q, -1)
        out = (torch.stack(sampled, -2).flatten(-2) * flat).sum(-1).view(B, H * D, Q)
        return out.transpose(1, 2).contiguous()


def call(seed=0, spread=1.4):
    random = torch.Generator().manual_seed(seed)
    points = (torch.rand(B, Q, H, len(SIZES), P, 2, generator=random) - 0.5) * spread + 0.5
    logits = torch.randn(B, Q, H, len(SIZES), P, generator=random) * 2
    values = [torch.randn(B * H, D, h, w, generator=random) for h, w in SIZES]
    return points, logits, values


def tapped(*arguments, grad=False):
    module = Deformable()
    with torch.set_grad_enabled(grad), Tap(module, grad=grad) as tap:
        out = module(*arguments)
    (record,) = tap.records
    assert not tap.unlinked
    return module, record, out


def dense(points, weights):
    """(sample, head, query, cell) by loops."""
    maps = [deformable_matrix(points[b], weights[b], SIZES) for b in range(B)]
    return torch.stack(maps).transpose(1, 2)


def test_rows_equal_the_loop_and_reproduce_the_output():
    points, logits, values = call()
    module, record, out = tapped(points, logits, values)
    truth = dense(points, module.weights)
    assert record.shape == (B, H, Q, sum(h * w for h, w in SIZES))
    assert (record.rows(slice(None)) - truth).abs().max() < 1e-6
    flat = torch.cat([v.flatten(2) for v in values], -1).view(B, H, D, -1)
    by_matrix = torch.einsum("bhqk,bhdk->bqhd", record.rows(slice(None)), flat).flatten(2)
    assert (by_matrix - out).abs().max() < 1e-6
    assert check_record(record).value_error < 2e-6
    mass = record.rows(slice(None)).sum(-1)
    assert mass.min() < 0.9
    assert mass.max() <= 1 + 1e-6


def test_mass_is_whole_where_all_points_lie_inside():
    points, logits, values = call(spread=0.5)
    _, record, _ = tapped(points, logits, values)
    assert torch.allclose(record.rows([0, 3]).sum(-1), torch.ones(B, H, 2))


@pytest.mark.parametrize("spread", [0.5, 1.4, 3.0])
def test_entropy_is_that_of_the_row_divided_by_its_mass(spread):
    points, logits, values = call(spread=spread)
    module, record, _ = tapped(points, logits, values)
    truth = dense(points, module.weights)
    mass = truth.sum(-1)
    p = truth / mass[..., None].clamp_min(1e-300)
    expected = torch.where(mass > 0, torch.special.entr(p).sum(-1), 0.0)
    found = record.stats()
    assert torch.allclose(found.entropy.double(), expected, atol=1e-5)
    assert torch.allclose(found.received.double(), truth.mean(-2), atol=1e-6)


@pytest.mark.parametrize("fuse", ["mean", "max"])
def test_left_product_without_the_matrix(fuse):
    points, logits, values = call()
    module, record, _ = tapped(points, logits, values)
    truth = dense(points, module.weights)
    fused = truth.mean(1) if fuse == "mean" else truth.amax(1)
    r = torch.rand(B, 3, Q)
    assert torch.allclose(record.left(r, fuse=fuse).double(), r.double() @ fused, atol=1e-6)
    u = torch.rand(B, record.shape.keys, 2)
    assert torch.allclose(record.right(u, fuse=fuse).double(), fused @ u.double(), atol=1e-6)


def test_relevance_coalesces_corners_before_the_relu():
    points, logits, values = call()
    module, record, out = tapped(points, logits.requires_grad_(), values, grad=True)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(7))
    (gradient,) = torch.autograd.grad((out * slope).sum(), record.node)
    truth = dense(points, module.weights.detach())
    flat = torch.cat([v.flatten(2) for v in values], -1).view(B, H, D, -1).double()
    by_cell = torch.einsum("bqhd,bhdk->bhqk", slope.view(B, Q, H, D).double(), flat)
    bar = (truth * by_cell).relu().mean(1)
    r = torch.rand(B, 1, Q)
    assert torch.allclose(record.grad_left(r, gradient).double(), r.double() @ bar, atol=1e-5)


def test_corner_aligned_grids():
    random = torch.Generator().manual_seed(1)
    value = torch.randn(B * H, D, 5, 7, generator=random)
    grid = torch.rand(B * H, Q, P, 2, generator=random) * 2.6 - 1.3
    weights = torch.rand(B, Q, H, P, generator=random)
    for align in (False, True):
        record = DeformableRecord("x", weights, [Level(value, grid, align)])
        sampled = F.grid_sample(value, grid, align_corners=align)
        by_head = weights.transpose(1, 2).reshape(B * H, 1, Q, P)
        out = (sampled * by_head).sum(-1).view(B, H, D, Q).transpose(-1, -2)
        assert torch.allclose(record.rows(slice(None)) @ record.values(), out, atol=1e-6)


@pytest.mark.parametrize("mutant", ["moved points", "swapped heads", "swapped levels"])
def test_certificate_catches(mutant):
    points, logits, values = call(spread=0.8)
    _, record, _ = tapped(points, logits, values)
    assert check_record(record).value_error < 2e-6
    levels, weights, out = record.levels, record.weights.transpose(1, 2), record.out
    if mutant == "moved points":
        levels = [Level(lv.values, lv.grid + 0.1) for lv in levels]
    elif mutant == "swapped heads":
        weights = weights.flip(2)
    else:
        levels = levels[::-1]
    assert check_record(DeformableRecord("x", weights, levels, out)).value_error > 1e-2


class Discrete(Deformable):
    """The same with whole cells taken by index instead of bilinear samples, as RT-DETRv2 offers it."""

    def forward(self, points, logits, values):
        weights = F.softmax(logits.flatten(-2), -1).view_as(logits)
        self.weights = weights
        sampled = []
        for level, value in enumerate(values):
            height, width = value.shape[-2:]
            place = points[:, :, :, level].transpose(1, 2).flatten(0, 1).flatten(1, 2)
            x = (place[..., 0] * width + 0.5).long().clamp(0, width - 1)
            y = (place[..., 1] * height + 0.5).long().clamp(0, height - 1)
            picture = torch.arange(B * H)[:, None].expand_as(x)
            taken = value[picture, :, y, x]
            sampled.append(taken.transpose(1, 2).reshape(B * H, D, Q, P))
        flat = weights.transpose(1, 2).reshape(B * H, 1, Q, -1)
        out = (torch.cat(sampled, -1) * flat).sum(-1).view(B, H * D, Q)
        return out.transpose(1, 2).contiguous()


def test_whole_cells_taken_by_index():
    points, logits, values = call()
    module = Discrete()
    with torch.no_grad(), Tap(module) as tap:
        out = module(points, logits, values)
    (record,) = tap.records
    truth = torch.zeros(B, H, Q, sum(h * w for h, w in SIZES))
    start = 0
    for level, (height, width) in enumerate(SIZES):
        for b, h, q, p in torch.cartesian_prod(*map(torch.arange, (B, H, Q, P))).tolist():
            x, y = points[b, q, h, level, p].tolist()
            column, row = (
                min(max(int(x * width + 0.5), 0), width - 1),
                min(max(int(y * height + 0.5), 0), height - 1),
            )
            truth[b, h, q, start + row * width + column] += module.weights[b, q, h, level, p]
        start += height * width
    assert (record.rows(slice(None)) - truth).abs().max() < 1e-6
    assert torch.allclose(record.rows([1, 4]), record.rows(slice(None))[:, :, [1, 4]])
    assert check_record(record).value_error < 2e-6
    flat = torch.cat([v.flatten(2) for v in values], -1).view(B, H, D, -1)
    assert (torch.einsum("bhqk,bhdk->bqhd", truth, flat).flatten(2) - out).abs().max() < 1e-5
    r = torch.rand(B, 1, Q)
    assert torch.allclose(record.left(r), torch.einsum("bvq,bqk->bvk", r, truth.mean(1)), atol=1e-6)


def test_other_indexing_is_no_sampling():
    class Picks(nn.Module):
        def forward(self, scores, values):
            weights = F.softmax(scores, -1)
            kept = values[torch.arange(2)[:, None], :, torch.ones(2, 3).long(), torch.zeros(2, 3).long()]
            turned = values[torch.tensor([[1], [0]]), :, torch.ones(2, 3).long(), torch.zeros(2, 3).long()]
            return (weights @ kept) + turned

    module = Picks()
    with torch.no_grad(), Tap(module) as tap:
        module(torch.randn(2, 3, 3), torch.randn(2, 5, 4, 4))
    (record,) = tap.records
    assert record.form == "dense"
