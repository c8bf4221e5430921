"""Any video file as a person sees it: uint8 RGB frames, upright, with the times at which they are shown.

A file is decoded once to learn which frames it truly has (containers promise frames that are damaged, cut off or
never shown); afterwards any of them is read again by seeking, a piece at a time, never the whole video. What
cannot be used is a :class:`~foveate.errors.SampleError` that says why. Needs PyAV (``foveate[video]``).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.images import check_megapixels, on_white
from foveate.errors import MissingDependencyError, SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".h264", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"}
    | {".mxf", ".ogv", ".ts", ".webm", ".wmv", ".y4m"}
)
"""File names that a folder search takes for videos (in lower case)."""

REMEMBERED = 256
"""Videos whose index stays in memory."""
UNEVEN = 0.05
"""A frame rate is variable where an interval differs from the median by more than this share of it ..."""
CLOCK_TICKS = 1.5
"""... and by more than what the file's clock can tell apart (Matroska counts milliseconds)."""


@dataclass(frozen=True, eq=False)
class Video:
    """The frames of one file: those that decode without damage, in the order in which they are shown.

    ``times`` are seconds from the first frame (frame,); ``pts`` the file's own time stamps, by which a frame is
    found again, or None where they are missing or repeated. ``height`` and ``width`` are those of the upright
    picture, ``turn`` the quarter turns (counter-clockwise) that the file asks for. ``notes`` say in words what
    a person might not expect. ``sha256`` is of the file.
    """

    path: Path
    times: NDArray[np.float64]
    pts: NDArray[np.int64] | None
    height: int
    width: int
    turn: int
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return int(self.times.size)

    def read(self, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at ascending positions ``wanted``, each uint8 ``(y, x, 3)``, one at a time.

        Raises SampleError where one cannot be decoded again.
        """
        left = deque(int(position) for position in wanted)
        # A seek may land behind the frame that is wanted (poor indices): then the file is read from its start.
        for seek in (True, False) if self.pts is not None else (False,):
            for position, frame in self._located(left[0] if left and seek else 0):
                if not left or position > left[0]:
                    break
                if position == left[0]:
                    left.popleft()
                    yield np.rot90(_rgb(frame), self.turn)
            if not left:
                return
        raise SampleError(f"video {self.path}: frame {left[0]} cannot be decoded again")

    def _located(self, first: int) -> Iterator[tuple[int, Any]]:
        """(position, frame) from the last key frame at or before ``first`` on."""
        with opened(self.path) as (container, stream):
            if first and self.pts is not None:
                container.seek(int(self.pts[first]), stream=stream)
            for count, frame in enumerate(_good_frames(container, stream, _Damage())):
                yield count if self.pts is None else int(np.searchsorted(self.pts, frame.pts)), frame


def index_video(path: Path | str) -> Video:
    """Decode a file once, keeping no picture, and say what it holds.

    Raises SampleError where it cannot be read, has no frame that decodes, or its frames differ in size;
    MissingDependencyError where PyAV is absent.
    """
    place = Path(path)
    try:
        stat = place.stat()
    except OSError as error:
        raise SampleError(f"video {place}: cannot be read ({error.strerror or error})") from None
    if not stat.st_size:
        raise SampleError(f"video {place}: the file is empty (0 bytes)")
    return _index(place.absolute(), stat.st_mtime_ns, stat.st_size)


def count_at_most(path: Path | str) -> int:
    """An upper bound of the frames of a file, from its packets alone: nothing is decoded. Raises SampleError."""
    av = _av()
    count = 0
    with opened(Path(path)) as (container, stream):
        try:
            count = sum(packet.size > 0 for packet in container.demux(stream))
        except av.FFmpegError as error:
            if not count:
                return index_video(path).frames
            raise SampleError(f"video {path}: cannot be read ({error})") from None
    return count


# ------------------------------------------------------------------------------------------ reading


@dataclass
class _Damage:
    """What a decoder could not use."""

    packets: int = 0
    frames: int = 0
    cut: str = ""


def _av() -> Any:
    try:
        import av
    except ImportError:
        raise MissingDependencyError(
            "reading a video needs PyAV, which is not installed", remedy='pip install "foveate[video]"'
        ) from None
    return av


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and the first stream that is a video. Raises SampleError."""
    av = _av()
    try:
        container = av.open(str(path), metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SampleError(
            f"video {path}: cannot be opened ({reason})",
            remedy="the file may be cut off before its index; try to repair it: ffmpeg -i FILE -c copy NEW.mkv",
        ) from None
    with container:
        streams = [stream for stream in container.streams.video if not _is_cover(stream)]
        if not streams:
            raise SampleError(f"video {path}: no video stream in the file")
        yield container, streams[0]


def _is_cover(stream: Any) -> bool:
    """A still picture attached to a piece of music."""
    return "attached_pic" in str(getattr(stream, "disposition", "")).lower()


def _good_frames(container: Any, stream: Any, damage: _Damage) -> Iterator[Any]:
    """Decoded frames as they are shown, without those that the decoder had to make up."""
    av = _av()
    try:
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.FFmpegError:
                damage.packets += 1
                continue
            for frame in frames:
                if getattr(frame, "is_corrupt", False):
                    damage.frames += 1
                else:
                    yield frame
    except av.FFmpegError as error:
        damage.cut = str(getattr(error, "strerror", None) or error)


@lru_cache(maxsize=REMEMBERED)
def _index(path: Path, changed: int, size: int) -> Video:
    """``changed`` and ``size`` make a file that was replaced another one."""
    damage = _Damage()
    stamps: list[int | None] = []
    first: Any = None
    with opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        for number, frame in enumerate(_good_frames(container, stream, damage)):
            if first is None:
                first = frame
                check_megapixels(frame.width, frame.height, f"video {path}")
            elif (frame.width, frame.height) != (first.width, first.height):
                raise SampleError(
                    f"video {path}: frame {number} is {frame.width} x {frame.height} pixels, but frame 0 is"
                    f" {first.width} x {first.height}",
                    remedy="cut the video where its size changes, or scale it to one size",
                )
            stamps.append(frame.pts)
        base, aspect = float(stream.time_base or 0), stream.sample_aspect_ratio
        promised = _promised(container, stream)
    if first is None:
        raise SampleError(
            f"video {path}: no frame can be decoded" + (f" ({damage.cut})" if damage.cut else ""),
            remedy="the file is damaged or its codec is not in this build of PyAV",
        )
    pts, times, clock = _times(stamps, base, rate)
    angle = int(getattr(first, "rotation", 0) or 0)
    height, width = (first.height, first.width) if angle % 180 == 0 else (first.width, first.height)
    notes = (*_damage_notes(damage, times, promised, rate), *clock, *_picture_notes(first, angle, aspect))
    return Video(path, times, pts, height, width, round(angle / 90) % 4, hash_file(path), notes)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _times(
    stamps: Sequence[int | None], base: float, rate: float
) -> tuple[NDArray[np.int64] | None, NDArray[np.float64], tuple[str, ...]]:
    """Time stamps, seconds from the first frame, and what is to be said of the clock."""
    known = [stamp for stamp in stamps if stamp is not None]
    rising = len(known) == len(stamps) and all(a < b for a, b in pairwise(known))
    if not rising or base <= 0:
        steps = np.arange(len(stamps), dtype=np.float64)
        said = f"{rate:g} frames a second" if rate else "25 frames a second, assumed"
        return None, steps / (rate or 25.0), (f"time stamps missing or repeated: times from {said}",)
    pts = np.array(known, np.int64)
    times = (pts - pts[0]) * base
    return pts, times, _rate_notes(times, base)


def _rate_notes(times: NDArray[np.float64], base: float) -> tuple[str, ...]:
    if times.size < 3:
        return ()
    steps = np.diff(times)
    usual = float(np.median(steps))
    if np.abs(steps - usual).max() <= max(UNEVEN * usual, CLOCK_TICKS * base):
        return ()
    return (f"variable frame rate: {1 / steps.max():.3g} to {1 / steps.min():.3g} frames a second",)


def _promised(container: Any, stream: Any) -> float:
    """Seconds of video that the file says it has; 0 where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    clock = dict(stream.metadata).get("DURATION", "").split(":")
    if len(clock) == 3:  # Matroska
        try:
            return 3600 * float(clock[0]) + 60 * float(clock[1]) + float(clock[2])
        except ValueError:
            return 0.0
    alone = len(container.streams) == 1
    return float(container.duration or 0) / 1e6 if alone else 0.0


def _damage_notes(damage: _Damage, times: NDArray[np.float64], promised: float, rate: float) -> tuple[str, ...]:
    notes = []
    if damage.packets or damage.frames:
        notes.append(f"damaged: {max(damage.packets, damage.frames)} frames or more left out")
    if damage.cut:
        notes.append(f"cut off: what comes before is used ({damage.cut})")
    elif times.size > 1 or rate > 0:
        step = float(np.median(np.diff(times))) if times.size > 1 else 1.0 / rate
        if times[-1] + 3 * step < promised:
            ends = float(times[-1]) + step
            notes.append(f"cut off: the file says {promised:.3g} s, frames end at {ends:.3g} s")
    return tuple(notes)


# --------------------------------------------------------------------------------------- to upright RGB


def _rgb(frame: Any) -> NDArray[np.uint8]:
    """One frame as uint8 ``(y, x, 3)``: any depth scaled to 8 bits, its own colour matrix and range, on white."""
    described = {"src_color_range": frame.color_range}
    if _has_alpha(frame):
        layer: NDArray[np.uint8] = frame.to_ndarray(format="rgba", **described)
        return on_white(layer)
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24", **described)
    return pixels


def _has_alpha(frame: Any) -> bool:
    return frame.format.has_palette or any(part.is_alpha for part in frame.format.components)


HDR = {16: "PQ", 18: "HLG"}
"""Codes of transfer functions (ITU-T H.273) whose values are not meant for a plain display."""


def _picture_notes(frame: Any, angle: int, aspect: Any) -> tuple[str, ...]:
    notes = []
    if angle % 90:
        notes.append(f"turned by {angle} degrees in the file: shown at the nearest quarter turn")
    if aspect and float(aspect) != 1.0:
        notes.append(f"pixels are {float(aspect):.3g} times as wide as high; kept as stored")
    if getattr(frame, "interlaced_frame", False):
        notes.append("interlaced")
    if _has_alpha(frame):
        notes.append("transparency on white")
    transfer = getattr(frame, "color_trc", None)
    if transfer is not None and int(transfer) in HDR:
        notes.append(f"high dynamic range ({HDR[int(transfer)]}) shown without tone mapping")
    return tuple(notes)
