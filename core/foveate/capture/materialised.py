"""Attention weights that the model made itself: a softmax followed by a product with values.

Here A is a tensor of the model (and of its autograd graph), so rows are read, not recomputed, and the
gradient dL/dA is taken at A directly. The certificate multiplies A with the values that the model multiplied
it with; weights changed in between (dropout, head masks) fail it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from foveate.capture.blocks import Positions
from foveate.capture.records import Check, Record, Shape, as_index, relative_error, row_check, work_dtype
from foveate.interfaces import SiteForm

BLOCKED = -5e3
"""Scores below this are masked: additive masks are -inf, a dtype's minimum or -1e4 and less, scores never are."""


class MaterialisedRecord(Record):
    """Softmax weights ``(..., query, key)``; with three axes ``heads`` says how many heads the first holds.

    ``product`` is (weights as they entered the product, values, output) where the tap saw a plain matrix
    product. ``linked`` tells that it saw any product of these weights with values. ``blocked`` is where the scores
    were masked, bool like the weights, or None.
    """

    form: ClassVar[SiteForm] = "dense"
    via = "softmax"

    def __init__(
        self,
        name: str,
        weights: Tensor,
        *,
        heads: int = 1,
        product: tuple[Tensor, Tensor, Tensor] | None = None,
        linked: bool = False,
        over_keys: bool = True,
        blocked: Tensor | None = None,
    ) -> None:
        self.name, self.linked, self.sums_to_one = name, linked, over_keys
        self._heads = heads
        self.node = weights if weights.requires_grad else None
        self.weights = canonical_weights(weights.detach(), heads)
        self.blocked = None if blocked is None else canonical_weights(blocked, heads)
        self._product = None if product is None else tuple(t.detach() for t in product)

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return Shape(*self.weights.shape)

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights.device

    @property
    def out(self) -> Tensor | None:
        """A V as the model computed it, ``(batch, head, query, channel)``, where a plain product was seen."""
        return None if self._product is None else self._product[2].reshape(*self.shape[:3], -1)

    @property
    def v(self) -> Tensor | None:
        """V of that product, ``(batch, head, key, channel)``; None where heads or samples share it."""
        batch, heads, _, keys = self.shape
        if self._product is None or self._product[1].shape[:-2].numel() != batch * heads:
            return None
        return self._product[1].reshape(batch, heads, keys, -1)

    def light(self) -> MaterialisedRecord:
        """Without values and output."""
        return MaterialisedRecord(
            self.name, self.weights, linked=self.linked, over_keys=self.sums_to_one, blocked=self.blocked
        )

    def rows(self, index: Positions | Sequence[int]) -> Tensor:
        """Rows of the model's own weights (a copy), ``(batch, head, row, key)``; NaN rows are masked: zero."""
        rows = self.weights[:, :, as_index(index, self.device)].to(work_dtype(self.weights.dtype), copy=True)
        dead = rows.isnan().all(-1, keepdim=True)
        return rows.masked_fill_(dead, 0.0) if bool(dead.any()) and not bool(dead.all()) else rows

    def certificate(self, index: Positions | Sequence[int]) -> Check:
        """Row sums, and A V against the product that the model computed."""
        positions = as_index(index, self.device)
        row_error, dead = row_check(self.rows(positions))
        error = math.nan
        if self._product is not None:
            used, values, out = self._product
            part = self.weights.reshape(used.shape)[..., positions, :]
            found = part.to(work_dtype(used.dtype)) @ values.to(work_dtype(values.dtype))
            error = relative_error(found, out[..., positions, :])
            error = math.inf if math.isnan(error) else error
        return Check(error, row_error if self.sums_to_one else 0.0, dead, self.weights.dtype)

    def weight_gradient(self, positions: Positions, gradient: Tensor) -> Tensor:
        """The gradient at A itself, some rows of it, as a copy."""
        slope = canonical_weights(gradient, self._heads)[:, :, positions]
        return slope.to(work_dtype(slope.dtype), copy=True)


def canonical_weights(weights: Tensor, heads: int) -> Tensor:
    """``(batch, head, query, key)`` from any number of leading axes."""
    if weights.dim() == 2:
        return weights[None, None]
    if weights.dim() == 3:
        return weights.unflatten(0, (-1, heads)) if weights.shape[0] % heads == 0 else weights.unsqueeze(1)
    return weights.flatten(0, weights.dim() - 4)
