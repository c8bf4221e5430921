"""SigLIP 2 NaFlex on one fixed grid of patches.

NaFlex gives each photo its own grid, close to its aspect ratio, and pads to ``num_patches`` tokens. Labelled
attention needs one grid a site, so every photo is resized to the same one here: the square of
``num_patches`` (16 x 16 of 256), or ``image_size``. A square photo is then treated exactly as by NaFlex; of
another shape the stretching is in its geometry, and the model card notes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import ModelError
from foveate_vit.contrastive import ContrastiveSource

if TYPE_CHECKING:
    from torch import Tensor

    from foveate_vit.loading import Loaded

NOTE = "NaFlex on one fixed grid: photos that are not square are stretched"


class NaFlexSource(ContrastiveSource):
    """SigLIP 2 NaFlex with prompts; options as :class:`~foveate_vit.contrastive.ContrastiveSource`."""

    def __init__(
        self, loaded: Loaded, family: Any, *, image_size: int | Sequence[int] | None = None, **options: Any
    ) -> None:
        super().__init__(loaded, family, **options)
        self.layout = replace(self.layout, image=self._input_size(image_size))
        self.recipe = self.recipe.at(*self.layout.image)
        self.card = replace(self.card, notes=(*self.card.notes, NOTE))

    def _input_size(self, asked: int | Sequence[int] | None) -> tuple[int, int]:
        patch_y, patch_x = self.layout.patch
        if asked is None:
            side = isqrt(int(self.tower.config.num_patches))
            return side * patch_y, side * patch_x
        height, width = (asked, asked) if isinstance(asked, int) else asked
        if height % patch_y or width % patch_x:
            raise ModelError(
                f"image_size {height} x {width} is not a whole number of {patch_y} x {patch_x} patches",
                remedy=f"for instance {height // patch_y * patch_y} x {width // patch_x * patch_x}",
            )
        return height, width

    def _call(self, module: Any, pixels: Tensor) -> Any:
        samples, _, height, width = pixels.shape
        grid = torch.tensor(self.layout.grid(height, width), device=pixels.device)
        patches = to_patches(pixels, self.layout.patch)
        mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=pixels.device)
        return module(
            pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=grid.expand(samples, 2).contiguous()
        )


def to_patches(pixels: Tensor, patch: tuple[int, int]) -> Tensor:
    """``(sample, channel, y, x)`` as ``(sample, patch, patch_y * patch_x * channel)``, channel fastest."""
    samples, channels, height, width = pixels.shape
    rows, columns = height // patch[0], width // patch[1]
    split = pixels.reshape(samples, channels, rows, patch[0], columns, patch[1])
    return split.permute(0, 2, 4, 3, 5, 1).reshape(samples, rows * columns, -1)
