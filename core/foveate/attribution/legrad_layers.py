"""LeGrad as published: each layer's own tokens are scored by the final norm and head.

``legrad`` differentiates the model's own score at every layer. The paper (Bousselham et al. 2024,
arXiv:2404.03214) differentiates s^l, the score that the head gives when it reads the tokens of layer l, with
respect to that layer's attention alone. The two agree at the last layer. One forward and backward pass a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from foveate.attribution.attention import on_cells
from foveate.attribution.clips import frame_count, frames_of
from foveate.attribution.early_exit import answering_from, blocks_of
from foveate.attribution.objective import Objective
from foveate.attribution.pixels import Cost
from foveate.attribution.plain import plain_steps
from foveate.errors import CaptureError
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foveate.capture.trace import Trace
    from foveate.interfaces import AttentionSource, Batch, BoundTarget, CallKey


@dataclass(frozen=True)
class LeGradLayers(Attribution):
    """Mean over layers l, heads and queries of relu(ds^l / dA^l). Plain ViTs whose blocks are one list."""

    name: ClassVar[str] = "legrad_layers"
    citation: ClassVar[str] = "Bousselham et al. 2024, arXiv:2404.03214, each layer scored by the final head"
    rows: int | None = None

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Raises UsageError for other models, CaptureError where the head reads more than the last block."""
        objective = Objective(source, batch, bound, rows=self.rows)
        made = [self._block(source, block.batch, block.bound) for block in objective.blocks()]
        depth = made[0][1]
        fixed = {"citation": self.citation, "scale": bound.scale, "seed": seed, "rows": self.rows}
        info = {**fixed, "forward_passes": depth, "backward_passes": depth}
        info |= {"frame_cells": objective.frames} if objective.frames else {}
        values = np.concatenate([values for values, _ in made]).astype(np.float32)
        return AttributionMap(self.name, values, source.cells(batch), info=info)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward and backward pass a layer, of twelve layers: the depth is the model's."""
        return Cost(12, 12)

    def _block(self, source: AttentionSource, batch: Batch, bound: BoundTarget) -> tuple[NDArray[np.float64], int]:
        """Maps ``(target, [frame,] y, x)`` of a batch with one sample a target row, and the number of layers."""
        from foveate.capture.gradient_maps import legrad
        from foveate.capture.trace import trace

        whole = trace(source, batch, grad=True)
        instead = "use legrad, which needs the model's own score only"
        steps = plain_steps(source, whole.batch, whole.outputs, method=self.name, instead=instead)
        layers = [legrad(whole, bound, calls=steps[-1:], keep_graph=False)]
        tokens = whole.labels(steps[-1]).key
        site = next(site for site in source.sites if site.id == steps[0].site)
        blocks = blocks_of(source.module, site) if len(steps) > 1 else {}
        for number, step in enumerate(steps[:-1]):
            with answering_from(blocks, step.layer):
                early = trace(source, batch, grad=True)
            layers.append(_layer(early, bound, step, steps[number + 1 :]))
        mean = torch.stack(layers).mean(0)
        frames = frame_count(frames_of(source, batch)) or None
        return on_cells(mean, tokens, source.cells(batch), frames=frames, method=self.name), len(steps)


def _layer(early: Trace, bound: BoundTarget, step: CallKey, later: Sequence[CallKey]) -> Tensor:
    """relu(ds^l / dA^l) over tokens ``(target, token)``, once it is sure that s^l is a score of layer l."""
    from foveate.capture.gradient_maps import legrad
    from foveate.capture.gradients import gradient_rounds

    reached = set(next(gradient_rounds(early, bound, calls=[step, *later])).gradients)
    if reached != {step}:
        seen = ", ".join(str(call.layer) for call in sorted(reached)) or "no layer"
        raise CaptureError(
            f"legrad_layers: the score of layer {step.layer}'s tokens depends on the attention of {seen}: "
            "the head reads something else than the last block's tokens",
            remedy="use legrad, which needs the model's own score only",
        )
    return legrad(early, bound, calls=[step], keep_graph=False)
