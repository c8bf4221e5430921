"""Which token becomes which? Read off the model's gradients, exactly, in three backward passes.

Between two attention calls a transformer treats tokens one by one: it may carry them along, permute them into
windows or merge neighbours, but source token j reaches one target token i only. Then a gradient that is weighted
by a number c_i at every target token arrives at j multiplied by c_i, in every channel. The quotient names i; a
second, random weight proves that no other token took part. Where tokens mix (convolutions, other attention), it
fails.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

AGREEMENT = 2e-3
"""How far the two weightings may disagree, relative to the gradient; mixed tokens are off by 0.1 and more."""
REACHED = 1e-6
"""Gradients below this share of the largest count as none (fast convolutions leave rounding dust)."""


def token_map(source: Tensor, target: Tensor, arranged: Callable[[Tensor], Tensor]) -> Tensor | None:
    """For each source token the target token that it reaches, ``(source token,)`` int64; -1 where none.

    ``source`` is a tensor of the graph and ``arranged`` gives a tensor of its shape as ``(token, channel)``;
    ``target`` is ``(token, channel)``, computed from it. None where a source token reaches several.
    """
    generator = torch.Generator(target.device).manual_seed(0)
    cotangent = torch.randn(target.shape, generator=generator, device=target.device, dtype=target.dtype)
    count = len(target)
    number = torch.arange(1, count + 1, device=target.device, dtype=torch.float64)
    secret = 1 + torch.rand(count, generator=generator, device=target.device, dtype=torch.float64)
    plain = _pulled(source, target, cotangent, None, arranged)
    if plain is None:
        return torch.full((len(arranged(source)),), -1)
    numbered, marked = (_pulled(source, target, cotangent, w, arranged) for w in (number / count, secret))
    if numbered is None or marked is None:  # pragma: no cover - the same graph as above
        return None
    size = plain.square().sum(-1)
    reached = size > REACHED**2 * size.max().clamp_min(torch.finfo(torch.float64).tiny)
    index = (count * (numbered * plain).sum(-1) / size.clamp_min(torch.finfo(torch.float64).tiny)).round() - 1
    found = torch.where(reached, index, -1).long()
    if bool(((found < -1) | (found >= count)).any()):
        return None
    expected = secret[found.clamp_min(0)][:, None] * plain
    wrong = (marked - expected).square().sum(-1) > AGREEMENT**2 * size
    return None if bool((wrong & reached).any()) else found


def _pulled(
    source: Tensor,
    target: Tensor,
    cotangent: Tensor,
    weights: Tensor | None,
    arranged: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """The gradient at the source of ``sum_i w_i <cotangent_i, target_i>``, ``(token, channel)`` float64."""
    weighted = cotangent if weights is None else cotangent * weights[:, None].to(cotangent.dtype)
    (gradient,) = torch.autograd.grad(target, source, weighted, retain_graph=True, allow_unused=True)
    return None if gradient is None else arranged(gradient).double()


def per_sample(found: Tensor, samples: int, targets: int) -> Tensor | None:
    """One sample's map from a map over a batch with the sample as its slowest axis; None where samples differ.

    ``found`` is ``(samples * source token,)``, ``targets`` the number of all target tokens.
    """
    if len(found) % samples or targets % samples:
        return None
    each = found.reshape(samples, -1)
    offset = torch.arange(samples, device=found.device)[:, None] * (targets // samples)
    local = torch.where(each < 0, each, each - offset)
    inside = (local < targets // samples) & (local >= -1)
    same = bool((local == local[0]).all()) and bool(inside.all())
    return local[0] if same else None


def merge_matrix(found: Tensor, targets: int) -> Tensor | None:
    """Mean over the sources of each target, ``(target, source)`` float32; None where a target has no source."""
    reached = found >= 0
    matrix = torch.zeros(targets, len(found))
    matrix[found[reached], reached.nonzero().flatten()] = 1.0
    counts = matrix.sum(1, keepdim=True)
    return None if bool((counts == 0).any()) else matrix / counts


def is_identity(found: Tensor, targets: int) -> bool:
    """Whether every token stays where it is."""
    return len(found) == targets and bool((found.cpu() == torch.arange(targets)).all())
