"""Dense attention from q and k: softmax(scale q k^T + mask), recomputed exactly for the rows that are wanted.

Follows the definition of ``torch.nn.functional.scaled_dot_product_attention``: a boolean mask keeps where it
is True, a float mask adds, ``is_causal`` is aligned at the upper left, grouped-query heads repeat k and v,
and a row without any key is zero. The softmax is in float32 at least: a bf16 model's own eager formula
rounds scores before and weights after it, so this is closer to the truth of q and k than the model's eager path.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.records import Check, Record, Shape, as_index, relative_error, row_check, work_dtype
from foveate.interfaces import SiteForm

FEW = 4
"""Rows so few that float64 costs next to nothing. The rounding of float32 scores alone moves weights by 1e-6 of
the row's maximum where attention is peaked."""


class DenseRecord(Record):
    """One call of scaled dot-product attention, held as references to its arguments.

    ``q`` is ``(..., query, channel)``, ``k`` and ``v`` ``(..., key, channel)``: four axes are (batch,
    head, token, channel); with three, ``heads`` says how many heads the first axis holds; more leading
    axes count as batch.
    """

    form: ClassVar[SiteForm] = "dense"
    via = "sdpa"

    def __init__(
        self,
        name: str,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        out: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        causal: bool = False,
        dropout: float = 0.0,
        heads: int = 1,
    ) -> None:
        self.name, self.causal, self.dropout = name, causal, dropout
        self._heads = heads
        self.node = out if out is not None and out.requires_grad else None
        # Under autocast the kernel saw q and k in the dtype of its output, the tap before the cast.
        seen = out.dtype if out is not None and out.dtype != q.dtype else None
        q, k = (t.detach() if seen is None else t.detach().to(seen) for t in (q, k))
        self.scale = q.shape[-1] ** -0.5 if scale is None else scale
        self.q, self.k = canonical(q, heads), canonical(k, heads)
        self.v = None if v is None else canonical(v.detach(), heads)
        self.out = None if out is None else canonical(out.detach(), heads)
        self.mask = None if mask is None else canonical_mask(mask.detach(), q, heads)

    @property
    def shape(self) -> Shape:
        """(batch, heads of q, queries, keys)."""
        batch, heads, queries = self.q.shape[:3]
        return Shape(batch, heads, queries, self.k.shape[2])

    @property
    def device(self) -> torch.device:
        """Where q lives."""
        return self.q.device

    def light(self) -> DenseRecord:
        """Without v and out."""
        return DenseRecord(
            self.name,
            self.q,
            self.k,
            mask=self.mask,
            scale=self.scale,
            causal=self.causal,
            dropout=self.dropout,
        )

    def prepared(self) -> DenseRecord:
        """k and v converted and made contiguous, once for all blocks of a pass."""
        ready = copy.copy(self)
        dtype = work_dtype(self.q.dtype)
        ready.k = self.k.to(dtype).contiguous()
        ready.v = None if self.v is None else self.v.to(dtype).contiguous()
        return ready

    def scores(self, index: Positions | Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Scaled and masked scores before the softmax, ``(batch, head, row, key)``; -inf where masked."""
        positions = as_index(index, self.device)
        queries = self.q[:, :, positions].to(dtype or work_dtype(self.q.dtype))
        scores = _per_group(queries, self.k.transpose(-1, -2))
        scores *= self.scale
        return self._masked(scores, positions)

    def rows(self, index: Positions | Sequence[int]) -> Tensor:
        """Exact attention of some queries, ``(batch, head, row, key)``; zero where a row sees no key.

        Up to :data:`FEW` rows given by position are evaluated in float64 and rounded once.
        """
        positions = as_index(index, self.device)
        dtype = work_dtype(self.q.dtype)
        few = isinstance(positions, Tensor) and len(positions) <= FEW and self.device.type != "mps"
        return self._weights(positions, torch.float64 if few else dtype).to(dtype)

    def _weights(self, positions: Positions, dtype: torch.dtype) -> Tensor:
        scores = self.scores(positions, dtype)
        dead = (scores == -math.inf).all(-1, keepdim=True) if self.mask is not None else None
        weights = torch.softmax(scores, -1, out=scores)
        return weights if dead is None else weights.masked_fill_(dead, 0.0)

    def certificate(self, index: Positions | Sequence[int]) -> Check:
        """P V on some rows against SDPA's own output."""
        rows = self._weights(as_index(index, self.device), work_dtype(self.q.dtype))
        row_error, dead = row_check(rows)
        error = math.nan
        if self.v is not None and self.out is not None:
            found = _per_group(rows, self.v)
            error = relative_error(found, self.out[:, :, as_index(index, self.device)])
            error = math.inf if math.isnan(error) else error
        return Check(error, row_error, dead, self.q.dtype)

    def weight_gradient(self, positions: Positions, gradient: Tensor) -> Tensor:
        """dL/dA_ij = <dL/dO_i, V_j> on some rows, ``(batch, head, row, key)``; ``gradient`` is dL/dO."""
        if self.v is None:
            raise ValueError(f"{self.name}: this record no longer holds v")
        slope = canonical(gradient, self._heads)[:, :, positions].to(work_dtype(self.v.dtype))
        return _per_group(slope, self.v.transpose(-1, -2))

    def _masked(self, scores: Tensor, positions: Positions) -> Tensor:
        if self.mask is not None:
            mask = self.mask if self.mask.shape[-2] == 1 else self.mask[..., positions, :]
            if mask.dtype == torch.bool:
                scores.masked_fill_(~mask, -math.inf)
            else:
                scores += mask
        if self.causal:
            query = torch.arange(self.shape.queries, device=self.device)[positions]
            key = torch.arange(self.shape.keys, device=self.device)
            scores.masked_fill_(key > query[:, None], -math.inf)
        return scores


def canonical(tensor: Tensor, heads: int) -> Tensor:
    """Any of SDPA's layouts as ``(batch, head, token, channel)``."""
    if tensor.dim() == 2:
        return tensor[None, None]
    if tensor.dim() == 3:
        return tensor.unflatten(0, (-1, heads)) if tensor.shape[0] % heads == 0 else tensor.unsqueeze(1)
    return tensor.flatten(0, tensor.dim() - 4)


def canonical_mask(mask: Tensor, q: Tensor, heads: int) -> Tensor:
    """A mask that broadcasts against ``(batch, head, query, key)``."""
    if q.dim() > 4:
        mask = mask.expand(*q.shape[:-2], *mask.shape[-2:]).flatten(0, q.dim() - 4)
    elif q.dim() == 3 and mask.dim() == 3 and mask.shape[0] == q.shape[0]:
        mask = mask.unflatten(0, (-1, heads))
    return mask[(None,) * (4 - mask.dim())]


def _per_group(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` where ``right`` may have fewer heads, each serving a group (grouped-query attention)."""
    groups = left.shape[1] // right.shape[1]
    if groups == 1:
        return _product(left, right)
    grouped = _product(left.unflatten(1, (right.shape[1], groups)), right.unsqueeze(2))
    return grouped.flatten(1, 2)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right`` in the dtype of ``left`` without copying all of ``right``.

    Heads of a model's k are strided views; matmul merges sample and head by copying all of k, which costs
    more than the few rows it is wanted for. One sample at a time there is nothing to merge, and little to convert.
    """
    if len(right) > 1 and (right.dtype != left.dtype or right.stride(0) != right.shape[1] * right.stride(1)):
        return torch.stack([one @ other.to(one.dtype) for one, other in zip(left, right, strict=True)])
    return left @ right.to(left.dtype)
