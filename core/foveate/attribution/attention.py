"""Attention's own maps: what the capture engine computes, laid on the model's cells (of clips, frame by frame).

The mathematics (readout rows, rollout, relevance, attention gradients) is :mod:`foveate.capture`'s; here
each becomes an :class:`~foveate.interfaces.Attribution`, so that it is scored by the same rules as every
other explanation. None of them is signed: attention says where, not which way.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch

from foveate.attribution.clips import frame_count
from foveate.attribution.levels import tokens_on_cells
from foveate.attribution.objective import Objective
from foveate.attribution.pixels import Cost
from foveate.attribution.readout_rows import readout_rows
from foveate.capture.streams import stream_tokens
from foveate.errors import UsageError
from foveate.interfaces import Attribution, AttributionMap, CallKey, OpaqueStep, TokenAxis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foveate.capture.trace import Trace
    from foveate.geometry import CellGrid
    from foveate.interfaces import AttentionSource, Batch, BoundTarget


@dataclass(frozen=True)
class AttentionMethod(Attribution):
    """A map over key tokens from one traced forward (and one backward where ``needs_gradients``)."""

    rows: int | None = None
    needs_gradients: ClassVar[bool] = False

    @abstractmethod
    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """Values ``(target, token)`` of one trace whose sample ``j`` is target row ``j``, and the tokens."""

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Token values on the model's cells; tokens without a place are left out, nothing is rescaled.

        ``info["opaque_steps"]`` names what mixes tokens in a way that attention does not describe.
        """
        from foveate.capture.trace import trace

        objective = Objective(source, batch, bound, rows=self.rows)
        cells, parts = source.cells(batch), []
        frames = frame_count(objective.frames) or None
        opaque: tuple[str, ...] = ()
        for block in objective.blocks():
            traced = trace(source, block.batch, grad=self.needs_gradients)
            values, tokens = self.tokens(traced, block.bound)
            parts.append(on_cells(values, tokens, cells, frames=frames, method=self.name))
            opaque = tuple(step.name for step in traced.flow if isinstance(step, OpaqueStep))
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        fixed = {"citation": self.citation, "scale": bound.scale, "seed": seed, "opaque_steps": opaque}
        info = {**options, **fixed, "forward_passes": 1, "backward_passes": int(self.needs_gradients)}
        info |= {"frame_cells": objective.frames} if frames else {}
        return AttributionMap(self.name, np.concatenate(parts).astype(np.float32), cells, info=info)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward pass, and one backward pass where gradients are needed."""
        return Cost(1, int(self.needs_gradients))


@dataclass(frozen=True)
class ReadoutAttention(AttentionMethod):
    """The attention row that the answer is read from: CLS, a pooling query, or a weighted mean of queries.

    Of a model that attends within frames, there is a row a frame: each sums to 1 within its own frame.
    ``layer`` counts as in a list over the layers of that site (-1 is the last) or is "mean"; ``head`` is a
    number or "mean". It depends on the target only where the source reads each target elsewhere.
    """

    name: ClassVar[str] = "readout"
    citation: ClassVar[str] = "the softmax row itself: Vaswani et al. 2017, arXiv:1706.03762, eq. 1"
    layer: int | Literal["mean"] = -1
    head: int | Literal["mean"] = "mean"

    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """Readout weights times attention, one layer or the mean of layers, heads likewise."""
        site, readout = next(iter(trace.readout(bound).items()))
        layers = [self._row(trace, calls, readout.weights) for calls in self._calls(trace, site)]
        return torch.stack([values for values, _ in layers]).mean(0), layers[-1][1]

    def _row(
        self, trace: Trace, calls: Sequence[CallKey], weights: torch.Tensor
    ) -> tuple[torch.Tensor, TokenAxis]:
        """(target, key) of one layer."""
        heads, tokens = readout_rows(trace, calls, weights, method=self.name)
        if self.head == "mean":
            return heads.mean(1), tokens
        if not -heads.shape[1] <= self.head < heads.shape[1]:
            raise UsageError(f"readout: no head {self.head} among {heads.shape[1]} heads of {calls[0].site}")
        return heads[:, self.head], tokens

    def _calls(self, trace: Trace, site: str) -> list[list[CallKey]]:
        """All calls of each of the wanted layers."""
        by_layer: dict[int, list[CallKey]] = {}
        for call in trace.records:
            if call.site == site:
                by_layer.setdefault(call.layer, []).append(call)
        layers = [by_layer[layer] for layer in sorted(by_layer)]
        if self.layer == "mean":
            return layers
        if not -len(layers) <= self.layer < len(layers):
            raise UsageError(f"readout: no layer {self.layer} among {len(layers)} layers of {site}")
        return [layers[self.layer]]


@dataclass(frozen=True)
class Rollout(AttentionMethod):
    """Attention followed from the readout through all layers to the patches, with the residual stream.

    ``residual`` is the share of each layer's input that passes unchanged; heads are joined by ``fuse``.
    """

    name: ClassVar[str] = "rollout"
    citation: ClassVar[str] = "Abnar & Zuidema 2020, arXiv:2005.00928, eq. 1"
    residual: float = 0.5
    fuse: Literal["mean", "max", "min"] = "mean"

    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """The readout's row of the product of all layers."""
        from foveate.capture.rollout import rollout

        return rollout(trace, bound, residual=self.residual, fuse=self.fuse), bottom_tokens(trace)


@dataclass(frozen=True)
class GradAttention(AttentionMethod):
    """Attention of the last layer times its gradient, positive part, mean over heads, at the readout row."""

    name: ClassVar[str] = "grad_attention"
    citation: ClassVar[str] = "Chefer, Gur & Wolf 2021, arXiv:2103.15679, sec. 3, on the last layer alone"
    needs_gradients: ClassVar[bool] = True

    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """One layer of the relevance rule."""
        from foveate.capture.gradient_maps import grad_attention

        return grad_attention(trace, bound, keep_graph=False), bottom_tokens(trace)


@dataclass(frozen=True)
class CheferICCV21(AttentionMethod):
    """Relevance of Chefer, Gur and Wolf: gradient-weighted attention, positive, accumulated over layers."""

    name: ClassVar[str] = "chefer_iccv21"
    citation: ClassVar[str] = "Chefer, Gur & Wolf, ICCV 2021, arXiv:2103.15679, sec. 3"
    needs_gradients: ClassVar[bool] = True

    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """The readout's row of the relevance matrix."""
        from foveate.capture.relevance import relevance

        return relevance(trace, bound, rule="chefer_iccv21", keep_graph=False), bottom_tokens(trace)


@dataclass(frozen=True)
class LeGrad(AttentionMethod):
    """Positive gradients of the attention weights, mean over heads, queries and layers; no product with A.

    A variant of the paper's: the model's own score at every layer. ``legrad_layers`` scores each layer's tokens.
    """

    name: ClassVar[str] = "legrad"
    citation: ClassVar[str] = "after Bousselham et al. 2024, arXiv:2404.03214, with the model's own score"
    needs_gradients: ClassVar[bool] = True

    def tokens(self, trace: Trace, bound: BoundTarget) -> tuple[torch.Tensor, TokenAxis]:
        """Mean over layers of what each key's column of gradients adds up to."""
        from foveate.capture.gradient_maps import legrad

        return legrad(trace, bound, keep_graph=False), bottom_tokens(trace)


def bottom_tokens(trace: Trace) -> TokenAxis:
    """The tokens of the stream at the bottom of the flow. Raises UsageError where no attention reads it."""
    for step in trace.flow:
        if getattr(step, "key", None) == trace.stream:
            return stream_tokens(trace.labels(step.call))  # type: ignore[union-attr]  # only AttentionStep has one
    raise UsageError(f"no attention step of {trace.source.card.id} reads its bottom stream {trace.stream!r}")


def on_cells(
    values: torch.Tensor,
    tokens: TokenAxis,
    cells: CellGrid,
    *,
    frames: int | None = None,
    method: str = "attention",
) -> NDArray[np.float64]:
    """Token values ``(target, token)`` on the model's cells ``(target, y, x)``, by area where grids differ.

    With ``frames`` frame cells (clips) ``(target, frame, y, x)``. Raises UsageError where the tokens are no grids.
    """
    array = values.detach().double().cpu().numpy()
    if frames is None:
        return tokens_on_cells(array, tokens, cells)
    try:
        return tokens_on_cells(array, tokens, cells, frames=frames)
    except ValueError as error:
        raise UsageError(
            f"{method}: {error}",
            remedy="these tokens lie on no picture: use 'rollout' or a gradient or perturbation method",
        ) from error
