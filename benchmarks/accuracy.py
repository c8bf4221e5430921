"""How exact the engine is on the towers that are timed, against float64 and against separate eager runs.

q and k come from forward hooks on the projections, not from the tap; softmax and products are then the definitions
in float64. Errors are relative to the maximum of what is compared: of the row for attention, else of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.methods import eager_gradients, eager_relevance
from benchmarks.towers import Tower, build, peakedness
from foveate.capture.engine import capture_batch
from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.interfaces import CapturePlan, SitePlan


def errors(case: Case) -> dict[str, float]:
    """Named errors, and ``peakedness``: median row entropy over ln K, the largest over layers."""
    tower = build(case)
    source, batch, bound = tower.source, tower.batch, tower.bound
    plan = CapturePlan((SitePlan(tower.site, reductions=("entropy", "received")),))
    with projections(tower) as exact:
        captured = capture_batch(source, batch, plan)
    site = captured.sites[tower.site].arrays
    rows, entropy, received = (torch.from_numpy(site[name]) for name in ("attention", "entropy", "received"))
    layers = [attention() for attention in exact]
    with torch.no_grad(), tower.eager() as model:
        eager = model(batch.inputs, output_attentions=True).attentions
    t = trace(source, batch, grad=True)
    matrices, slopes = eager_gradients(tower)
    weighted = (matrices[-1].detach() * slopes[-1]).clamp(min=0).mean(1)[:, 0]
    mean_positive = torch.stack([slope.clamp(min=0).mean((1, 2)) for slope in slopes]).mean(0)
    return {
        "peakedness": max(peakedness(layer) for layer in layers),
        "rows: float64 softmax of the same q and k": _rows(rows, layers),
        "rows: a separate eager run": _rows(rows, eager),
        "entropy: float64 (nats)": _worst(entropy, [torch.special.entr(a).sum(-1) for a in layers], absolute=True),
        "received: float64": _worst(received, [a.mean(-2) for a in layers]),
        "rollout: float64 matrix product": _relative(rollout(t), _product(layers)),
        "relevance: eager autograd": _relative(relevance(t, bound), eager_relevance(tower)),
        "grad x attention: eager autograd": _relative(grad_attention(t, bound), weighted),
        "LeGrad: eager autograd": _relative(legrad(t, bound), mean_positive),
    }


@contextmanager
def projections(tower: Tower) -> Iterator[list[Callable[[], Tensor]]]:
    """While active, each layer's q and k by forward hooks; calling an entry gives its attention in float64."""
    found: list[Callable[[], Tensor]] = []
    pending: dict[str, Tensor] = {}
    heads = tower.case.size.heads

    def keep(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            pending[name] = output.detach().clone()
            if len(pending) == 2:
                q, k = (pending[part] for part in ("q_proj", "k_proj"))
                pending.clear()
                found.append(lambda: _softmax(q, k, heads))

        return hook

    modules = [(path.split(".")[-1], module) for path, module in tower.model.named_modules()]
    handles = [m.register_forward_hook(keep(name)) for name, m in modules if name in ("q_proj", "k_proj")]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _softmax(q: Tensor, k: Tensor, heads: int) -> Tensor:
    q, k = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def _product(layers: list[Tensor]) -> Tensor:
    """Rollout rows of the class token by explicit products, ``(sample, token)``."""
    identity = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    product = identity
    for layer in layers:
        product = (0.5 * layer.mean(1) + 0.5 * identity) @ product
    return product[:, 0]


def _rows(rows: Tensor, layers: Any) -> float:
    """Class-token rows ``(sample, layer, head, 1, key)`` against matrices ``(sample, head, query, key)``."""
    expected = torch.stack([layer[:, :, :1] for layer in layers], 1).double()
    return float(((rows.double() - expected).abs() / expected.amax(-1, keepdim=True)).max())


def _worst(found: Tensor, expected: list[Tensor], *, absolute: bool = False) -> float:
    error = (found.double() - torch.stack(expected, 1)).abs().max()
    return float(error) if absolute else float(error / torch.stack(expected, 1).max())


def _relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| / max |expected| of each map, the worst."""
    expected = expected.detach().double()
    return float(((found.double() - expected).abs().amax(-1) / expected.abs().amax(-1)).max())
