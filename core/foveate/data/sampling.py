"""Which frames of a clip a sample is made of: arithmetic on frame numbers and times only.

In this order: the part between ``start`` and ``stop``; then every n-th frame (``stride``) or frames at a rate
(``fps``); then, where a long video is cut, one window of what is left; then at most ``frames`` of it, evenly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import SampleError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Sampling:
    """What the user asks for, alike for every clip of a run. ``window`` and ``hop`` count frames that remain."""

    frames: int | None = None
    fps: float | None = None
    stride: int = 1
    window: int | None = None
    hop: int | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "fps", "stride", "window", "hop"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{name} {value}: expected a number above 0")
        if self.fps is not None and self.stride != 1:
            raise UsageError("--fps and --stride both choose frames", remedy="give one of them")
        if self.hop is not None and self.window is None:
            raise UsageError("--hop without --window", remedy="for instance --window 32 --hop 16")


@dataclass(frozen=True)
class Selection:
    """The frames of one sample, as they are stored with it.

    ``start`` and ``stop`` (excluded) are frame numbers, or seconds with an ``s`` behind ("1.5s"); empty text is
    an open end. ``rate`` is the frame rate that the user gives to a clip that has none of its own (or a wrong
    one). ``window`` is (first, last + 1) among the frames that start, stop, stride and fps leave.
    """

    start: str = ""
    stop: str = ""
    rate: float | None = None
    sampling: Sampling = Sampling()
    window: tuple[int, int] | None = None

    @classmethod
    def of_columns(cls, columns: Mapping[str, object], sampling: Sampling) -> Selection:
        """From a table's columns ``start``, ``stop`` and ``fps``, where it has them. Raises UsageError."""
        rate = _number(columns.get("fps"), "fps")
        if rate is not None and rate <= 0:
            raise UsageError(f"column fps: expected a rate above 0, got {rate:g}")
        return cls(_end(columns.get("start"), "start"), _end(columns.get("stop"), "stop"), rate, sampling)

    @classmethod
    def from_json(cls, text: str) -> Selection:
        """The inverse of :meth:`to_json`."""
        data: dict[str, Any] = json.loads(text)
        window = data.pop("window", None)
        sampling = Sampling(**data.pop("sampling", {}))
        return cls(**data, sampling=sampling, window=None if window is None else (window[0], window[1]))

    def to_json(self) -> str:
        """What differs from all frames, as JSON."""
        mine, default = asdict(self), asdict(Selection())
        mine["sampling"] = {k: v for k, v in mine["sampling"].items() if v != default["sampling"][k]}
        return json.dumps({k: v for k, v in mine.items() if v not in (default[k], {})}, sort_keys=True)

    def times(self, frames: int, times: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
        """Seconds of every frame of the file: its own, or from the rate that the user gave."""
        return times if self.rate is None else np.arange(frames, dtype=np.float64) / self.rate

    def positions(self, frames: int, times: NDArray[np.float64] | None, what: str) -> NDArray[np.intp]:
        """The chosen frame numbers, ascending, of a file of ``frames`` frames at ``times`` (after the rate).

        Raises SampleError, naming ``what``, where none is left or seconds are asked of a clip without times.
        """
        chosen = self._remaining(frames, times, what)
        if self.window is not None:
            chosen = chosen[slice(*self.window)]
        if self.sampling.frames is not None:
            chosen = chosen[evenly(chosen.size, self.sampling.frames)]
        if not chosen.size:
            part = f"from {self.start or 'the start'} to {self.stop or 'the end'}"
            raise SampleError(f"{what}: no frame {part} (it has {frames})")
        return chosen

    def windows(self, frames: int, times: NDArray[np.float64] | None, what: str) -> list[Selection]:
        """This selection cut into windows (the last may be shorter), or itself where none are asked for."""
        size = self.sampling.window
        if size is None:
            return [self]
        count = self._remaining(frames, times, what).size
        hop = self.sampling.hop or size
        # A window begins only where the one before has not reached the end: none is part of another.
        starts = [0, *(at for at in range(hop, count, hop) if at - hop + size < count)]
        return [replace(self, window=(at, min(at + size, count))) for at in starts]

    def _remaining(self, frames: int, times: NDArray[np.float64] | None, what: str) -> NDArray[np.intp]:
        first = _place(self.start, times, what) if self.start else 0
        last = _place(self.stop, times, what) if self.stop else frames
        part = np.arange(min(first, frames), max(min(last, frames), min(first, frames)), dtype=np.intp)
        if self.sampling.fps is None:
            return part[:: self.sampling.stride]
        return part[at_rate(_known(times, what, "--fps")[part], self.sampling.fps)] if part.size else part


def evenly(count: int, wanted: int) -> NDArray[np.intp]:
    """``wanted`` of ``count`` places (all of them where there are fewer): the centres of equal parts."""
    number = min(count, wanted)
    places: NDArray[np.intp] = ((np.arange(number) * 2 + 1) * count // (2 * max(1, number))).astype(np.intp)
    return places


def at_rate(times: NDArray[np.float64], rate: float) -> NDArray[np.intp]:
    """The places shown at ``times[0] + k / rate``: of each moment the last frame begun. None comes twice."""
    usual = float(np.median(np.diff(times))) if times.size > 1 else 1 / rate
    # Where the end of the last frame is not known, it is shown as long as frames usually are.
    moments = np.arange(times[0], times[-1] + usual * (1 - 1e-6), 1 / rate)
    return np.unique(np.searchsorted(times, moments + 1e-6 * usual, side="right") - 1)


def rate_of(times: NDArray[np.float64] | None) -> float:
    """Frames a second: one over the median interval; NaN where it is not known."""
    if times is None or times.size < 2:
        return float("nan")
    return float(1 / np.median(np.diff(times)))


def duration_of(times: NDArray[np.float64] | None) -> float:
    """Seconds from the first frame's beginning to the last one's end, which is shown for a median interval."""
    if times is None or times.size < 2:
        return float("nan")
    return float(times[-1] - times[0] + np.median(np.diff(times)))


def _place(end: str, times: NDArray[np.float64] | None, what: str) -> int:
    if not end.endswith("s"):
        return int(end)
    moment = float(end[:-1])
    return int(np.searchsorted(_known(times, what, end), moment - 1e-9))


def _known(times: NDArray[np.float64] | None, what: str, asked: str) -> NDArray[np.float64]:
    if times is None:
        raise SampleError(
            f"{what}: {asked} asks for seconds, but frames in a folder have no times",
            remedy="give their rate in a table: columns path and fps",
        )
    return times


def _end(value: object, name: str) -> str:
    """A start or stop as text: a whole number of frames, or seconds with an s. Raises UsageError."""
    if value is None or value == "" or value != value:
        return ""
    text = str(value).strip()
    seconds = text.endswith("s")
    try:
        number = float(text[:-1] if seconds else text)
    except ValueError:
        number = -1.0
    if not number >= 0 or not np.isfinite(number) or (not seconds and not number.is_integer()):
        raise UsageError(
            f"column {name}: {text!r} is neither a frame number nor seconds",
            remedy=f"for instance {name} = 48 (frames) or {name} = 1.5s (seconds)",
        )
    return f"{number!r}s" if seconds else str(int(number))


def _number(value: object, name: str) -> float | None:
    if value is None or value == "" or value != value:
        return None
    try:
        return float(str(value))
    except ValueError:
        raise UsageError(f"column {name}: {value!r} is not a number") from None
