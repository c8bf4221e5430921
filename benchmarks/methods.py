"""Every way of getting attention that is timed, and what each is compared with.

Methods that only read the forward are compared with ``plain`` (the model's own SDPA forward, no gradients), those
with gradients with ``backward`` (forward, score, gradient down to the pixels). The eager ones are the textbook:
``output_attentions=True``, then explicit N x N products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.towers import Tower
from foveate.capture.engine import capture_batch
from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.interfaces import CapturePlan, RowRule, SitePlan


@dataclass(frozen=True)
class Method:
    """One row of the table.

    ``stacks`` estimates the memory of quadratic methods, in units of all attention matrices of one forward.
    ``prepare`` builds a model of the method's own, which is not to be measured.
    ``reads_forward`` says that foveate's own part of the time can be told from the model's (see ``meters``).
    """

    name: str
    summary: str
    run: Callable[[Tower], object]
    against: str = "plain"
    stacks: float = 0.0
    reads_forward: bool = False
    prepare: Callable[[Tower], object] | None = None


def _plain(tower: Tower) -> object:
    return tower.source.forward(tower.batch)


def _backward(tower: Tower) -> object:
    inputs = tower.batch.inputs.detach().clone().requires_grad_()
    batch = tower.batch.replace(inputs, range(len(tower.batch)))
    scores = tower.source.score(tower.source.forward(batch, grad=True), batch, tower.bound)
    return torch.autograd.grad(scores.sum(), inputs)


def _keep(rows: RowRule, *reductions: str) -> Callable[[Tower], object]:
    def run(tower: Tower) -> object:
        plan = CapturePlan((SitePlan(tower.site, rows=rows, reductions=reductions),))
        return capture_batch(tower.source, tower.batch, plan).sites

    return run


def _eager_attentions(tower: Tower) -> tuple[Tensor, ...]:
    with torch.no_grad(), tower.eager() as model:
        found: tuple[Tensor, ...] = model(tower.batch.inputs, output_attentions=True).attentions
    return found


def eager_rollout(tower: Tower) -> Tensor:
    """Abnar and Zuidema 2020, eq. 1, with every matrix: rows of the class token, ``(sample, token)``."""
    product = None
    for matrix in _eager_attentions(tower):
        mean = matrix.mean(1)
        mixed = 0.5 * mean + 0.5 * torch.eye(mean.shape[-1])
        product = mixed if product is None else mixed @ product
    assert product is not None
    return product[:, 0]


def eager_relevance(tower: Tower) -> Tensor:
    """Chefer et al. 2021, eq. 5 and 6, by autograd at every matrix: rows of the class token."""
    matrices, slopes = eager_gradients(tower)
    identity = torch.eye(matrices[0].shape[-1])
    found = identity.expand(len(tower.batch), -1, -1)
    for matrix, slope in zip(matrices, slopes, strict=True):
        found = found + (matrix.detach() * slope).clamp(min=0).mean(1) @ found
    return found[:, 0]


def eager_gradients(tower: Tower) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Attention matrices of the eager model and the gradient of the summed scores at each."""
    inputs = tower.batch.inputs.detach().clone().requires_grad_()
    with torch.enable_grad(), tower.eager() as model:
        outputs: Any = model(inputs, output_attentions=True)
        scores = tower.source.score(outputs, tower.batch, tower.bound)
        return outputs.attentions, torch.autograd.grad(scores.sum(), outputs.attentions)


def _variant(name: str, summary: str, **options: Any) -> Method:
    return Method(name, summary, lambda t: rollout(trace(t.source, t.batch), **options), reads_forward=True)


METHODS = {
    method.name: method
    for method in (
        Method("plain", "the model's own SDPA forward", _plain),
        Method("rows", "class token's row, every layer and head", _keep("readout"), reads_forward=True),
        Method(
            "reductions",
            "the row, entropy of every row and mass received by every key",
            _keep("readout", "entropy", "received"),
            reads_forward=True,
        ),
        Method("top-k", "16 largest keys of every row", _keep("none", "topk"), reads_forward=True),
        Method("rollout", "mean fusion", lambda t: rollout(trace(t.source, t.batch)), reads_forward=True),
        _variant("rollout max", "max fusion (row sums: a second pass)", fuse="max"),
        _variant("rollout min", "min fusion (a second pass)", fuse="min"),
        _variant("rollout discard", "lowest 90 % of each layer's matrix set to 0 (two more passes)", discard=0.9),
        _variant("rollout discard row", "lowest 90 % of each row set to 0", discard=0.9, discard_over="row"),
        Method("eager attentions", "output_attentions=True, all matrices kept", _eager_attentions, stacks=1.05),
        Method("eager rollout", "explicit matrix products", eager_rollout, stacks=1.15),
        Method("backward", "forward and gradient to the pixels", _backward, "backward"),
        Method(
            "relevance",
            "chefer_iccv21",
            lambda t: relevance(trace(t.source, t.batch, grad=True), t.bound, keep_graph=False),
            "backward",
        ),
        Method(
            "grad x attention",
            "last layer",
            lambda t: grad_attention(trace(t.source, t.batch, grad=True), t.bound, keep_graph=False),
            "backward",
        ),
        Method(
            "legrad",
            "all layers",
            lambda t: legrad(trace(t.source, t.batch, grad=True), t.bound, keep_graph=False),
            "backward",
        ),
        Method(
            "eager relevance",
            "autograd at every matrix, explicit products",
            eager_relevance,
            "backward",
            stacks=3.3,
        ),
    )
}
