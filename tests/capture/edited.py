"""Hand-edited attention: one module in the spellings found in the wild, and its float64 twin whose A is edited.

The twin edits A *after* the softmax and renormalises; the engine edits scores before it. They must agree.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

B, N, WIDTH, HEADS = 2, 9, 24, 4
SPELLINGS = ("sdpa", "manual", "dtype", "bmm", "einsum", "mha", "mha_weights", "five_axes", "grouped")


class Block(nn.Module):
    """Self-attention with an output projection; ``mask`` is None, boolean, additive or "causal"."""

    def __init__(self, spelling="sdpa", mask=None, seed=0):
        super().__init__()
        self.spelling, self.mask = spelling, mask
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.mha.in_proj_weight.normal_(0, 0.45, generator=random)
            self.mha.in_proj_bias.normal_(0, 0.3, generator=random)
            self.mha.out_proj.weight.normal_(0, 0.3, generator=random)
            self.mha.out_proj.bias.normal_(0, 0.3, generator=random)
        self.eval()

    def project(self, x):
        """q, k, v ``(batch, head, token, channel)``; "grouped" shares k and v between pairs of heads."""
        weight, bias = self.mha.in_proj_weight.to(x), self.mha.in_proj_bias.to(x)
        q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return (q, k[:, ::2], v[:, ::2]) if self.spelling == "grouped" else (q, k, v)

    def additive(self, x):
        """The mask as numbers to add ``(batch | 1, head | 1, query, key)``."""
        if self.mask is None:
            return torch.zeros(1, 1, N, N).to(x)
        if isinstance(self.mask, str):
            return torch.full((N, N), -math.inf).triu(1)[None, None].to(x)
        if self.mask.dtype == torch.bool:
            return torch.zeros(self.mask.shape).masked_fill(~self.mask, -math.inf).to(x)
        return self.mask.to(x)

    def forward(self, x):
        if self.spelling.startswith("mha"):
            mask = None if self.mask is None else self.additive(x).expand(B, HEADS, N, N).flatten(0, 1)
            return self.mha(x, x, x, need_weights=self.spelling == "mha_weights", attn_mask=mask)[0]
        out = getattr(self, f"_{self.spelling}")(*self.project(x)).transpose(1, 2).flatten(2)
        return F.linear(out, self.mha.out_proj.weight, self.mha.out_proj.bias)

    def _sdpa(self, q, k, v):
        if isinstance(self.mask, str):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask)

    def _five_axes(self, q, k, v):
        mask = None if self.mask is None else self.additive(q).expand(B, HEADS, N, N)[None]
        return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]

    def _grouped(self, q, k, v):
        mask = None if self.mask is None else self.additive(q)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    def _manual(self, q, k, v):
        return self._scores(q, k).softmax(dim=-1) @ v

    def _dtype(self, q, k, v):
        return torch.matmul(F.softmax(self._scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype), v)

    def _bmm(self, q, k, v):
        weights = torch.softmax(self._scores(q, k), -1).flatten(0, 1)
        return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (len(q), HEADS))

    def _einsum(self, q, k, v):
        return torch.einsum("bhij,bjhd->bhid", torch.softmax(self._scores(q, k), -1), v.transpose(1, 2))

    def _scores(self, q, k):
        return torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5 + self.additive(q)


def inputs(seed=1):
    return torch.randn(B, N, WIDTH, generator=torch.Generator().manual_seed(seed))


def twin(block, x, edit=lambda a: a, edit_heads=lambda out: out):
    """Output and A of ``block`` in float64, A ``(batch, head, query, key)`` edited after the softmax."""
    x = x.double()
    q, k, v = block.project(x)
    if block.spelling == "grouped":
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1]) + block.additive(x)
    weights = torch.zeros_like(scores)
    seen = (scores > -1e3).any(-1)
    weights[seen] = torch.softmax(scores[seen], -1)
    weights = edit(weights)
    out = edit_heads(torch.einsum("bhqk,bhkd->bhqd", weights, v)).transpose(1, 2).flatten(2)
    projection = block.mha.out_proj
    return out @ projection.weight.double().T + projection.bias.double(), weights


def without(edges):
    """Set edges to 0 and divide every row by what is left."""

    def edit(weights):
        kept = weights * ~edges
        return kept / kept.sum(-1, keepdim=True)

    return edit
