"""The objective: rows find their sample and their class, in any order, and nothing of the model changes."""

from __future__ import annotations

import pytest
import torch

from attribution_fakes import FunctionSource, bound_batch, linear_source, snapshot, two_targets_a_sample
from foveate.attribution.objective import Objective
from foveate.errors import PluginError, UsageError
from foveate.interfaces import BoundTarget
from foveate.testing.tiny import TinySource


def _slow(source, batch, bound, x, index):
    """One row after the other, straight from the model."""
    scores = []
    for pixels, row in zip(x, index, strict=True):
        logits = source.module(pixels[None])[0]
        table = logits.softmax(-1) if bound.scale == "probability" else logits
        scores.append(table[bound.rows[int(row)].class_index])
    return torch.stack(scores)


@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_rows_in_any_order_and_number(scale):
    source = TinySource()
    batch, bound = bound_batch(source, 3, scale=scale)
    bound = two_targets_a_sample(bound, 3)
    objective = Objective(source, batch, bound)
    assert objective.inputs.shape == (6, 3, 32, 32)
    index = torch.tensor([5, 0, 0, 3, 2, 1, 4, 5])
    x = objective.inputs[index] + 0.1 * torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, want = objective(x, index), _slow(source, batch, bound, x, index)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert not torch.equal(got, objective(x, index.flip(0)))


def test_default_index_is_the_target_itself():
    source = TinySource()
    batch, bound = bound_batch(source)
    objective = Objective(source, batch, bound)
    direct = source.score(source.forward(batch), batch, bound)
    torch.testing.assert_close(objective(objective.inputs).detach(), direct)


def test_blocks_without_gradients_keep_the_budget():
    source, w = linear_source()
    batch, bound = bound_batch(source, 5)
    objective = Objective(source, batch, bound, rows=1)
    source.calls.clear()
    with torch.no_grad():
        scores = objective(objective.inputs)
    assert source.calls == [4, 1]  # rows=1 with a graph, four times as many without
    classes = [row.class_index for row in bound.rows]
    torch.testing.assert_close(scores, (batch.inputs * w[classes]).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_the_budget_follows_the_graph():
    source = TinySource()
    batch, bound = bound_batch(source)
    measured = Objective(source, batch, bound)._graph_bytes()
    x = batch.inputs[:1].clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        source.module(x)
    weights = {p.untyped_storage().data_ptr() for p in source.module.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert measured >= sum(size for pointer, size in storages.items() if pointer not in weights) > 10_000


def test_take_and_blocks_partition_the_rows():
    source = TinySource()
    batch, bound = bound_batch(source, 5)
    objective = Objective(source, batch, bound, rows=2)
    with torch.no_grad():
        whole = objective(objective.inputs)
        parts = torch.cat([block(block.inputs) for block in objective.blocks()])
    assert [len(block) for block in objective.blocks()] == [2, 2, 1]
    torch.testing.assert_close(parts, whole)
    assert objective.take([3, 1]).batch.ids == ("tiny-3", "tiny-1")


def test_context_travels_with_the_row():
    source, _ = linear_source()
    batch, bound = bound_batch(source, 3)
    source.score = lambda outputs, batch, bound: outputs[:, 0] + bound.context["shift"]
    shifted = BoundTarget(bound.rows, "logit", {"shift": torch.tensor([100.0, 200.0, 300.0])})
    objective = Objective(source, batch, shifted)
    with torch.no_grad():
        got = objective(objective.inputs[[2, 0]], torch.tensor([2, 0]))
    torch.testing.assert_close(got, source.forward(batch)[[2, 0], 0] + torch.tensor([300.0, 100.0]))


def test_model_and_batch_are_left_alone():
    source = TinySource()
    batch, bound = bound_batch(source)
    before, pixels = snapshot(source.module), batch.inputs.clone()
    forward, arguments = Objective(source, batch, bound).captum()
    forward(arguments["inputs"]).sum().backward(inputs=[arguments["inputs"]])
    assert snapshot(source.module) == before
    assert not batch.inputs.requires_grad
    assert batch.inputs.grad is None
    assert torch.equal(batch.inputs, pixels)


def test_a_score_that_differentiates_inside_works_without_gradients():
    class Divergence(FunctionSource):
        def score(self, outputs, batch, bound):
            with torch.enable_grad():
                x = batch.inputs.detach().requires_grad_()
                (g,) = torch.autograd.grad((x**3).sum(), x)
            return g.sum((1, 2, 3)) + 0 * outputs[:, 0]

    source = Divergence(lambda x: x.mean((2, 3))[:, :2])
    batch, bound = bound_batch(source)
    with torch.no_grad():
        scores = Objective(source, batch, bound)(batch.inputs)
    torch.testing.assert_close(scores, 3 * (batch.inputs**2).sum((1, 2, 3)), rtol=1e-5, atol=1e-3)


def test_bad_input():
    source = TinySource()
    batch, bound = bound_batch(source)
    with pytest.raises(UsageError, match="no rows"):
        Objective(source, batch, BoundTarget(()))
    with pytest.raises(UsageError, match="at least 1"):
        Objective(source, batch, bound, rows=0)
    source.score = lambda outputs, batch, bound: outputs
    with pytest.raises(PluginError, match="one number a target row"):
        Objective(source, batch, bound)(batch.inputs)
