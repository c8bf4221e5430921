"""The pictures of a recording: as samples on disk, and again as the input that the recorded model read.

A recording holds the pictures as the model was given them (after the resize of its own preprocessing). They are
samples as they are; the user's own clip before that resize is a sample too, once it is recognised.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import SampleError
from foveate.geometry import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import Sample
    from foveate_dvis.recording import Recording

DIFFERENCE = 8.0
"""Mean grey levels by which a clip may differ from the recorded one after resizing: other decoders and filters."""


def write_pictures(recording: Recording, folder: Path) -> Path:
    """Lossless files: ``folder/<name>/00000.png`` ... of a clip, ``folder/<name>.png`` of an image; the sample."""
    from PIL import Image

    name, clip = recording.path.stem, recording.meta["media"] == "clip"
    place = folder / name if clip else folder
    place.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(recording.frames):
        Image.fromarray(picture).save(place / (f"{i:05d}.png" if clip else f"{name}.png"))
    return place if clip else place / f"{name}.png"


def geometry_of(recording: Recording, sample: Sample) -> Geometry:
    """How a sample became the recorded input. Raises SampleError where it is not the recorded clip or image."""
    pixels = sample.pixels if sample.is_clip else sample.pixels[None]
    recorded = recording.frames
    if len(pixels) != len(recorded):
        raise SampleError(
            f"{sample.id}: {len(pixels)} frames, but {recording.path.name} recorded {len(recorded)}",
            remedy="give the frames that the model read, all of them and no others (--frames)",
        )
    size, shown = pixels.shape[1:3], recorded.shape[1:3]
    if size not in (shown, recording.original):
        raise SampleError(
            f"{sample.id}: pictures of {size[0]} x {size[1]} (height x width), but {recording.path.name} recorded "
            f"{shown[0]} x {shown[1]}, resized from {recording.original[0]} x {recording.original[1]}"
        )
    off = _difference(pixels, recorded)
    if off > DIFFERENCE:
        raise SampleError(
            f"{sample.id}: differs from the pictures of {recording.path.name} by {off:.0f} grey levels on average",
            remedy="give the clip that was recorded; if its colours are swapped, record with channels='BGR'",
        )
    height, width = recording.padded
    return Geometry(size[0], size[1], height, width, shown[0] / size[0], shown[1] / size[1])


def _difference(pixels: NDArray[np.uint8], recorded: NDArray[np.uint8]) -> float:
    """Mean absolute difference, in grey levels, of the frame that differs most."""
    from PIL import Image

    height, width = recorded.shape[1:3]
    worst = 0.0
    for mine, theirs in zip(pixels, recorded, strict=True):
        if mine.shape != theirs.shape:
            mine = np.asarray(Image.fromarray(mine).resize((width, height), Image.Resampling.BILINEAR))
        worst = max(worst, float(np.abs(mine.astype(np.int16) - theirs).mean()))
    return worst
