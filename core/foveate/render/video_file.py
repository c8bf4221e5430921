"""A video that browsers play, frame by frame: H.264 in MP4, or an animated WebP for a README.

Players refuse more than they accept. H.264 with 4:2:0 chroma needs even sizes (an odd side gets one more row or
column of its own last pixels), colours are marked as BT.709 and converted so, and the index stands at the front,
so that a page can start to play before the end has arrived. The frame rate is constant: frames of a recording
whose rate varies are repeated by their times, and that is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import MissingDependencyError, StoreError, UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

SUFFIXES = (".mp4", ".webp")
QUALITY = 20
"""x264's constant rate factor: 18 cannot be told from the original, 23 is its default."""
FASTEST = 60.0


@dataclass(frozen=True)
class Written:
    """What was written: ``frames`` in the file, their ``fps``, ``size`` (y, x) and in words what was done."""

    path: Path
    frames: int
    fps: float
    size: tuple[int, int]
    note: str = ""


def constant_rate(times: ArrayLike, fps: float | None = None) -> tuple[float, NDArray[np.intp], str]:
    """A constant rate for frames shown at ``times`` (seconds, ascending): rate, which frame to show when, a note.

    The rate is that of the median step (at most 60 a second), or ``fps``. Frame k of the video is the last frame
    whose time has come; where steps vary by more than a tenth, frames are repeated or left out, and the note says
    so. Without known times (NaN) frames are shown one after the other at ``fps`` or 10 a second.
    """
    shown = np.asarray(times, np.float64)
    if shown.ndim != 1 or not shown.size:
        raise UsageError(f"video: expected one time a frame, got {shown.shape}")
    if fps is not None and not 0 < fps <= FASTEST:
        raise UsageError(f"video: {fps} frames a second: expected more than 0 and at most {FASTEST:g}")
    steps = np.diff(shown)
    if not np.isfinite(shown).all() or not steps.size or (steps <= 0).any():
        return fps or 10.0, np.arange(shown.size), "" if fps else "times unknown: 10 frames a second"
    typical = float(np.median(steps))
    if np.abs(steps / typical - 1).max() <= 0.1:
        return fps or min(FASTEST, 1 / typical), np.arange(shown.size), ""
    rate = fps or min(FASTEST, 1 / typical)
    count = round((shown[-1] - shown[0] + typical) * rate)
    index = np.searchsorted(shown, shown[0] + (np.arange(max(1, count)) + 1e-6) / rate, side="right") - 1
    lost = shown.size - np.unique(index).size
    words = f"variable frame rate: {shown.size} frames shown as {index.size} at {rate:.3g} a second"
    return rate, index, words + (f", {lost} left out" if lost else "")


def write_video(
    frames: Iterable[NDArray[np.uint8]], out: Path | str, *, fps: float, quality: int = QUALITY, title: str = ""
) -> Written:
    """Write uint8 RGB frames ``(y, x, 3)`` of one size, one in memory at a time, to MP4 or WebP.

    The file appears when it is complete: a writer that is stopped leaves nothing under ``out``. Raises UsageError
    for another suffix, no frame, or frames that differ in size; MissingDependencyError without PyAV (MP4).
    """
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"cannot write a video to {path.name!r}: expected a name ending in {', '.join(SUFFIXES)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.part{path.suffix.lower()}")
    encode = _webp if path.suffix.lower() == ".webp" else _mp4
    try:
        count, size = encode(_even(_checked(frames)), scratch, fps, quality, title)
        if not count:
            raise UsageError("video: there is no frame to write")
        scratch.replace(path)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        scratch.unlink(missing_ok=True)
    return Written(path, count, fps, size)


def _checked(frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    first: tuple[int, ...] = ()
    for number, frame in enumerate(frames):
        pixels = np.asarray(frame)
        first = first or pixels.shape
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or pixels.shape != first:
            raise UsageError(
                f"video: frame {number} is {pixels.dtype} {pixels.shape}, expected uint8 (y, x, 3) of {first}"
            )
        yield pixels


def _even(frames: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    for frame in frames:
        odd = frame.shape[0] % 2, frame.shape[1] % 2
        yield np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge") if any(odd) else frame


def _mp4(
    frames: Iterator[NDArray[np.uint8]], path: Path, fps: float, quality: int, title: str
) -> tuple[int, tuple[int, int]]:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "videos are written with PyAV, which is not installed", remedy='pip install "foveate[video]"'
        ) from error
    first = next(frames, None)
    if first is None:
        return 0, (0, 0)
    rate = Fraction(fps).limit_denominator(1001)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        if title:
            container.metadata["title"] = title
        stream: Any = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = first.shape[0], first.shape[1], "yuv420p"
        stream.options = {"crf": str(quality), "preset": "medium"}
        _mark_colours(stream)
        count = 0
        for frame in _chained(first, frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            picture.pts = count
            picture.time_base = 1 / rate
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count, (first.shape[0], first.shape[1])


def _mark_colours(stream: Any) -> None:
    """BT.709, limited range: without the marks players guess by the size of the picture."""
    context = stream.codec_context
    context.color_primaries = context.color_trc = context.colorspace = 1
    context.color_range = 1


def _chained(first: NDArray[np.uint8], rest: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    yield first
    yield from rest


def _webp(
    frames: Iterator[NDArray[np.uint8]], path: Path, fps: float, quality: int, title: str
) -> tuple[int, tuple[int, int]]:
    """Pillow writes an animation from a generator of further frames; all are encoded before the file is closed."""
    from PIL import Image

    first = next(frames, None)
    if first is None:
        return 0, (0, 0)
    counted = [1]

    def rest() -> Iterator[Image.Image]:
        for frame in frames:
            counted[0] += 1
            yield Image.fromarray(frame)

    Image.fromarray(first).save(
        path, save_all=True, append_images=rest(), duration=round(1000 / fps), loop=0, quality=90, method=4
    )
    return counted[0], (first.shape[0], first.shape[1])
