"""Clips that are no video file: a folder of frames in natural order, or an animated GIF, PNG or WebP."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from foveate.data import images
from foveate.errors import SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ANIMATIONS = frozenset({".apng", ".gif"})
"""Suffixes of image files that a folder search takes for clips; ``.png`` and ``.webp`` are looked into."""
SLOWEST = 0.01
"""Seconds below which a frame's duration in an animation is no duration; browsers show such frames for 0.1 s."""
BROWSERS = 0.1


@dataclass(frozen=True, eq=False)
class FrameFolder:
    """A folder of images as one clip. ``times`` is None: files say nothing of their rate."""

    path: Path
    files: tuple[Path, ...]
    height: int
    width: int
    sha256: str
    notes: tuple[str, ...] = ()
    times: None = None

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return len(self.files)

    def read(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at positions ``wanted``, each uint8 ``(y, x, 3)``. Raises SampleError."""
        for position in wanted:
            pixels = images.decode(self.files[position]).pixels
            if pixels.shape[:2] != (self.height, self.width):
                raise SampleError(
                    f"clip {self.path}: frame {position} ({self.files[position].name}) is"
                    f" {pixels.shape[1]} x {pixels.shape[0]} pixels, but frame 0 ({self.files[0].name}) is"
                    f" {self.width} x {self.height}",
                    remedy="give every frame the size of the first, or make it another clip",
                )
            yield pixels


@dataclass(frozen=True, eq=False)
class Animation:
    """An animated image file as one clip, with the times (frame,) in seconds at which its frames appear."""

    path: Path
    times: NDArray[np.float64]
    height: int
    width: int
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return int(self.times.size)

    def read(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at ascending positions ``wanted``, each uint8 ``(y, x, 3)``. Raises SampleError."""
        yield from images.decode_frames(self.path, wanted)


def natural(path: Path) -> tuple[tuple[int, int, str], ...]:
    """A key by which ``frame2.png`` comes before ``frame10.png``."""
    parts = re.split(r"(\d+)", path.name)
    return tuple((0, int(part), part) if part.isdecimal() else (1, 0, part.casefold()) for part in parts)


def frames_in(folder: Path) -> list[Path]:
    """The still images directly in a folder, in natural order; hidden files are left out."""
    found = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return sorted((p for p in found if p.suffix.lower() in images.SUFFIXES - ANIMATIONS), key=natural)


def index_folder(path: Path | str) -> FrameFolder:
    """A folder of frames; its hash is over names and contents, in order. Raises SampleError."""
    place = Path(path)
    files = tuple(frames_in(place))
    if not files:
        raise SampleError(f"clip {place}: no image in this folder")
    first = images.decode(files[0])
    height, width = first.pixels.shape[:2]
    return FrameFolder(place, files, height, width, _hash(files), first.notes)


def _hash(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        try:
            total.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
        except OSError as error:
            raise SampleError(f"image {file}: cannot be read ({error.strerror or error})") from None
    return total.hexdigest()


def is_animated(path: Path) -> bool:
    """Whether an image file holds more than one frame; only its header is read. False where it is no image."""
    try:
        return images.count_frames(path) > 1
    except SampleError:
        return False


def index_animation(path: Path | str) -> Animation:
    """An animated image (or a still one: a clip of one frame). Raises SampleError."""
    place = Path(path)
    try:
        stat = place.stat()
    except OSError as error:
        raise SampleError(f"clip {place}: cannot be read ({error.strerror or error})") from None
    return _animation(place.absolute(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _animation(path: Path, changed: int, size: int) -> Animation:
    """``changed`` and ``size`` make a file that was replaced another one."""
    found = images.frame_durations(path)
    steps = np.array([step if step >= SLOWEST else BROWSERS for step in found.seconds])
    times = np.concatenate([[0.0], np.cumsum(steps[:-1])])
    notes = list(found.notes)
    if steps.size == 1:
        notes.append("a still image: one frame")
    elif len(set(steps.tolist())) > 1:
        notes.append(f"variable frame rate: {1 / steps.max():.3g} to {1 / steps.min():.3g} frames a second")
    return Animation(path, times, found.height, found.width, found.sha256, tuple(notes))
