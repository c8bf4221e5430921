"""Clips as samples: whatever holds the frames, the chosen ones, their times and masks, a piece at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from foveate.data import videos
from foveate.data.frame_files import index_animation, index_folder
from foveate.data.images import SUFFIXES as IMAGES
from foveate.data.masks import open_masks
from foveate.data.sampling import Selection
from foveate.errors import SampleError
from foveate.interfaces import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.masks import Masks

MAX_CLIP_GB = 4.0
"""Largest clip that is decoded whole, in GB of RGB; ``$FOVEATE_MAX_CLIP_GB`` overrides it."""


class Frames(Protocol):
    """What holds frames: a video, a folder, an animated image."""

    @property
    def frames(self) -> int:
        """How many there are."""

    @property
    def times(self) -> NDArray[np.float64] | None:
        """Seconds of each, or None."""

    @property
    def height(self) -> int:
        """Rows of pixels."""

    @property
    def width(self) -> int:
        """Columns of pixels."""

    @property
    def sha256(self) -> str:
        """Hash of the file or files."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person might not expect."""

    def read(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at ascending positions, each uint8 ``(y, x, 3)``."""


def open_frames(path: Path | str) -> Frames:
    """The frames behind a path: a folder of images, an animated image, or a video. Raises SampleError."""
    place = Path(path)
    if place.is_dir():
        return index_folder(place)
    if place.suffix.lower() in IMAGES:
        return index_animation(place)
    return videos.index_video(place)


def most_frames(path: Path | str, selection: Selection) -> int:
    """An upper bound of the frames of a sample, without decoding a video. 0 where it cannot be read."""
    place = Path(path)
    is_video = not place.is_dir() and place.suffix.lower() not in IMAGES
    try:
        if is_video and selection.window is None:
            count = videos.count_at_most(place)
        else:
            frames = open_frames(place)
            count = selection.positions(
                frames.frames, selection.times(frames.frames, frames.times), str(place)
            ).size
    except SampleError:
        return 0
    return min(count, selection.sampling.frames or count)


@dataclass(frozen=True, eq=False)
class Clip:
    """The chosen frames of one sample, opened but not decoded. ``positions`` are frame numbers of the file."""

    id: str
    path: Path
    source: Frames
    positions: NDArray[np.intp]
    times: NDArray[np.float64] | None
    masks: Masks | None = None
    columns: Mapping[str, object] = field(default_factory=dict)

    @property
    def frames(self) -> int:
        """How many frames the sample has."""
        return int(self.positions.size)

    @property
    def sha256(self) -> str:
        """Of the file; where only some of its frames are chosen, of the file's hash and their numbers."""
        if self.frames == self.source.frames:
            return self.source.sha256
        chosen = ",".join(map(str, self.positions.tolist()))
        return hashlib.sha256(f"{self.source.sha256} frames {chosen}".encode()).hexdigest()

    def read(self, start: int = 0, stop: int | None = None) -> Sample:
        """Frames ``start`` to ``stop`` (excluded) as a Sample. Raises SampleError.

        ``times`` and ``mask`` go with them; ``columns["notes"]`` says what was done to the file.
        """
        part = self.positions[start:stop]
        self._check_size(part.size)
        pixels = np.empty((part.size, self.source.height, self.source.width, 3), np.uint8)
        for i, frame in enumerate(self.source.read(part.tolist())):
            pixels[i] = frame
        columns = dict(self.columns)
        if self.source.notes:
            columns["notes"] = "; ".join(self.source.notes)
        times = None if self.times is None else self.times[start:stop]
        mask = None if self.masks is None else self.masks.read(part)
        return Sample(self.id, pixels, self.sha256, str(self.path), times=times, mask=mask, columns=columns)

    def _check_size(self, count: int) -> None:
        needed = count * self.source.height * self.source.width * 3
        limit = _byte_limit()
        if needed > limit:
            raise SampleError(
                f"clip {self.path}: {count} frames of {self.source.width} x {self.source.height} are"
                f" {needed / 1e9:.1f} GB decoded, over the limit of {limit / 1e9:g} GB",
                remedy="read it in windows (--window 32), take fewer frames (--frames, --stride, --fps), or set"
                " FOVEATE_MAX_CLIP_GB higher",
            )


def open_clip(
    name: str,
    path: Path,
    selection: Selection,
    columns: Mapping[str, object] | None = None,
    mask: Path | None = None,
) -> Clip:
    """A sample's clip, its frames chosen and found, none decoded for good. Raises SampleError."""
    source = open_frames(path)
    times = selection.times(source.frames, source.times)
    positions = selection.positions(source.frames, times, f"clip {path}")
    masks = None if mask is None else open_masks(mask, source.frames, (source.height, source.width))
    chosen = None if times is None else times[positions]
    return Clip(name, Path(path), source, positions, chosen, masks, dict(columns or {}))


def _byte_limit() -> float:
    text = os.environ.get("FOVEATE_MAX_CLIP_GB", "")
    try:
        return float(text or MAX_CLIP_GB) * 1e9
    except ValueError:
        raise SampleError(f"FOVEATE_MAX_CLIP_GB: expected a number, got {text!r}") from None
