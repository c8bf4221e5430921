"""Clips in: every frame resized alike, normalised, padded with zeros at the bottom and the right.

The published models see frames whose short side is ``shortest_edge`` (480; at most :data:`LONGEST` on the long
one), minus the ImageNet mean, over its deviation, in units of 0 to 255, and padded to a multiple of 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import SampleError
from foveate.pretrained.preprocess import Recipe
from foveate_dvis.clip_preprocess import ClipRecipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import Geometry
    from foveate.interfaces import Sample
    from foveate_dvis.daq.config import DaqConfig

LONGEST = 1333
"""Upstream's MAX_SIZE_TEST, detectron2's default."""
_BILINEAR = 2  # PIL.Image.Resampling


@dataclass(frozen=True, eq=False)
class EncodedClips:
    """``inputs`` float32 (sample, frame, channel, y, x); ``frame_index`` int64 (sample, frame), -1 where a clip is
    over; one geometry a sample.
    """

    inputs: NDArray[np.float32]
    frame_index: NDArray[np.int64]
    geometry: tuple[Geometry, ...]


@dataclass(frozen=True)
class DaqRecipe:
    """The rule; ``canvas`` (height, width) pads every clip to one size, None to the least that fits."""

    clip: ClipRecipe
    divisor: int
    canvas: tuple[int, int] | None = None

    @classmethod
    def of(
        cls, config: DaqConfig, *, shortest_edge: int | None = None, canvas: tuple[int, int] | None = None
    ) -> DaqRecipe:
        """``shortest_edge``: None as published, 0 leaves frames at their own size."""
        edge = config.shortest_edge if shortest_edge is None else shortest_edge
        frame = Recipe(
            "DVIS-DAQ",
            edge=edge or None,
            longest=LONGEST,
            resample=_BILINEAR,
            rescale=None,
            mean=config.pixel_mean,
            std=config.pixel_std,
        )
        return cls(ClipRecipe(frame), config.divisor, canvas)

    def __call__(self, samples: Sequence[Sample]) -> EncodedClips:
        """Clips of one size; shorter ones are filled up with frames that are not read. Raises SampleError."""
        made = [self._one(sample) for sample in samples]
        sizes = {self._padded(values.shape[-2:]) for values, _ in made}
        if len(sizes) > 1:
            raise SampleError(
                f"clips of {len(sizes)} sizes in one batch: {sorted(sizes)} (height, width, after resizing)",
                remedy="encode one clip at a time, or open the model with canvas=(height, width)",
            )
        height, width = sizes.pop() if sizes else (self.divisor, self.divisor)
        longest = max((len(values) for values, _ in made), default=0)
        inputs = np.zeros((len(made), longest, 3, height, width), np.float32)
        index = np.full((len(made), longest), -1, np.int64)
        for i, (values, _) in enumerate(made):
            inputs[i, : len(values), :, : values.shape[-2], : values.shape[-1]] = values
            index[i, : len(values)] = np.arange(len(values))
        geometry = (replace(placed, input_height=height, input_width=width) for _, placed in made)
        return EncodedClips(inputs, index, tuple(geometry))

    def _one(self, sample: Sample) -> tuple[NDArray[np.float32], Geometry]:
        try:
            values, geometry = self.clip(sample.pixels)
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error.message}", remedy=error.remedy) from error
        size, room = values.shape[-2:], self.canvas
        if room is not None and (size[0] > room[0] or size[1] > room[1]):
            raise SampleError(
                f"sample {sample.id!r}: resized to {size} (height, width), the canvas is {room}",
                remedy="open the model with a larger canvas=(height, width)",
            )
        return values, geometry

    def _padded(self, size: Sequence[int]) -> tuple[int, int]:
        height, width = self.canvas or size
        return -(-height // self.divisor) * self.divisor, -(-width // self.divisor) * self.divisor
