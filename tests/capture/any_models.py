"""Models that no plugin knows, in the spellings of attention found in the wild, and their float64 matrices.

``explicit`` walks the same weights in float64, with attention computed row by row, so it shares no code with the
models' own forward. q and k are scaled so that attention is peaked.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from foveate.testing.oracles import attention_weights

WIDTH, HEADS, SIDE, PATCH, CLASSES = 24, 4, 4, 4, 5
TOKENS = SIDE * SIDE + 1
SPELLINGS = ("fused", "unfused", "einsum", "heads_last", "grouped", "biased", "causal", "masked", "merged_heads")


def images(count=2, seed=1):
    return torch.randn(count, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(seed))


def allowed():
    """A boolean mask that keeps about half of the keys, and always the diagonal."""
    kept = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(7)) > 0.5
    return kept | torch.eye(TOKENS, dtype=torch.bool)


class Attention(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.spelling, self.num_heads = spelling, HEADS
        self.kv_heads = 2 if spelling == "grouped" else HEADS
        self.q = nn.Linear(WIDTH, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * self.kv_heads * WIDTH // HEADS)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.zeros(HEADS, TOKENS, TOKENS))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1))
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, -1)).unbind(-3)
        if self.spelling == "heads_last":
            weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(q.shape[-1] ** -0.5).softmax(-1)
            return self.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2))
        out = getattr(self, f"_{self.spelling}")(*(t.transpose(1, 2) for t in (q, k, v)))
        return self.proj(out.transpose(1, 2).flatten(2))

    def _fused(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def _unfused(self, q, k, v):
        q = q * q.shape[-1] ** -0.5
        return (q @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    def _einsum(self, q, k, v):
        scores = torch.einsum("... i d, ... j d -> ... i j", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("... i j, ... j d -> ... i d", scores.softmax(-1), v)

    def _grouped(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def _biased(self, q, k, v):
        return torch.softmax(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + self.bias, -1) @ v

    def _causal(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def _masked(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed())

    def _merged_heads(self, q, k, v):
        shape = q.shape
        q, k, v = (t.flatten(0, 1) for t in (q, k, v))
        weights = F.softmax(torch.bmm(q, k.mT) * q.shape[-1] ** -0.5, dim=-1)
        return torch.bmm(weights, v).view(shape)


class Block(nn.Module):
    def __init__(self, spelling):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention(spelling)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AnyViT(nn.Module):
    """``pool``: "cls", "mean" or None (all tokens are returned); ``mix`` convolves tokens between blocks."""

    def __init__(self, spelling="fused", depth=3, pool="cls", mix=False, seed=0):
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block(spelling) for _ in range(depth))
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=1) if mix else None
        self.norm, self.head, self.pool = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES), pool
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.dim() > 1:
                    fan_in = value[0].numel()
                    value.normal_(0, 1 if name in ("cls", "position") else fan_in**-0.5, generator=generator)
                elif "norm" not in name:
                    value.normal_(0, 0.1, generator=generator)
                if name.endswith(("attn.q.weight", "attn.kv.weight")):
                    value *= 2.2
                if name.endswith("attn.bias"):
                    value.normal_(0, 1.5, generator=generator)
        self.eval()

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        for block in self.blocks:
            x = block(x)
            if self.mix is not None:
                x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(x)
        if self.pool is None:
            return x
        return self.head(x[:, 0] if self.pool == "cls" else x[:, 1:].mean(1))


def explicit(model, pixels):
    """A of each layer ``(sample, head, query, key)`` in float64."""
    twin, found = copy.deepcopy(model).double(), []
    with torch.no_grad():
        x = twin.embed(pixels.double()).flatten(2).transpose(1, 2)
        x = torch.cat([twin.cls.expand(len(x), -1, -1), x], 1) + twin.position
        for block in twin.blocks:
            attention = block.attn
            y = block.norm1(x)
            q = heads(attention.q(y), HEADS)
            k, v = (heads(t, attention.kv_heads) for t in attention.kv(y).chunk(2, -1))
            k, v = (t.repeat_interleave(HEADS // attention.kv_heads, 1) for t in (k, v))
            mask = {"biased": attention.bias[None], "masked": allowed()}.get(attention.spelling)
            weights = attention_weights(q, k, mask=mask, causal=attention.spelling == "causal")
            found.append(weights)
            x = x + attention.proj((weights @ v).transpose(1, 2).flatten(2))
            x = x + block.mlp(block.norm2(x))
    return found


def heads(x, count):
    """``(sample, token, head * channel)`` to ``(sample, head, token, channel)``."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def sharpen(model, scale, *names):
    """Scale q and k of a library's model: all parameters whose name ends in one of ``names``."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(names):
                value.normal_(0, scale * value.shape[-1] ** -0.5, generator=generator)
    return model.eval()
