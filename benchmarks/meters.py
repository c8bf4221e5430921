"""CPU seconds, peak memory, and foveate's own share of a call."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from foveate.capture.tap import Tap

STATUS = Path("/proc/self/status")
RESET = Path("/proc/self/clear_refs")


def cpu(run: Callable[[], object]) -> float:
    """CPU seconds of one call: other processes on the machine do not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak(run: Callable[[], object]) -> float:
    """Peak resident megabytes of one call above what was resident before (Linux).

    Writing 5 to ``clear_refs`` resets VmHWM to the present. The process must have been started
    with ``MALLOC_MMAP_THRESHOLD_=65536``, so that freed tensors go back to the system and do not hide in malloc.
    """
    gc.collect()
    RESET.write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """A memory field of this process in megabytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) / 1024


@dataclass
class Clock:
    """CPU seconds inside the model's forward and, within those, inside the tap's sink."""

    forward: float = 0.0
    sink: float = 0.0

    def engine(self, total: float) -> float:
        """What foveate itself took of ``total``: all that is not the model's forward, and the sink inside it."""
        return total - self.forward + self.sink


@contextmanager
def engine_clock(source: Any) -> Iterator[Clock]:
    """Separate foveate's work from the model's in the same call.

    A ratio of two forwards on a busy machine is good to a few percent; this share does not depend on
    how fast the machine happened to be during the other one. The mode's own dispatch (0.4 microseconds a torch
    call) counts as the model's.
    """
    clock = Clock()
    forward, emit = source.forward, Tap._emit

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return forward(*args, **kwargs)
        finally:
            clock.forward += time.process_time() - start

    def timed_emit(tap: Tap, record: Any) -> None:
        start = time.process_time()
        emit(tap, record)
        clock.sink += time.process_time() - start

    with patch.object(source, "forward", timed_forward), patch.object(Tap, "_emit", timed_emit):
        yield clock
