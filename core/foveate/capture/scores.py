"""The scores of one attention call before its softmax, so that they can be changed.

Two spellings, one vocabulary: :class:`ProductScores` for a fused call, which keeps q, k and its mask and stays
a fused call, and :class:`GivenScores` for a softmax of scores that the model made. All masks and weights
are ``(batch, head, query, key)`` or broadcast to it; everything is differentiable.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.capture.dense import canonical, canonical_mask
from foveate.capture.materialised import canonical_weights
from foveate.capture.records import Shape, work_dtype

MASKED = -5e3
"""A score or additive mask below this hides its key: -inf, the dtype's lowest, -1e9 and -1e4 are in use; exp of
it is 0 in every dtype, and scores of q and k come nowhere near."""


class Scores(ABC):
    """Scores of one call."""

    sums_to_one: ClassVar[bool] = True
    """Whether a softmax follows, so that rows are distributions whatever is done to them."""

    @property
    @abstractmethod
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @abstractmethod
    def visible(self) -> Tensor:
        """Which keys the model itself lets a query see, bool."""

    @abstractmethod
    def full(self) -> Tensor:
        """All scores, float32 at least."""

    @abstractmethod
    def block(self, edges: Tensor) -> None:
        """Set the scores of ``edges`` to minus infinity."""

    @abstractmethod
    def add(self, bias: Tensor) -> None:
        """Add a float bias."""

    @abstractmethod
    def put(self, rows: Tensor, weights: Tensor) -> None:
        """Give ``rows`` (bool, key axis of size 1) weights in these proportions."""

    def multiply(self, edges: Tensor, factor: float) -> None:
        """Multiply weights on ``edges`` without renormalising; only where no softmax follows."""
        raise NotImplementedError

    def emptied(self, edges: Tensor) -> Tensor:
        """Rows that would be left without any key if ``edges`` were blocked, bool (batch, head, query)."""
        before = self.visible()
        return before.any(-1) & ~(before & ~edges).any(-1)

    def weights(self) -> Tensor:
        """The softmax of the scores as they are; rows that see no key are zero."""
        scores, dead = self.full(), ~self.visible().any(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)


class GivenScores(Scores):
    """Scores ``(..., query, key)`` that the model hands to softmax."""

    def __init__(self, scores: Tensor, heads: int) -> None:
        self._layout = scores.shape
        self._scores = canonical_weights(scores, heads)

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return Shape(*self._scores.shape)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._scores.device

    def visible(self) -> Tensor:
        """Keys whose score is not that of a mask."""
        return self._scores > MASKED

    def full(self) -> Tensor:
        """The scores in float32 at least."""
        return self._scores.to(work_dtype(self._scores.dtype))

    def block(self, edges: Tensor) -> None:
        """Set the scores of ``edges`` to minus infinity."""
        self._scores = self._scores.masked_fill(edges, -math.inf)

    def add(self, bias: Tensor) -> None:
        """Add a float bias."""
        self._scores = self._scores + bias.to(self._scores.dtype)

    def put(self, rows: Tensor, weights: Tensor) -> None:
        """Scores whose softmax has these proportions."""
        self._scores = torch.where(rows, log_weights(weights).to(self._scores.dtype), self._scores)

    def result(self) -> Tensor:
        """The changed scores in the model's own layout."""
        return self._scores.reshape(self._layout)


class ProductScores(Scores):
    """scale q kᵀ + mask, not yet multiplied: the arguments of ``F.scaled_dot_product_attention``."""

    def __init__(
        self,
        heads: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> None:
        self._layout = (*query.shape[:-1], value.shape[-1])
        self._options: dict[str, Any] = {"dropout_p": dropout_p, "scale": scale, "enable_gqa": enable_gqa}
        self._scale = query.shape[-1] ** -0.5 if scale is None else scale
        self._q, self._k, self._v = (canonical(t, heads) for t in (query, key, value))
        self._mask = None if attn_mask is None else canonical_mask(attn_mask, query, heads)
        if is_causal:
            seen = torch.ones(self._q.shape[2], self._k.shape[2], dtype=torch.bool, device=query.device)
            self._mask = seen.tril()[None, None]

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        batch, heads, queries = self._q.shape[:3]
        return Shape(batch, heads, queries, self._k.shape[2])

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._q.device

    def visible(self) -> Tensor:
        """Keys that the mask lets through."""
        if self._mask is None:
            return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device).expand(1, 1, *self.shape[2:])
        mask = self._mask if self._mask.dtype == torch.bool else self._mask > MASKED
        return mask.expand(*mask.shape[:2], *self.shape[2:])

    def full(self) -> Tensor:
        """The scores, multiplied out in float32 at least."""
        dtype = work_dtype(self._q.dtype)
        keys = self._k.repeat_interleave(self._q.shape[1] // self._k.shape[1], 1)
        scores = (self._q.to(dtype) @ keys.to(dtype).transpose(-1, -2)) * self._scale
        if self._mask is None:
            return scores
        if self._mask.dtype == torch.bool:
            return scores.masked_fill(~self._mask, -math.inf)
        return scores + self._mask

    def block(self, edges: Tensor) -> None:
        """Hide ``edges`` by the mask."""
        if self._mask is None:
            self._mask = ~edges
        elif self._mask.dtype == torch.bool:
            self._mask = self._mask & ~edges
        else:
            self._mask = self._mask.masked_fill(edges, -math.inf)

    def add(self, bias: Tensor) -> None:
        """Add a float bias by the mask."""
        self._mask = self._additive() + bias.to(self._q.dtype)

    def put(self, rows: Tensor, weights: Tensor) -> None:
        """Zero q there, so that the mask alone decides."""
        wanted = log_weights(weights).to(self._q.dtype)
        self._q = self._q.masked_fill(rows, 0.0)
        self._mask = torch.where(rows, wanted, self._additive())

    def set_values(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change v ``(batch, head, key, channel)``; grouped heads get their own copy first."""
        groups = self._q.shape[1] // self._v.shape[1]
        if groups > 1:
            self._k, self._v = (t.repeat_interleave(groups, 1) for t in (self._k, self._v))
            self._options["enable_gqa"] = False
        self._v = change(self._v)

    def result(self) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any]]:
        """Arguments of the changed call, in four axes."""
        mask = None if self._mask is None else self._mask.expand(*self._mask.shape[:2], *self.shape[2:])
        return (self._q, self._k, self._v), {**self._options, "attn_mask": mask}

    def restored(self, out: Tensor) -> Tensor:
        """The result of the changed call in the model's own layout."""
        return out if out.shape == self._layout else out.reshape(self._layout)

    def _additive(self) -> Tensor:
        if self._mask is None:
            return self._q.new_zeros(1, 1, 1, 1)
        if self._mask.dtype == torch.bool:
            return torch.zeros_like(self._mask, dtype=self._q.dtype).masked_fill(~self._mask, -math.inf)
        return self._mask


def log_weights(weights: Tensor) -> Tensor:
    """ln w, the largest of each row near 0 where low precision is finest; -inf (and no gradient) where w is 0."""
    safe = torch.where(weights > 0, weights, torch.ones_like(weights)).log()
    safe = safe - safe.amax(-1, keepdim=True).detach() if weights.numel() else safe
    return safe.masked_fill(weights <= 0, -math.inf)
