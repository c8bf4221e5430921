"""The relevance rules of Chefer, Gur and Wolf 2021 (CVPR, arXiv:2012.09838), one function each.

Each takes what an operation took and the relevance R of its result, and gives the relevance of what it took,
all in float64. Relevance is conserved: what arrives at the operands adds up to R, except where a rule finds
nothing to give it to (a denominator that is zero, which the authors' code also turns to zero).

Not here: softmax, GELU and LayerNorm pass relevance on unchanged, as in the authors' model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def shared(relevance: Tensor, total: Tensor) -> Tensor:
    """R / Z, zero where Z is zero."""
    return torch.where(total != 0, relevance / total, 0.0)


def generic(function: Callable[[Tensor], Tensor], x: Tensor, relevance: Tensor) -> Tensor:
    """Deep Taylor decomposition at zero, R_j = sum_i x_j (dL_i / dx_j) R_i / L_i (sec. 3.1).

    For functions that are linear in ``x``: means and sums over tokens, as in the authors' pooling layer.
    """
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        total = function(leaf)
        (share,) = torch.autograd.grad(total, leaf, shared(relevance, total.detach()))
    return x * share


def positive(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """A linear layer ``x @ weight``: shares among the contributions with x_j w_ji >= 0 (sec. 3.1).

    The bias takes none. ``x`` is ``(..., row, in)``, ``weight`` ``(..., in, out)``, R ``(..., row, out)``.
    """
    up, down = x.clamp(min=0), x.clamp(max=0)
    raising, lowering = weight.clamp(min=0), weight.clamp(max=0)
    share = shared(relevance, up @ raising + down @ lowering)
    return up * (share @ raising.mT) + down * (share @ lowering.mT)


def product(u: Tensor, v: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """A product ``u @ v`` of two computed matrices: :func:`generic` for each, normalised (sec. 3.2).

    The generic rule gives each operand a relevance that adds up to all of R; the normalisation by the operands'
    sums is therefore one half each, and is written so: their quotient is noise where R adds up to nearly zero.
    """
    share = shared(relevance, u @ v)
    return u * (share @ v.mT) / 2, v * (u.mT @ share) / 2


def gated(u: Tensor, v: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """An elementwise product of two computed tensors, as :func:`product`: half of R each.

    The paper has none; with it x * sigmoid(x) passes R unchanged, as activations of one operation do.
    """
    half = torch.where(u * v != 0, relevance / 2, 0.0)
    return half.sum_to_size(u.shape), half.sum_to_size(v.shape)


def addition(u: Tensor, v: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """A sum ``u + v`` (skip connection): :func:`generic` for each, normalised by the operands' sums (sec. 3.2).

    R_u <- R_u |sum R_u| / (|sum R_u| + |sum R_v|) sum R / sum R_u, and R_v alike. Sums run over the whole
    tensor, which therefore must hold one sample.
    """
    share = shared(relevance, u + v)
    to_u, to_v = u * share, v * share
    sums = torch.stack([to_u.sum(), to_v.sum()])
    parts = shared(shared(sums.abs(), sums.abs().sum()) * relevance.sum(), sums)
    return (to_u * parts[0]).sum_to_size(u.shape), (to_v * parts[1]).sum_to_size(v.shape)
