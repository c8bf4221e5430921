"""Any image file as a person sees it: uint8 RGB, upright, whatever its mode, depth or orientation.

A file that cannot be shown that way (corrupt, empty, not an image, depth without a defined white) is a
:class:`~foveate.errors.SampleError` that says why, so that one bad file never ends a run of thousands.
"""

from __future__ import annotations

import hashlib
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as Pillow
from PIL import ImageOps, UnidentifiedImageError
from PIL.Image import Image

from foveate.errors import SampleError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_MEGAPIXELS = 250.0
"""Largest image that is decoded (about 750 MB of RGB); ``$FOVEATE_MAX_MEGAPIXELS`` overrides it."""

SUFFIXES = frozenset(
    {".apng", ".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".jp2", ".pbm", ".pgm", ".png", ".pnm"}
    | {".ppm", ".tga", ".tif", ".tiff", ".webp"}
)
"""File names that a folder search takes for images (in lower case)."""

_pillow_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Decoded:
    """A decoded file: ``pixels`` uint8 (y, x, 3), the ``sha256`` of the encoded bytes, and what was done
    to it that a person might not expect (``notes``, for instance "first of 12 frames")."""

    pixels: NDArray[np.uint8]
    sha256: str
    notes: tuple[str, ...] = ()


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Pixels of one file, uint8 ``(y, x, 3)``, EXIF orientation applied.

    Transparency is composited on white; 16-bit grey is scaled, not clipped; CMYK and palettes become RGB;
    of an animation the first frame is taken. Raises SampleError with the reason where none of this works.
    """
    return decode(path).pixels


def decode(path: Path | str) -> Decoded:
    """:func:`read_image` with the file's hash and notes on what was done."""
    data = _read_bytes(Path(path))
    with _opened(data, Path(path)) as image:
        notes = _frame_note(image)
        upright, exif_note = _upright(image, path)
        rgb, mode_note = _to_rgb(upright, path)
        pixels = np.array(rgb, dtype=np.uint8)
    return Decoded(pixels, hashlib.sha256(data).hexdigest(), notes + exif_note + mode_note)


@dataclass(frozen=True)
class FrameDurations:
    """What an image file says of its frames: ``seconds`` of each (0 where it does not say), size and hash."""

    seconds: tuple[float, ...]
    height: int
    width: int
    sha256: str
    notes: tuple[str, ...] = ()


def frame_durations(path: Path | str) -> FrameDurations:
    """Length of every frame of an animated (or still) image file. Raises SampleError."""
    data = _read_bytes(Path(path))
    with _opened(data, Path(path)) as image:
        seconds = []
        for number in range(getattr(image, "n_frames", 1)):
            _go_to(image, number, path)
            seconds.append(float(image.info.get("duration", 0.0) or 0.0) / 1000)
        _, notes = _to_rgb(image, path)
        size = image.height, image.width
    return FrameDurations(tuple(seconds), *size, hashlib.sha256(data).hexdigest(), notes)


def count_frames(path: Path | str) -> int:
    """Frames of an image file, 1 for a still one. Raises SampleError where it is not an image."""
    with _opened(_read_bytes(Path(path)), Path(path)) as image:
        return int(getattr(image, "n_frames", 1))


def decode_frames(path: Path | str, wanted: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
    """The frames of an animated image at ascending positions ``wanted``, each uint8 ``(y, x, 3)``.

    Raises SampleError.
    """
    with _opened(_read_bytes(Path(path)), Path(path)) as image:
        for number in wanted:
            _go_to(image, int(number), path)
            rgb, _ = _to_rgb(image, path)
            yield np.array(rgb, dtype=np.uint8)


def _go_to(image: Image, number: int, path: Path | str) -> None:
    try:
        image.seek(number)
        image.load()
    except Exception as error:  # Pillow's decoders raise EOFError, OSError, SyntaxError, ...
        raise SampleError(f"image {path}: frame {number} cannot be decoded ({type(error).__name__})") from error


def read_mask(path: Path | str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask image as bool ``(y, x)`` over the pixels of its image, whose ``shape`` it must have.

    A pixel is inside where it is not zero; in a JPEG, whose zeros are not exact, where it is over half
    white; in a palette image, where its index is not zero. Raises SampleError.
    """
    with _opened(_read_bytes(Path(path)), Path(path)) as image:
        lossy = image.format == "JPEG"
        upright, _ = _upright(image, path)
        levels = _mask_levels(upright)
    inside: NDArray[np.bool_] = np.greater(levels, 127 if lossy else 0)
    if inside.shape != shape:
        raise SampleError(
            f"mask {path}: expected the size of its image, {shape[1]} x {shape[0]} pixels,"
            f" got {inside.shape[1]} x {inside.shape[0]}",
            remedy="draw the mask on the image as it is shown (after EXIF rotation), at full size",
        )
    return inside


def _mask_levels(image: Image) -> NDArray[np.generic]:
    exact = image.mode in ("P", "1", "L", "F") or image.mode.startswith("I")
    return np.asarray(image if exact else image.convert("L"))


# ------------------------------------------------------------------------------------------ reading


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise SampleError(f"image {path}: no such file") from None
    except OSError as error:
        raise SampleError(f"image {path}: cannot be read ({error.strerror or error})") from None
    if not data:
        raise SampleError(f"image {path}: the file is empty (0 bytes)")
    return data


@contextmanager
def _opened(data: bytes, path: Path) -> Iterator[Image]:
    """The Pillow image behind ``data``, loaded, under our own size limit; all of Pillow's failures named."""

    try:
        with _without_pillow_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Pillow.open(BytesIO(data))
            check_megapixels(image.width, image.height, f"image {path}")
            image.load()
    except UnidentifiedImageError:
        raise SampleError(f"image {path}: not an image that Pillow knows (begins with {data[:16]!r})") from None
    except SampleError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ...
        raise SampleError(f"image {path}: cannot be decoded ({type(error).__name__}: {error})") from error
    with image:
        yield image


def _pixel_limit() -> int:
    text = os.environ.get("FOVEATE_MAX_MEGAPIXELS", "")
    try:
        return int(float(text or MAX_MEGAPIXELS) * 1e6)
    except ValueError:
        raise SampleError(f"FOVEATE_MAX_MEGAPIXELS: expected a number, got {text!r}") from None


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Pillow's own bomb guard, a module global that cannot be set for one file, stepped aside for ours."""
    with _pillow_lock:
        before = Pillow.MAX_IMAGE_PIXELS
        Pillow.MAX_IMAGE_PIXELS = None
        try:
            yield
        finally:
            Pillow.MAX_IMAGE_PIXELS = before


def check_megapixels(width: int, height: int, what: str) -> None:
    """Raise SampleError where a picture (``what``, in words) is larger than the limit."""
    limit = _pixel_limit()
    if width * height > limit:
        raise SampleError(
            f"{what}: {width} x {height} is {width * height / 1e6:.0f} megapixels,"
            f" over the limit of {limit / 1e6:g}",
            remedy="shrink it, or set FOVEATE_MAX_MEGAPIXELS higher",
        )


# --------------------------------------------------------------------------------------- to upright RGB


def _frame_note(image: Image) -> tuple[str, ...]:
    frames = getattr(image, "n_frames", 1)
    return (f"first of {frames} frames",) if frames > 1 else ()


def _upright(image: Image, path: Path | str) -> tuple[Image, tuple[str, ...]]:
    """EXIF orientation applied; an EXIF block that cannot be read is ignored and noted."""

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ImageOps.exif_transpose(image), ()
    except Exception:  # any garbage may stand in an EXIF block, and the pixels are fine
        return image, ("unreadable EXIF, orientation ignored",)


def _to_rgb(image: Image, path: Path | str) -> tuple[Image, tuple[str, ...]]:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey(image, path)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        return _on_white(image)
    note = () if image.mode in ("RGB", "L", "P", "1") else (f"{image.mode} converted to RGB",)
    return image.convert("RGB"), note


def _on_white(image: Image) -> tuple[Image, tuple[str, ...]]:

    layer = image.convert("RGBA")
    if layer.getchannel("A").getextrema() == (255, 255):
        return layer.convert("RGB"), ()
    white = Pillow.new("RGBA", layer.size, "white")
    return Pillow.alpha_composite(white, layer).convert("RGB"), ("transparency on white",)


def on_white(layer: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA uint8 ``(..., 4)`` composited on white: uint8 ``(..., 3)``, rounded."""
    share = layer[..., 3:].astype(np.uint16)
    mixed = layer[..., :3] * share + 255 * (255 - share)
    return ((mixed + 127) // 255).astype(np.uint8)


def _deep_grey(image: Image, path: Path | str) -> tuple[Image, tuple[str, ...]]:
    """16-bit grey (and float grey in [0, 1]) scaled to 8 bits; other ranges have no defined white."""
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    white = 1.0 if image.mode == "F" else 65535.0
    if low < 0.0 or high > white or not np.isfinite(values).all():
        raise SampleError(
            f"image {path}: {image.mode} pixels from {low:g} to {high:g} have no defined white",
            remedy="save the image with 8 or 16 bits a channel",
        )
    grey = np.rint(values * (255.0 / white)).astype(np.uint8)
    depth = "float" if image.mode == "F" else "16-bit"
    return Pillow.fromarray(grey).convert("RGB"), (f"{depth} grey scaled to 8 bits",)
