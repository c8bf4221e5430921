"""Controls for clips: where something moves, and a single moment.

What moves draws every method and every reader, so a map that does not beat plain frame differences has shown that
animals swim. A map with all its weight in one frame asks whether time was needed at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from foveate.attribution.appearance import seen_rgb
from foveate.attribution.reference import lay, pooled, shape_of
from foveate.errors import UsageError
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, BoundTarget


@dataclass(frozen=True)
class Motion(Attribution):
    """Mean absolute difference of colours to the frames before and after; 0 in a clip of one frame."""

    name: ClassVar[str] = "motion"
    citation: ClassVar[str] = "control: frame difference"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Mean difference a cell. Raises UsageError for images."""
        _check_clip(self.name, batch)
        return lay(self, pooled(frame_difference(seen_rgb(source, batch)), source, batch), source, batch, bound)


@dataclass(frozen=True)
class OneFrame(Attribution):
    """One frame cell alike everywhere, the others nothing; ``frame`` counts frame cells (None: the middle one)."""

    name: ClassVar[str] = "one_frame"
    citation: ClassVar[str] = "control: a single moment"
    frame: int | None = None

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Ones in that frame cell. Raises UsageError for images, and where there is no such frame cell."""
        _check_clip(self.name, batch)
        values = np.zeros(shape_of(source, batch))
        count = values.shape[1]
        chosen = count // 2 if self.frame is None else self.frame
        if not -count <= chosen < count:
            raise UsageError(f"one_frame: no frame cell {chosen}, the model's clip has {count}")
        values[:, chosen] = 1.0
        return lay(self, values, source, batch, bound, frame=chosen % count)


def frame_difference(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Change at every pixel, ``(..., frame, channel, y, x)`` to ``(..., frame, y, x)``, in the unit of ``rgb``.

    The mean over channels of the absolute difference to the frame before and to the frame after, averaged; the
    first and the last frame have one neighbour.
    """
    frames = rgb.shape[-4]
    steps = np.abs(np.diff(rgb, axis=-4)).mean(-3)  # (..., frame - 1, y, x)
    total = np.zeros((*rgb.shape[:-3], *rgb.shape[-2:]))
    total[..., 1:, :, :] += steps
    total[..., :-1, :, :] += steps
    neighbours = np.maximum(1, (np.arange(frames) > 0).astype(int) + (np.arange(frames) < frames - 1))
    return np.asarray(total / neighbours[:, None, None])


def _check_clip(name: str, batch: Batch) -> None:
    if batch.inputs.dim() != 5:
        raise UsageError(f"{name}: an image has no frames", remedy="this control is for clips")
