"""Finding clips: which files and folders are one each, and long videos cut into windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from foveate.data.clips import open_frames
from foveate.data.frame_files import ANIMATIONS, is_animated
from foveate.data.images import SUFFIXES as IMAGES
from foveate.data.sampling import Selection
from foveate.data.videos import SUFFIXES as VIDEOS
from foveate.errors import SampleError

LOOKED_INTO = frozenset({".png", ".webp"})
"""Suffixes of image files that may be still or move."""


def clips_in(folder: Path, files: Iterable[Path], ignored: Counter[str]) -> list[tuple[str, Path]]:
    """(name, path) of every clip among the ``files`` below a folder, in order.

    A video or animated image is a clip; so is every folder (``folder`` itself included) that holds still
    images directly. Other files are counted in ``ignored`` by suffix.
    """
    found: dict[Path, None] = {}
    for path in files:
        suffix = path.suffix.lower()
        if suffix in VIDEOS or suffix in ANIMATIONS or (suffix in LOOKED_INTO and is_animated(path)):
            found[path] = None
        elif suffix in IMAGES:
            found[path.parent] = None
        else:
            ignored[suffix or "no suffix"] += 1
    names = {path: path.relative_to(folder).as_posix() for path in found}
    return [(names[path] if names[path] != "." else folder.resolve().name, path) for path in sorted(found)]


def windows_of(name: str, path: Path, selection: Selection) -> list[tuple[str, Selection]]:
    """(name, selection) of every window of a clip, ``name@0000-0031`` by its frame numbers in the file.

    A clip that cannot be read stays whole: capturing it says why.
    """
    if selection.sampling.window is None:
        return [(name, selection)]
    try:
        source = open_frames(path)
        times = selection.times(source.frames, source.times)
        parts = selection.windows(source.frames, times, name)
        ends = [part.positions(source.frames, times, name)[[0, -1]] for part in parts]
    except SampleError:
        return [(name, selection)]
    return [(f"{name}@{a:04d}-{b:04d}", part) for part, (a, b) in zip(parts, ends, strict=True)]
