"""Attention weighted by the vectors that it moves: ||α f(x)|| instead of α.

A large weight on a token whose values are nearly zero moves nothing; sinks are often of that kind. What key j
contributes to query i is (Kobayashi et al. 2020, EMNLP, sec. 2)

    c_ij = sum_h α^h_ij f^h(x_j),    f^h(x_j) = (x_j W_V^h + b_V^h) W_O^h

and, with the residual and layer norm around the attention (Kobayashi et al. 2021, EMNLP, sec. 3),

    c'_ij = c_ij + [i = j] x_i,    c''_ij = γ * (c'_ij - mean(c'_ij)) / s(x_i + y_i),

where y_i is the module's output and s the layer norm's denominator. b_O and β belong to no token. A layer scale
is part of W_O. Pre-norm blocks are decomposed exactly as well, since their norm acts on each token before f; the
layer norm that follows the sum is then the MLP's. Contributions of all keys, b_O and the residual add up to the
module's own output: :func:`value_error` measures it.

No (query, key, channel) array exists: ||c_ij||^2 = sum_hg α^h_ij α^g_ij G_j[h, g] with the Gram matrices
G_j[h, g] = <f^h(x_j), f^g(x_j)>, in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.certificate import spread
from foveate.capture.records import Shape, as_index, relative_error
from foveate.capture.tap import quiet
from foveate.capture.value_paths import Norm, ValuePath, missing
from foveate.errors import UsageError

Parts = Literal["attention", "residual", "norm"]
KEYS_AT_ONCE = 256
"""Keys whose vectors ``(sample, key, head, channel)`` are held at once."""


class NormWeights:
    """Norms of what every key contributes at one call.

    ``parts``: "attention" (c), "residual" (c', self-attention only) or "norm" (c''). Raises CaptureError where
    what is needed was not seen to follow the attention, UsageError where the residual belongs to no key.
    """

    def __init__(self, path: ValuePath, parts: Parts = "attention") -> None:
        self.path, self.parts = path, parts
        if parts not in ("attention", "residual", "norm"):
            raise UsageError(f"norms: no parts {parts!r}", remedy="use 'attention', 'residual' or 'norm'")
        if path.weight is None:
            raise missing(path, "projection")
        if parts != "attention" and path.residual is None:
            raise missing(path, "residual")
        if parts == "norm" and path.norm is None:
            raise missing(path, "layer norm")
        if parts != "attention" and self.shape.queries != self.shape.keys:
            raise UsageError(
                f"norms: {path.record.name} has {self.shape.queries} queries and {self.shape.keys} keys, so the "
                "residual of a query is not the contribution of a key",
                remedy="use parts='attention' for cross-attention",
            )

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return self.path.shape

    def heads(self, index: Positions | Sequence[int]) -> Tensor:
        """||α^h_ij f^h(x_j)|| of every head alone, ``(batch, head, row, key)``, float64; attention only.

        With ``parts="norm"`` in the units of the normalised output.
        """
        with quiet():
            rows = self.path.record.rows(index).double()
            own = self._gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()  # (batch, key, head)
            return rows * own.permute(0, 2, 1)[:, :, None] / self._deviation(index)[:, None, :, None]

    def rows(self, index: Positions | Sequence[int]) -> Tensor:
        """||c_ij||, ||c'_ij|| or ||c''_ij||, heads together: ``(batch, row, key)``, float64."""
        with quiet():
            rows = self.path.record.rows(index).double()
            square = _quadratic(rows, self._gram)
            if self.parts != "attention":
                square = square + self._residual_part(rows, index)
            return square.clamp_min(0).sqrt() / self._deviation(index)[..., None]

    def received(self) -> Tensor:
        """What every key moves on average: the mean of :meth:`rows` over queries, ``(batch, key)``, float64."""
        total = torch.zeros(self.shape.batch, self.shape.keys, dtype=torch.float64, device=self.path.record.device)
        for positions in self.path.record.positions():
            total += self.rows(positions).sum(1)
        return total / self.shape.queries

    def mixing_ratio(self) -> Tensor:
        """Share of the context: ||sum_{j != i} c_ij|| / (that + ||c_ii||), ``(batch, query)``, float64.

        The mixing ratio of Kobayashi et al. 2021, sec. 3; 0 keeps the token, 1 replaces it by its context.
        """
        if self.parts == "attention":
            raise UsageError("norms: a mixing ratio needs the residual", remedy="use parts='residual' or 'norm'")
        with quiet():
            own, total = self._diagonal_vectors(), self._map(self._attention_output())
            kept = (own + self._residual).norm(dim=-1)
            mixed = (total - own).norm(dim=-1)
            ratio: Tensor = mixed / (mixed + kept)
            return ratio

    # ------------------------------------------------------------------------------------- vectors

    @cached_property
    def _values(self) -> Tensor:
        """v ``(batch, head, key, channel)`` with one head for each head of q."""
        v: Tensor | None = getattr(self.path.record, "v", None)
        if v is None:
            raise missing(self.path, "product with values")
        return v.repeat_interleave(self.shape.heads // v.shape[1], 1).double()

    def _map(self, vectors: Tensor) -> Tensor:
        """Layer scale and the linear part of the layer norm (without its division), on ``(..., out)``."""
        return vectors if self.parts != "norm" else _centred(vectors, self._norm)

    @property
    def _norm(self) -> Norm:
        assert self.path.norm is not None
        return self.path.norm

    @cached_property
    def _weight(self) -> Tensor:
        """W_O with the layer scale, and with the norm's linear part: ``(head, channel, out)``."""
        assert self.path.weight is not None
        return self._map(self.path.weight.double() * self.path.scale)

    @cached_property
    def _residual(self) -> Tensor:
        """What the token itself brings, ``(batch, query, out)``."""
        assert self.path.residual is not None
        return self._map(self.path.residual.double())

    def _vectors(self) -> Iterator[tuple[slice, Tensor]]:
        """f^h(x_j), some keys at a time: ``(batch, key, head, out)``."""
        for start in range(0, self.shape.keys, KEYS_AT_ONCE):
            keys = slice(start, start + KEYS_AT_ONCE)
            yield keys, torch.einsum("bhkc,hco->bkho", self._values[:, :, keys], self._weight)

    @cached_property
    def _gram(self) -> Tensor:
        """G_j[h, g], ``(batch, key, head, head)``."""
        return torch.cat([vectors @ vectors.transpose(-1, -2) for _, vectors in self._vectors()], 1)

    @cached_property
    def _alignment(self) -> Tensor:
        """<f^h(x_j), x_j>, ``(batch, head, key)``."""
        parts = [
            torch.einsum("bkho,bko->bhk", vectors, self._residual[:, keys]) for keys, vectors in self._vectors()
        ]
        return torch.cat(parts, -1)

    def _residual_part(self, rows: Tensor, index: Positions | Sequence[int]) -> Tensor:
        """2 <c_ii, x_i> + ||x_i||^2 on the diagonal, ``(batch, row, key)``."""
        chosen = torch.arange(self.shape.queries, device=rows.device)[as_index(index, rows.device)]
        here = torch.arange(len(chosen), device=rows.device)
        inner = torch.einsum("bhr,bhr->br", rows[:, :, here, chosen], self._alignment[:, :, chosen])
        part = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[3])
        part[:, here, chosen] = 2 * inner + self._residual[:, chosen].square().sum(-1)
        return part

    def _deviation(self, index: Positions | Sequence[int]) -> Tensor:
        """What the layer norm divides a query by, ``(batch, row)``; 1 without it."""
        chosen = as_index(index, self.path.record.device)
        if self.parts != "norm":
            assert self.path.projected is not None
            return torch.ones_like(self.path.projected[:, chosen, 0], dtype=torch.float64)
        assert self.path.total is not None
        total = self.path.total[:, chosen].double()
        return (total.var(-1, correction=0) + self._norm.eps).sqrt()

    def _attention_output(self) -> Tensor:
        """sum_j c_ij by the model's own projection, ``(batch, query, out)``."""
        assert self.path.projected is not None
        bias = 0.0 if self.path.bias is None else self.path.bias.double()
        return (self.path.projected.double() - bias) * self.path.scale

    def _diagonal_vectors(self) -> Tensor:
        """c_ii, ``(batch, query, out)``."""
        parts = []
        for keys, vectors in self._vectors():
            span = range(keys.start, min(keys.stop, self.shape.keys))
            own = self.path.record.rows(span)[:, :, range(len(span)), span].double()
            parts.append(torch.einsum("bhk,bkho->bko", own, vectors))
        return torch.cat(parts, 1)


def value_error(path: ValuePath, index: Sequence[int] | None = None) -> float:
    """Largest relative difference between the sum of all contributions and what the module itself put out.

    Checks the projection with its bias, then, as far as they were seen, the sum with the residual and the layer
    norm, on some queries (default: spread over all).
    """
    if path.weight is None or path.projected is None:
        raise missing(path, "projection")
    chosen = spread(path.shape.queries) if index is None else list(index)
    weights = NormWeights(path)
    with quiet():
        rows = path.record.rows(chosen).double()
        found = torch.einsum("bhrk,bhkc,hco->bro", rows, weights._values, path.weight.double())
        if path.bias is not None:
            found = found + path.bias.double()
        pairs = [(found, path.projected)]
        if path.residual is not None and path.total is not None:
            found = found * path.scale + path.residual[:, chosen].double()
            pairs.append((found, path.total))
            if path.norm is not None:
                deviation = (found.var(-1, correction=0, keepdim=True) + path.norm.eps).sqrt()
                shift = 0.0 if path.norm.bias is None else path.norm.bias.double()
                pairs.append((_centred(found, path.norm) / deviation + shift, path.norm.out))
        return max(_error(one, other[:, chosen]) for one, other in pairs)


def _error(found: Tensor, expected: Tensor) -> float:
    known = ~expected.isnan()
    return relative_error(found[known], expected[known])


def _centred(vectors: Tensor, norm: Norm) -> Tensor:
    """γ * (v - mean(v)), the linear part of a layer norm."""
    gain = 1.0 if norm.weight is None else norm.weight.double()
    return (vectors - vectors.mean(-1, keepdim=True)) * gain


def _quadratic(rows: Tensor, gram: Tensor) -> Tensor:
    """sum_hg a^h_ij a^g_ij G_j[h, g] for a ``(batch, head, row, key)``: ``(batch, row, key)``."""
    return (torch.einsum("bkhg,bgrk->bhrk", gram, rows) * rows).sum(1)
