"""What the model saw, as a picture again: the source's normalisation, found by encoding black and white.

Adapters hand over normalised inputs and need not say how they normalised. Every vision preprocessing in
use is affine per channel, so two flat images give offset and scale exactly; a third checks that it is so.
Needed for the black baseline and for the controls that look at edges and colours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch

SIDE = 256
"""Side of the flat images, in pixels; any preprocessing keeps a flat image flat at its centre."""
TOLERANCE = 0.02
"""Of the range between black and white: above 8-bit rounding, below any real non-linearity."""


def channel_levels(source: AttentionSource, batch: Batch) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Input values of black and of white, each ``(channel,)``.

    Raises UsageError where the input is not an affine function of three colour channels.
    """
    black, grey, white = (_level(source, batch, value) for value in (0, 51, 255))
    span = white - black
    if black.shape != (3,) or not np.all(np.abs(span) > 1e-6):
        raise UsageError(f"the input of {source.card.id} is not three colour channels: {black.shape[0]} channels")
    if np.any(np.abs((grey - black) / span - 0.2) > TOLERANCE):
        raise UsageError(f"the input of {source.card.id} is not an affine function of the pixels")
    return black, white


def seen_rgb(source: AttentionSource, batch: Batch) -> NDArray[np.float64]:
    """The inputs as colours in [0, 1], ``(sample, [frame,] channel, y, x)``; rounding may leave it by 1e-2."""
    black, white = (level[:, None, None] for level in channel_levels(source, batch))
    inputs = batch.inputs.detach().double().cpu().numpy()
    return np.asarray((inputs - black) / (white - black))


def _level(source: AttentionSource, like: Batch, value: int) -> NDArray[np.float64]:
    """Input value of a flat grey image at its centre, (channel,)."""
    frames = like.inputs.shape[1:-3]
    pixels = np.full((*frames, SIDE, SIDE, 3), value, np.uint8)
    times = np.arange(frames[0], dtype=np.float64) if frames else None
    batch = source.encode([Sample(id="flat", pixels=pixels, times=times)])
    y, x = batch.geometry[0].to_input(SIDE / 2, SIDE / 2)  # not the input's centre: that may be padding
    centre = batch.inputs[0, ..., int(y), int(x)]
    level = centre.double().cpu().numpy()
    return np.asarray(level[0] if frames else level)
