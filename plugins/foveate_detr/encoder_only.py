"""Detectors without a decoder: YOLOS, whose object queries are tokens of a plain vision transformer.

The tokens are cls, patches, then one detection token an object query; all of them attend to each other in one
site. YOLOS takes no padding mask, so images of one batch must have one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foveate.interfaces import Batch, TokenAxis
from foveate_detr.detections import Detections
from foveate_detr.detector import ENCODER, TOKENS, DetectorSource
from foveate_detr.preprocess import SteppedRecipe

if TYPE_CHECKING:
    from torch import Tensor

    from foveate_detr.preprocess import PaddedRecipe


class EncoderDetectorSource(DetectorSource):
    """YOLOS; options as :class:`DetectorSource`. For mixed shapes give ``image_size``."""

    def _recipe(self, loaded: Any, image_size: Any, canvas: Any) -> PaddedRecipe:
        padded = super()._recipe(loaded, image_size, canvas)
        step = int(loaded.model.config.patch_size)
        return replace(padded, recipe=SteppedRecipe.over(padded.recipe, step, up=False), pads=False)

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {}

    def _query_count(self) -> int:
        return int(self._module.config.num_detection_tokens)

    @property
    def strides(self) -> tuple[float, ...]:
        """The patch."""
        return (float(self._patch()),)

    def _patch(self) -> int:
        size = self._module.config.patch_size
        return int(size if isinstance(size, int) else size[0])

    def levels(self, batch: Batch) -> list[tuple[int, int]]:
        """Whole patches only: pixels beyond the last one are not seen."""
        height, width = batch.inputs.shape[-2:]
        return [(height // self._patch(), width // self._patch())]

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        rows, columns = self.levels(batch)[0]
        side = self._patch()
        patches = TokenAxis.patches(rows, columns, height=float(rows * side), width=float(columns * side))
        objects = TokenAxis.of_kind("object", self._query_count())
        return TokenAxis.concat(TokenAxis.of_kind("cls", 1), patches, objects)

    def _reading_site(self) -> str:
        return ENCODER

    def _reading_row(self, chosen: Tensor, batch: Batch) -> Tensor:
        rows, columns = self.levels(batch)[0]
        return chosen + 1 + rows * columns

    def _readout_width(self, found: Detections, batch: Batch) -> int:
        return len(self._stream_tokens(TOKENS, batch, None))
