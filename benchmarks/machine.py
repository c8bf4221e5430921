"""The machine and the versions that measurements were taken with; nothing that names the host."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "foveate", "torchlens", "nnsight", "transformer-lens", "timm")


def describe() -> dict[str, str | float]:
    """Processor, cores, memory, load, and versions of what is installed."""
    return {
        "processor": _processor(),
        "cores": float(os.cpu_count() or 1),
        "memory_gb": round(_meminfo("MemTotal"), 1),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        **{name: found for name in PACKAGES if (found := _version(name))},
    }


def available_gigabytes() -> float:
    """Memory that is free now."""
    return _meminfo("MemAvailable")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    vectors = "AVX-512" if any("avx512f" in line for line in lines) else "AVX2 or less"
    return f"{next(named, platform.machine())}, {vectors}"


def _meminfo(field: str) -> float:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(field))
    return float(line.split()[1]) * 1024 / 1e9


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
