"""Detectors that read several feature maps at once through deformable attention.

Deformable DETR, RT-DETR, D-FINE and RF-DETR flatten a pyramid into one stream of tokens, level after level, and
each object query samples it at a few points. Which levels there are, and in which order, is learned from the
model itself: from the sampling calls of one forward on a blank image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from foveate.capture.deformable import DeformableRecord
from foveate.capture.tap import Tap
from foveate.errors import ModelError
from foveate.interfaces import Batch, OpaqueStep, Step, TokenAxis
from foveate_detr.detector import QUERIES, TOKENS, DetectorSource

if TYPE_CHECKING:
    from collections.abc import Sequence

AIFI = "encoder.coarsest"
"""Stream of RT-DETR's only encoder attention: the cells of its coarsest feature map."""
BACKBONE = "backbone.tokens"


class PyramidSource(DetectorSource):
    """A detector with deformable attention over a pyramid; options as :class:`DetectorSource`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        _ = self.strides  # now, because the engine's own work (labels among it) is unseen by every tap

    def _measure_levels(self, side: int) -> list[tuple[int, int]]:
        return sampled_levels(self, self._blank(side))

    def _tokens(self, batch: Batch) -> TokenAxis:
        return pyramid_tokens(self.levels(batch), batch)

    def _looks_from_corners(self) -> bool:
        """Levels are taken to tile the input: necks mix maps of different strides."""
        return False

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        if stream == AIFI:
            level = int(self._module.config.encode_proj_layers[-1])
            return pyramid_tokens(self.levels(batch), batch, only=level)
        return super()._stream_tokens(stream, batch, outputs)

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """As declared; where a convolutional neck lies between encoder and decoder it is an opaque step."""
        steps = super().flow(batch, outputs)
        neck = self._layout.get("neck")
        if not neck:
            return steps
        first = next(i for i, step in enumerate(steps) if getattr(step, "query", None) == QUERIES)
        return [*steps[:first], OpaqueStep(TOKENS, str(neck)), *steps[first:]]


def sampled_levels(source: DetectorSource, batch: Batch) -> list[tuple[int, int]]:
    """(rows, columns) of each level that the first deformable call of a forward samples, in its order."""
    with torch.no_grad(), Tap(source.module) as tap:
        source.forward(batch)
    for record in tap.records:
        if isinstance(record, DeformableRecord):
            return [level.size for level in record.levels]
    raise ModelError(
        f"{type(source.module).__name__}: no deformable attention was seen",
        remedy="deformable attention in a compiled kernel cannot be seen: use the model's plain PyTorch one",
    )


def pyramid_tokens(levels: Sequence[tuple[int, int]], batch: Batch, only: int | None = None) -> TokenAxis:
    """Cells of each level, one level after the other, tiling the input; or the cells of one level."""
    height, width = (float(size) for size in batch.inputs.shape[-2:])
    parts = [
        TokenAxis.patches(rows, columns, height=height, width=width, level=number)
        for number, (rows, columns) in enumerate(levels)
        if only in (None, number)
    ]
    return TokenAxis.concat(*parts)
