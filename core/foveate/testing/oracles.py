"""Slow references in float64, written from the papers: whole matrices, explicit loops, no shared code.

Nothing here imports the engine. Tests compare what the engine computes in row blocks and sweeps with these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""A and dL/dA, each ``(head, query, key)`` of one sample."""


def attention_weights(
    q: Tensor,
    k: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale q kᵀ + mask) row by row in float64, ``(..., query, key)``; rows without a key are zero.

    ``q`` ``(batch, head, query, channel)``, ``k`` ``(batch, head, key, channel)`` with equal heads; a boolean
    mask keeps where True, a float mask adds; ``causal`` lets query i see keys 0 to i.
    """
    q, k = q.double(), k.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    allowed = torch.ones_like(scores, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores = scores + mask.double()
    if causal:
        allowed = allowed & torch.ones(scores.shape[-2:]).tril().bool()
    weights = torch.zeros_like(scores)
    for b, h, i in ((b, h, i) for b in range(len(q)) for h in range(q.shape[1]) for i in range(q.shape[2])):
        keep = allowed[b, h, i] & (scores[b, h, i] > -math.inf)
        if keep.any():
            chosen = scores[b, h, i][keep]
            exponent = (chosen - chosen.max()).exp()
            weights[b, h, i, keep] = exponent / exponent.sum()
    return weights


def rollout_matrix(layers: Sequence[Tensor], *, residual: float = 0.5, fuse: str = "mean") -> Tensor:
    """Abnar and Zuidema 2020, eq. 1: product of rownorm(a I + (1 - a) fuse_h A_l), ``(query, key)``.

    ``layers`` are ``(head, token, token)``, first layer first.
    """
    joined = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    for weights in layers:
        fused = {"mean": weights.mean(0), "max": weights.max(0)[0], "min": weights.min(0)[0]}[fuse].double()
        step = residual * torch.eye(len(fused), dtype=torch.float64) + (1 - residual) * fused
        joined = (step / step.sum(-1, keepdim=True)) @ joined
    return joined


def positive_gradient(pair: Pair) -> Tensor:
    """Chefer et al. 2021 (ICCV), eq. 5: Ā = mean_h relu(A * dL/dA)."""
    weights, gradient = pair
    return (weights.double() * gradient.double()).clamp(min=0).mean(0)


def relevance_matrix(layers: Sequence[Pair]) -> Tensor:
    """Chefer et al. 2021 (ICCV), eq. 6: R = I, then R += Ā R for each layer, ``(token, token)``."""
    joined = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
    for pair in layers:
        joined = joined + positive_gradient(pair) @ joined
    return joined


def residual_normalised(joined: Tensor) -> Tensor:
    """Chefer et al. 2021 (ICCV), eq. 8, 9: R̄ = rownorm(R - I) + I, with 0/0 = 0, row by row."""
    identity = torch.eye(len(joined), dtype=torch.float64)
    rest = joined - identity
    for row in rest:
        if row.sum() != 0:
            row /= row.sum()
    return rest + identity


def encoder_decoder_relevance(
    encoder: Sequence[Pair], decoder_self: Sequence[Pair], decoder_cross: Sequence[Pair]
) -> Tensor:
    """Chefer et al. 2021 (ICCV), section 3.2 for an encoder and decoder: R_qi ``(query, encoder token)``."""
    encoder_tokens = decoder_cross[0][0].shape[-1]
    r_ii = relevance_matrix(encoder) if encoder else torch.eye(encoder_tokens, dtype=torch.float64)
    queries = decoder_cross[0][0].shape[-2]
    r_qq = torch.eye(queries, dtype=torch.float64)
    r_qi = torch.zeros(queries, encoder_tokens, dtype=torch.float64)
    for own, cross in zip(decoder_self, decoder_cross, strict=True):
        step = positive_gradient(own)
        r_qq, r_qi = r_qq + step @ r_qq, r_qi + step @ r_qi
        r_qi = r_qi + residual_normalised(r_qq).T @ positive_gradient(cross) @ residual_normalised(r_ii)
    return r_qi


def entropy_rows(weights: Tensor) -> Tensor:
    """-sum p ln p over the last axis in float64, with 0 ln 0 = 0."""
    weights = weights.double()
    logs = torch.where(weights > 0, weights, torch.ones_like(weights)).log()
    return -(weights * logs).sum(-1)


def deformable_matrix(points: Tensor, weights: Tensor, sizes: Sequence[tuple[int, int]]) -> Tensor:
    """Deformable attention as a matrix ``(query, head, cell)``, one point and one corner at a time.

    Zhu et al. 2021, eq. 3, of one sample: ``points`` ``(query, head, level, point, 2)`` in [0, 1] (x, y),
    ``weights`` ``(query, head, level, point)``; pixel centres at (i + 0.5) / size, zero outside.
    """
    queries, heads = weights.shape[:2]
    parts = []
    for level, (height, width) in enumerate(sizes):
        dense = torch.zeros(queries, heads, height, width, dtype=torch.float64)
        for q in range(queries):
            for h in range(heads):
                for point, weight in zip(points[q, h, level], weights[q, h, level], strict=True):
                    _splat(dense[q, h], float(point[0]), float(point[1]), float(weight))
        parts.append(dense.flatten(2))
    return torch.cat(parts, -1)


def _splat(cells: Tensor, x: float, y: float, weight: float) -> None:
    height, width = cells.shape
    column, row = x * width - 0.5, y * height - 0.5
    for i in range(height):
        for j in range(width):
            share = max(0.0, 1 - abs(row - i)) * max(0.0, 1 - abs(column - j))
            cells[i, j] += weight * share


def explicit_tiny_vit(module: nn.Module, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A :class:`~foveate.testing.tiny.TinyViT` (style ``sdpa`` or ``manual``) in float64 with explicit matrices.

    Returns logits ``(sample, class)`` and A of each layer ``(sample, head, query, key)``, in the graph.
    """
    weight = {name: value.detach().double() for name, value in module.state_dict().items()}
    config: object = module.config
    heads, patch = config.heads, config.patch  # type: ignore[attr-defined]
    patches = nn.functional.conv2d(pixels.double(), weight["embed.weight"], weight["embed.bias"], stride=patch)
    tokens = patches.flatten(2).transpose(1, 2)
    x = torch.cat([weight["cls"].expand(len(tokens), -1, -1), tokens], 1) + weight["position"]
    matrices = []
    for layer in range(config.layers):  # type: ignore[attr-defined]
        x, a = _explicit_block(weight, f"blocks.{layer}.", x, heads)
        matrices.append(a)
    x = _norm(x, weight, "norm.")
    return x[:, 0] @ weight["head.weight"].T + weight["head.bias"], matrices


def _explicit_block(weight: dict[str, Tensor], at: str, x: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    y = _norm(x, weight, f"{at}norm1.")
    q, k, v = (y @ weight[f"{at}attention.qkv.weight"].T + weight[f"{at}attention.qkv.bias"]).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    a = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]), -1)
    if not a.requires_grad:
        a.requires_grad_()
    out = torch.einsum("bhqk,bhkd->bqhd", a, v).flatten(2)
    x = x + out @ weight[f"{at}attention.proj.weight"].T + weight[f"{at}attention.proj.bias"]
    y = _norm(x, weight, f"{at}norm2.") @ weight[f"{at}mlp.0.weight"].T + weight[f"{at}mlp.0.bias"]
    y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
    return x + y @ weight[f"{at}mlp.2.weight"].T + weight[f"{at}mlp.2.bias"], a


def _norm(x: Tensor, weight: dict[str, Tensor], at: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * weight[f"{at}weight"] + weight[f"{at}bias"]
