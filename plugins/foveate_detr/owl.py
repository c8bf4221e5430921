"""OWLv2: an open-vocabulary detector in which every patch of a CLIP-like encoder proposes one object.

The text enters through the target alone: prompts are embedded by the text tower and compared with each patch's
class embedding. The objects are the patches, so "object 17" is patch 17, and it reads with its own token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.geometry import Geometry
from foveate.interfaces import Batch, TokenAxis
from foveate_detr.detections import Detections
from foveate_detr.detector import ENCODER, DetectorSource
from foveate_detr.preprocess import PaddedRecipe
from foveate_detr.prompts import clip_ids, read_prompts
from foveate_vit.preprocess import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class PaddedSquare(Recipe):
    """Padding to a square with black at the bottom and right, then resizing to ``exact``.

    Resizing is a Gaussian of sigma (factor - 1) / 2 followed by linear interpolation, clipped to the image's
    range: OWLv2's processor, and ``skimage.transform.resize``.
    """

    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Geometry]:
        """One image, uint8 ``(y, x, channel)``, as float32 ``(channel, y, x)``, with its exact geometry."""
        checked, _ = Recipe(self.processor, rescale=self.rescale)(pixels)  # refuses what is no RGB image
        height, width = pixels.shape[:2]
        side = max(height, width)
        square = np.zeros((side, side, 3), np.float32)
        square[:height, :width] = checked.transpose(1, 2, 0)
        rows, columns = self.exact or (side, side)
        values = self._normalise_scaled(_smooth_resize(square, rows, columns))
        geometry = Geometry(height, width, rows, columns, rows / side, columns / side)
        return np.ascontiguousarray(values.transpose(2, 0, 1)), geometry

    def _normalise_scaled(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return replace(self, rescale=None)._normalise(values)


def _smooth_resize(values: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    from scipy import ndimage

    factors = np.array([values.shape[0] / rows, values.shape[1] / columns, 1.0])
    smooth = ndimage.gaussian_filter(values, np.maximum(0, (factors - 1) / 2), mode="mirror")
    resized = ndimage.zoom(smooth, 1 / factors, order=1, mode="mirror", grid_mode=True)
    return np.asarray(np.clip(resized, values.min(), values.max()), np.float32)


class OwlSource(DetectorSource):
    """OWLv2 (and OWL-ViT's successor checkpoints of the same class).

    Options: those of :class:`DetectorSource`, ``prompts`` and ``prompt_ids``, as for Grounding DINO. Its scores
    are low: the authors use ``threshold=0.1``, which is the default here.
    """

    options = (*DetectorSource.options, "prompts", "prompt_ids")

    def __init__(
        self,
        loaded: Any,
        family: Any,
        *,
        prompts: Sequence[str] | Path | str | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        threshold: float = 0.1,
        **options: Any,
    ) -> None:
        self._prompts = read_prompts(prompts)
        self._ids = clip_ids(loaded, self._prompts, prompt_ids)
        super().__init__(loaded, family, threshold=threshold, **options)

    @property
    def labels(self) -> list[str]:
        """The prompts."""
        return list(self._prompts)

    def _recipe(self, loaded: Any, image_size: Any, canvas: Any) -> PaddedRecipe:
        padded = super()._recipe(loaded, image_size, canvas)
        recipe = PaddedSquare(**{f.name: getattr(padded.recipe, f.name) for f in fields(Recipe)})
        side = int(loaded.model.config.vision_config.image_size)
        return replace(padded, recipe=replace(recipe, exact=(side, side), edge=None, crop=None), pads=False)

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        ids = self._ids.to(mask.device)
        return {"input_ids": ids.expand(len(mask), *ids.shape)}  # (sample, prompt, token)

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The model's own output; it takes the prompts of all samples in one axis."""
        ids = batch.per_sample["input_ids"].flatten(0, 1)
        with torch.set_grad_enabled(grad):
            return self._module(pixel_values=batch.inputs, input_ids=ids, attention_mask=(ids > 0).to(ids.dtype))

    def _query_count(self) -> int:
        rows, columns = self._grid()
        return rows * columns

    @property
    def strides(self) -> tuple[float, ...]:
        """The patch."""
        return (float(self._module.config.vision_config.patch_size),)

    def _grid(self) -> tuple[int, int]:
        config = self._module.config.vision_config
        side = int(config.image_size) // int(config.patch_size)
        return side, side

    def levels(self, batch: Batch) -> list[tuple[int, int]]:
        """Whole patches."""
        return [self._grid()]

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        return TokenAxis.concat(TokenAxis.of_kind("cls", 1), self._tokens(batch))

    def _reading_site(self) -> str:
        return ENCODER

    def _reading_row(self, chosen: Tensor, batch: Batch) -> Tensor:
        return chosen + 1

    def _readout_width(self, found: Detections, batch: Batch) -> int:
        return found.queries + 1
