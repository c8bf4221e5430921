"""What a capture will cost: bytes, seconds, and whether the disk has room, before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foveate.data.layout import ArraySpec
from foveate.errors import StoreError
from foveate.interfaces import CapturePlan

RESERVE = 0.02
"""Share of the free space that is left alone."""


@dataclass(frozen=True)
class Estimate:
    """Cost of a capture. ``bytes`` are raw: compression saves about a fifth of peaked attention."""

    samples: int
    arrays: tuple[ArraySpec, ...]
    seconds_per_sample: float
    free: int
    place: Path
    plan: CapturePlan

    @classmethod
    def of(
        cls, out: Path, samples: int, arrays: Sequence[ArraySpec], seconds_per_sample: float, plan: CapturePlan
    ) -> Estimate:
        """Measure the disk that holds (or will hold) ``out``."""
        place = next(folder for folder in out.absolute().parents if folder.exists())
        return cls(samples, tuple(arrays), seconds_per_sample, shutil.disk_usage(place).free, place, plan)

    @property
    def sample_bytes(self) -> int:
        """Raw bytes of one sample over all arrays."""
        return sum(spec.sample_bytes for spec in self.arrays)

    @property
    def bytes(self) -> int:
        """Raw bytes of the run."""
        return self.samples * self.sample_bytes

    @property
    def seconds(self) -> float:
        """Time for all samples."""
        return self.samples * self.seconds_per_sample

    @property
    def fits(self) -> bool:
        """Whether the raw bytes fit the free space."""
        return self.bytes <= self.free * (1 - RESERVE)


def check_space(estimate: Estimate) -> None:
    """Raise StoreError, saying what would fit, where the plan exceeds the disk."""
    if estimate.fits:
        return
    raise StoreError(
        f"the plan needs {size(estimate.bytes)} ({estimate.samples} samples of {size(estimate.sample_bytes)}),"
        f" but {estimate.place} has {size(estimate.free)} free; nothing was written",
        remedy=_what_fits(estimate),
    )


def _what_fits(estimate: Estimate) -> str:
    room = estimate.free * (1 - RESERVE)
    advice = [f"{int(room // max(1, estimate.sample_bytes))} samples of this plan would fit"]
    layers = [spec.shape[spec.dims.index("layer")] for spec in estimate.arrays if "layer" in spec.dims]
    if layers and estimate.bytes / max(layers) <= room:
        advice.append("one layer would (--layers -1)")
    wide = [part for part in estimate.plan.sites if part.rows == "all" or "head_mean" in part.reductions]
    if wide and _bytes_with_one_row(estimate) <= room:
        advice.append("readout rows of every layer would (--rows readout, no head_mean)")
    return "; ".join(advice)


def _bytes_with_one_row(estimate: Estimate) -> int:
    """Raw bytes of the run if only one row of each full matrix were kept."""
    total = 0
    for spec in estimate.arrays:
        name = spec.name.rpartition("/")[2]
        if name == "attention":
            total += spec.sample_bytes // max(1, spec.shape[spec.dims.index("query")])
        elif name != "head_mean":
            total += spec.sample_bytes
    return total * estimate.samples


def size(number: float) -> str:
    """Bytes in words: ``12.8 TB``."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    raise AssertionError("unreachable")
