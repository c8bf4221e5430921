"""Relevance by layer-wise propagation, weighted by gradients: Chefer, Gur and Wolf, CVPR 2021, arXiv:2012.09838.

With R_A the relevance that rules of :mod:`foveate.attribution.lrp` bring to a layer's attention weights A, and dA
the gradient of the score there, each layer gives I + mean_h (dA * R_A)+, and the map is the readout's row of the
product over layers (sec. 3.3). Defined for plain vision transformers: one stream of tokens, self-attention only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from foveate.attribution.attention import on_cells
from foveate.attribution.clips import frame_count, frames_of
from foveate.attribution.lrp.operations import SOFTMAXES
from foveate.attribution.lrp.propagation import relevance_at
from foveate.attribution.lrp.recording import Operation, Recording, recording
from foveate.attribution.objective import Objective
from foveate.attribution.pixels import Cost
from foveate.attribution.plain import plain_steps
from foveate.capture.claims import Claims
from foveate.errors import CaptureError
from foveate.interfaces import Attribution, AttributionMap, CallKey

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, BoundTarget

INSTEAD = "use chefer_iccv21, which follows attention through any flow"


@dataclass(frozen=True)
class CheferCVPR21(Attribution):
    """Relevance of the LRP variant, each target row on its own, rules in float64.

    Needs no code of the model, only torch operations that have a rule: UsageError names the first that has none.
    """

    name: ClassVar[str] = "chefer_cvpr21"
    citation: ClassVar[str] = "Chefer, Gur & Wolf, CVPR 2021, arXiv:2012.09838, sec. 3"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """The readout's row over patches. Raises UsageError for models that are not plain ViTs."""
        objective, cells = Objective(source, batch, bound), source.cells(batch)
        maps = [_map(source, *_single(objective, row)) for row in range(len(objective))]
        info = {"citation": self.citation, "scale": bound.scale, "forward_passes": 1, "backward_passes": 1}
        info |= {"frame_cells": objective.frames} if objective.frames else {}
        return AttributionMap(self.name, np.concatenate(maps).astype(np.float32), cells, info=info)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward and one backward pass, and float64 values and rules that take about three times as long."""
        return Cost(4, 4)


def _single(objective: Objective, row: int) -> tuple[Batch, BoundTarget]:
    """One target row as a batch of one: the rule for sums adds up whole tensors."""
    batch, bound = objective.batch, objective.bound.take([row])
    return batch.replace(batch.inputs[row : row + 1].clone().requires_grad_(), [row]), bound


def _map(source: AttentionSource, batch: Batch, bound: BoundTarget) -> NDArray[np.float64]:
    """``(1, [frame,] y, x)``."""
    with recording(source.module, batch.inputs) as recorded:
        outputs = source.forward(batch, grad=True)
        score = source.score(outputs, batch, bound)
    with torch.no_grad():
        steps = plain_steps(source, batch, outputs, method=CheferCVPR21.name, instead=INSTEAD)
        layers = attention_operations(source, recorded, steps)
        weights = source.readout(batch, outputs, bound)[steps[0].site].weights
        row = swept(relevant_attention(recorded, score, layers), weights.to(score.device, torch.float64))
        tokens, frames = source.label(steps[0], batch, outputs).key, frame_count(frames_of(source, batch)) or None
        return on_cells(row, tokens, source.cells(batch), frames=frames, method=CheferCVPR21.name)


def relevant_attention(recorded: Recording, score: Tensor, layers: list[Operation]) -> list[Tensor]:
    """mean_h (dA * R_A)+ of each layer, float64 ``(query, key)`` (sec. 3.3)."""
    relevance = relevance_at(recorded, score, layers)
    slopes = torch.autograd.grad(score, [layer.results[0] for layer in layers], torch.ones_like(score))
    joined = [(slope.double() * r).clamp(min=0) for slope, r in zip(slopes, relevance, strict=True)]
    return [layer.reshape(-1, *layer.shape[-2:]).mean(0) for layer in joined]


def swept(layers: list[Tensor], row: Tensor) -> Tensor:
    """``row (1, token)`` of the product of I + layer, last layer first (sec. 3.3)."""
    for layer in reversed(layers):
        row = row + row @ layer
    return row


def attention_operations(source: AttentionSource, recorded: Recording, steps: list[CallKey]) -> list[Operation]:
    """The softmax of each call, found by the module that made it. CaptureError where one was not seen."""
    claims, seen = Claims(source), Counter[tuple[str, int]]()
    found: dict[CallKey, Operation] = {}
    for operation in recorded.operations:
        claim = claims.find(operation.owner) if operation.name in SOFTMAXES else None
        if claim is not None:
            place = (claim[0].id, claim[1])
            found[CallKey(*place, seen[place])] = operation
            seen[place] += 1
    missing = [tuple(step) for step in steps if step not in found]
    if missing:
        raise CaptureError(
            f"chefer_cvpr21: no softmax seen in {missing[:4]} of {source.card.id}",
            remedy="attention in flash-attn, xformers or flex kernels cannot be seen: use SDPA or eager attention",
        )
    return [found[step] for step in steps]
