"""The building blocks of tracker and refiner: post-norm attention and feed-forward layers, an MLP, mask pooling.

Sequences come first, as in ``nn.MultiheadAttention`` without ``batch_first``: (token, batch, channel). Attribute
names are those of the published state dicts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class CrossAttention(nn.Module):
    """``LN(x + MHA(x + p, keys, values))`` (Vaswani et al. 2017, post-norm)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, position: Tensor | None = None) -> Tensor:
        """``x``, ``position`` (row, batch, channel); ``keys``, ``values`` (key, batch, channel)."""
        query = x if position is None else x + position
        read = self.multihead_attn(query, keys, values, need_weights=False)[0]
        normed: Tensor = self.norm(x + read)
        return normed


class SelfAttention(nn.Module):
    """``LN(x + MHA(x, x, x))``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(width, heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (row, batch, channel)."""
        normed: Tensor = self.norm(x + self.self_attn(x, x, x, need_weights=False)[0])
        return normed


class FeedForward(nn.Module):
    """``LN(x + W2 relu(W1 x))``."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., channel)."""
        normed: Tensor = self.norm(x + self.linear2(F.relu(self.linear1(x))))
        return normed


class Perceptron(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, out)])

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., channel)."""
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        last: Tensor = self.layers[-1](x)
        return last


def pooled(masks: Tensor, features: Tensor) -> Tensor:
    """Mean feature inside each mask, (row, channel): zero for an empty one.

    ``masks`` (row, y, x) logits, inside where sigmoid > 0.5; ``features`` (channel, y, x). The mask itself is
    a hard decision, so gradients flow through the features only.
    """
    inside = (torch.sigmoid(masks) > 0.5).to(features.dtype)
    sums = torch.einsum("ryx,cyx->rc", inside, features)
    return sums / (inside.sum(dim=(1, 2))[:, None] + 1e-8)
