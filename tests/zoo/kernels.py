"""What the kernels computed, read below Python: the reference where a model offers no matrices of its own.

A ``TorchDispatchMode`` sees the inputs of every softmax and fused attention kernel of a *plain* forward (no tap)
and computes the weights anew in float64. It shares nothing with the engine but the way to name the running module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.capture.census import ATTENTION_KERNELS, SAMPLING_KERNELS, SOFTMAX_KERNELS
from foveate.capture.owners import Owners

HUGE = 1e4  # what stands for -inf in masks is no score


@dataclass(eq=False)
class Call:
    """One softmax or fused kernel: its owner, its weights in float64, and where its values were sampled.

    ``largest`` is the largest finite |score|: float32 knows it to 6e-8 of itself, and exp turns that into a
    relative error of the weights.
    """

    owner: str
    kernel: str
    weights: Tensor | None
    largest: float = 0.0
    samples: list[tuple[Tensor, Tensor, bool]] = field(default_factory=list)

    def splatted(self) -> Tensor:
        """Deformable attention as a matrix ``(batch, head, query, cell)``.

        Sampling a one-hot picture of each cell tells how much of the cell every point takes: the values play
        no part, only torch's own ``grid_sample``.
        """
        assert self.weights is not None
        batch, queries, heads = self.weights.shape[:3]
        weights = self.weights.reshape(batch, queries, heads, -1).transpose(1, 2).flatten(0, 1)
        parts, start = [], 0
        for values, grid, corners in self.samples:
            height, width = values.shape[-2:]
            cells = torch.eye(height * width, dtype=torch.float64).reshape(1, -1, height, width)
            taken = F.grid_sample(cells.expand(len(grid), -1, -1, -1), grid.double(), align_corners=corners)
            points = grid.shape[-2]
            parts.append(torch.einsum("bcqp,bqp->bqc", taken, weights[..., start : start + points]))
            start += points
        return torch.cat(parts, -1).unflatten(0, (batch, heads))


class Recorder(TorchDispatchMode):
    """Lists every kernel that could be attention, in order."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._owners = Owners(module)
        self._busy = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.__name__.split(".")[0]
        if not self._busy:
            self._busy = True
            try:
                self._note(name, args, kwargs)
            finally:
                self._busy = False
        return out

    def _note(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        owner = self._owners.current() or ""
        if name in SOFTMAX_KERNELS:
            self._scored(owner, name, args[0].detach().double(), args[1])
        elif name.startswith(ATTENTION_KERNELS) and "scaled_dot" in name:
            self._scored(owner, name, fused(*args, **kwargs), -1)
        elif name.startswith(ATTENTION_KERNELS):
            self.calls.append(Call(owner, name, None))
        elif name in SAMPLING_KERNELS:
            self._sampled(owner, args)
        elif name == "index" and args[0].dim() == 4 and len(args[1]) == 4 and args[1][1] is None:
            self._indexed(owner, args)

    def _scored(self, owner: str, name: str, scores: Tensor, dim: int) -> None:
        usual = scores[scores.abs() < HUGE]
        largest = float(usual.abs().amax()) if usual.numel() else 0.0
        self.calls.append(Call(owner, name, softmax(scores, dim), largest))

    def _sampled(self, owner: str, args: tuple[Any, ...]) -> None:
        for call in reversed(self.calls):
            if call.kernel in SOFTMAX_KERNELS and (owner == call.owner or owner.startswith(f"{call.owner}.")):
                call.samples.append((args[0].detach(), args[1].detach(), bool(args[4])))
                return
        self.calls.append(Call(owner, "grid_sampler_2d", None))

    def _indexed(self, owner: str, args: tuple[Any, ...]) -> None:
        """Whole cells taken by index are sampling at their centres."""
        values, (_, _, y, x) = args
        call = self.calls[-1]
        size = torch.tensor(values.shape[:-3:-1])
        points = (2 * torch.stack([x, y], -1) + 1) / size - 1
        queries = call.weights.shape[1] if call.weights is not None else 1
        call.samples.append((values.detach(), points.unflatten(1, (queries, -1)).double(), False))


def softmax(scores: Tensor, dim: int) -> Tensor:
    """exp(s) / sum exp(s) along ``dim``; rows that are all -inf are zero."""
    top = scores.amax(dim, keepdim=True)
    raised = torch.where(top == -math.inf, torch.zeros_like(scores), (scores - top).exp())
    total = raised.sum(dim, keepdim=True)
    return torch.where(total > 0, raised / total, raised)


def fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Scores of ``_scaled_dot_product_flash_attention_for_cpu`` (masks are additive by then) in float64."""
    query, key = query.detach().double(), key.detach().double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = torch.einsum("bhqc,bhkc->bhqk", query, key) * (scale or query.shape[-1] ** -0.5)
    if attn_mask is not None:
        scores = scores + attn_mask.double()
    if is_causal:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~keep, -math.inf)
    return scores


@contextmanager
def python_paths() -> Iterator[None]:
    """``nn.MultiheadAttention`` in Python, as it runs under the tap."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
