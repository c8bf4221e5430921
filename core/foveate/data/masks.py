"""Where the evidence lies in each frame of a clip: a folder of mask images, an array, or one image for all."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.frame_files import frames_in
from foveate.data.images import read_mask
from foveate.errors import SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ARRAYS = frozenset({".npy", ".npz"})
NAMES = ("mask", "masks")
"""Arrays of an npz that are taken for the mask where it holds several."""


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of every frame of a file: ``files`` (one for each frame, or one for all), or an ``array``."""

    path: Path
    shape: tuple[int, int]
    files: tuple[Path, ...] = ()
    array: NDArray[Any] | None = None

    def read(self, positions: Sequence[int] | NDArray[np.intp]) -> NDArray[np.bool_]:
        """Bool ``(frame, y, x)`` of the frames at ``positions`` of the file. Raises SampleError."""
        chosen = np.asarray(positions, np.intp)
        if self.array is not None:
            inside: NDArray[np.bool_] = np.asarray(self.array[chosen]) != 0
            return inside
        if len(self.files) == 1:
            return np.repeat(read_mask(self.files[0], self.shape)[None], chosen.size, 0)
        return np.stack([read_mask(self.files[i], self.shape) for i in chosen])


def open_masks(path: Path, frames: int, shape: tuple[int, int]) -> Masks:
    """Masks of a clip of ``frames`` frames of ``shape`` (y, x) pixels. Raises SampleError where they do not fit.

    ``path`` is a folder of mask images in natural order, one a frame; an .npy or .npz array (frame, y, x), not
    zero inside; or one image, which then holds for every frame.
    """
    place = Path(path)
    if place.is_dir():
        files = tuple(frames_in(place))
        if len(files) not in (1, frames):
            raise SampleError(
                f"masks {place}: {len(files)} images, but the clip has {frames} frames",
                remedy="one mask a frame, in the same order (empty ones black)",
            )
        return Masks(place, shape, files)
    if place.suffix.lower() not in ARRAYS:
        return Masks(place, shape, (place,))
    array = _load(place)
    if array.shape != (frames, *shape):
        raise SampleError(
            f"masks {place}: expected an array of shape {(frames, *shape)} (frame, y, x), got {array.shape}"
        )
    return Masks(place, shape, array=array)


def _load(path: Path) -> NDArray[Any]:
    try:
        # Without pickles: a mask file can never run code.
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise SampleError(f"masks {path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SampleError(f"masks {path}: not a plain numpy array ({error})") from None
    if isinstance(loaded, np.ndarray):
        return loaded
    with loaded:
        names = [name for name in NAMES if name in loaded.files] or loaded.files
        if not names:
            raise SampleError(f"masks {path}: no array in the file")
        try:
            return np.asarray(loaded[names[0]])
        except ValueError as error:
            raise SampleError(f"masks {path}: not a plain numpy array ({error})") from None
