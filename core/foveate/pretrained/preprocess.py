"""Preprocessing as a model's ``preprocessor_config.json`` says, with the exact map back to the photo.

Written on Pillow and numpy because several processors of transformers demand torchvision, and because
none of them says where its crop came from. Values agree with transformers' own Pillow processors
(tests); processors that rescale before they resize (DINOv3) resize float tensors with antialiasing, as
torchvision does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from foveate.errors import ModelError, SampleError
from foveate.geometry import Geometry

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5)
_BILINEAR, _BICUBIC = 2, 3  # PIL.Image.Resampling

# What a processor class does where its file leaves a field out. "int_is_edge": how a bare ``size: 224`` reads.
_CLIP_LIKE: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "resample": _BICUBIC,
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
    "int_is_edge": True,
}
_EXACT: dict[str, Any] = {
    "size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "resample": _BILINEAR,
    "image_mean": _HALF,
    "image_std": _HALF,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIPImageProcessor": _CLIP_LIKE,
    "BitImageProcessor": _CLIP_LIKE,
    "ViTImageProcessor": _EXACT,
    "DeiTImageProcessor": _EXACT
    | {
        "size": {"height": 256, "width": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": _BICUBIC,
    },
    "SiglipImageProcessor": _EXACT | {"resample": _BICUBIC, "int_is_edge": True},
    "Siglip2ImageProcessor": _EXACT,
    "DINOv3ViTImageProcessor": _EXACT
    | {"image_mean": _IMAGENET_MEAN, "image_std": _IMAGENET_STD, "rescale_first": True},
}

LARGEST_RESIZED = 64_000_000
"""Pixels. A 1 x 10,000 photo whose short edge becomes 336 would need 1.1 gigapixels: refused, not swapped."""


@dataclass(frozen=True)
class Recipe:
    """Resize, centre crop, rescale, normalise: each step optional, in that order.

    ``edge`` resizes the shorter side to that many pixels (the longer at most ``longest``); ``exact``
    resizes to (height, width) whatever the shape. ``crop`` is (height, width); smaller images are padded
    with black, as transformers does. ``rescale_first`` divides before resizing, in float.
    """

    processor: str
    edge: int | None = None
    longest: int | None = None
    exact: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    resample: int = _BICUBIC
    rescale: float | None = 1 / 255
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rescale_first: bool = False

    @classmethod
    def read(cls, config: Mapping[str, Any] | None, *, default: str) -> Recipe:
        """From the parsed ``preprocessor_config.json``; None means the defaults of processor ``default``.

        Raises ModelError where a field cannot be read, or an unknown processor leaves one out.
        """
        given = dict(config or {})
        name = _class_name(given, default)
        fields = DEFAULTS.get(name, {}) | {key: value for key, value in given.items() if value is not None}
        try:
            return cls(processor=name, **_steps(fields))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"preprocessor_config.json of {name}: cannot read {error!r}",
                remedy=f"complete the file; the fields of {', '.join(DEFAULTS)} have known defaults",
            ) from error

    def at(self, height: int, width: int) -> Recipe:
        """The same recipe for another input size; resize and crop keep their ratio (256 -> 224 and alike)."""
        if self.crop is not None:
            grow_y, grow_x = height / self.crop[0], width / self.crop[1]
            exact = self.exact and (round(self.exact[0] * grow_y), round(self.exact[1] * grow_x))
            edge = self.edge and max(round(self.edge * max(grow_y, grow_x)), 1)
            return replace(self, crop=(height, width), exact=exact, edge=edge)
        return replace(self, exact=(height, width), edge=None, longest=None)

    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every input, or None where it follows the photo."""
        return self.crop or self.exact

    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Geometry]:
        """One image, uint8 ``(y, x, channel)``, as float32 ``(channel, y, x)``, with its exact geometry.

        Raises SampleError for anything but RGB, and for shapes too extreme to resize.
        """
        if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8 or 0 in pixels.shape:
            raise SampleError(
                f"expected one RGB image, uint8 (y, x, 3), got {pixels.dtype} of shape {pixels.shape}",
                remedy="this source takes images; give single frames of a clip",
            )
        height, width = pixels.shape[:2]
        rows, columns = self._resized_size(height, width)
        values = self._resize(pixels, rows, columns)
        values, top, left = _centre(values, *self.crop) if self.crop else (values, 0, 0)
        geometry = Geometry(
            height, width, values.shape[0], values.shape[1], rows / height, columns / width, -top, -left
        )
        return np.ascontiguousarray(self._normalise(values).transpose(2, 0, 1)), geometry

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        if self.exact is not None:
            return self.exact
        if self.edge is None:
            return height, width
        rows, columns = _by_edge(height, width, self.edge, self.longest)
        if rows * columns > LARGEST_RESIZED or min(rows, columns) < 1:
            raise SampleError(
                f"{width} x {height} pixels would be resized to {columns} x {rows}: too elongated",
                remedy="crop the image to a less extreme shape",
            )
        return rows, columns

    def _resize(self, pixels: NDArray[np.uint8], rows: int, columns: int) -> NDArray[Any]:
        if self.rescale_first:
            return _resize_float(self._rescaled(pixels), rows, columns, self.resample)
        if pixels.shape[:2] == (rows, columns):
            return pixels
        image = Image.fromarray(pixels).resize((columns, rows), resample=Image.Resampling(self.resample))
        return np.asarray(image)

    def _rescaled(self, values: NDArray[Any]) -> NDArray[np.float32]:
        if self.rescale is None:
            return values.astype(np.float32)
        return (values.astype(np.float64) * self.rescale).astype(np.float32)

    def _normalise(self, values: NDArray[Any]) -> NDArray[np.float32]:
        scaled = values if self.rescale_first else self._rescaled(values)
        if self.mean is None or self.std is None:
            return scaled
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        result: NDArray[np.float32] = (scaled - mean) / std
        return result


def _class_name(config: Mapping[str, Any], default: str) -> str:
    name = str(config.get("image_processor_type") or config.get("feature_extractor_type") or default)
    name = name.removesuffix("Fast").removesuffix("Pil")
    return name.removesuffix("FeatureExtractor") + "ImageProcessor" if name.endswith("FeatureExtractor") else name


def _steps(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of transformers' file as fields of :class:`Recipe`."""
    steps: dict[str, Any] = {"resample": int(fields["resample"])}
    if fields.get("do_resize", True):
        steps |= _size(fields["size"], int_is_edge=bool(fields.get("int_is_edge", False)))
    if fields.get("do_center_crop", False):
        steps["crop"] = _pair(fields["crop_size"])
    factor = fields.get("rescale_factor", 1 / 255)
    steps["rescale"] = float(factor) if fields.get("do_rescale", True) else None
    if fields.get("do_normalize", True):
        steps["mean"], steps["std"] = _three(fields["image_mean"]), _three(fields["image_std"])
    return steps | {"rescale_first": bool(fields.get("rescale_first", False))}


def _size(size: Any, *, int_is_edge: bool) -> dict[str, Any]:
    if isinstance(size, Mapping) and size.get("shortest_edge"):
        longest = size.get("longest_edge")
        return {"edge": int(size["shortest_edge"]), "longest": int(longest) if longest else None}
    if isinstance(size, int) and int_is_edge:
        return {"edge": size}
    return {"exact": _pair(size)}


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping):
        return int(size["height"]), int(size["width"])
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def _three(values: Any) -> tuple[float, ...]:
    return tuple(float(v) for v in values) if not isinstance(values, int | float) else (float(values),) * 3


def _by_edge(height: int, width: int, edge: int, longest: int | None) -> tuple[int, int]:
    """Shorter side to ``edge``, the longer truncated to whole pixels, both less where ``longest`` binds."""
    short, long = min(height, width), max(height, width)
    exact_short = float(edge)
    if longest is not None and long / short * edge > longest:
        exact_short = longest * short / long
        edge = round(exact_short)
        new_long = long if short == edge else int(exact_short * long / short)
    else:
        new_long = long if short == edge else int(edge * long / short)
    return (edge, new_long) if height <= width else (new_long, edge)


def _centre(values: NDArray[Any], height: int, width: int) -> tuple[NDArray[Any], int, int]:
    """Centre crop; where the image is smaller it is laid on black. Returns (values, top, left).

    ``top`` and ``left`` are where the crop starts in the image: negative where it was padded. Odd
    remainders go where transformers puts them: crops round down, padding rounds up.
    """
    top, left = (_start(have, want) for have, want in zip(values.shape[:2], (height, width), strict=True))
    out = np.zeros((height, width, values.shape[2]), values.dtype)
    y, x = max(top, 0), max(left, 0)
    piece = values[y : top + height, x : left + width]
    out[y - top : y - top + piece.shape[0], x - left : x - left + piece.shape[1]] = piece
    return out, top, left


def _start(have: int, want: int) -> int:
    return (have - want) // 2 if have >= want else -ceil((want - have) / 2)


def _resize_float(values: NDArray[np.float32], rows: int, columns: int, resample: int) -> NDArray[np.float32]:
    """Antialiased resizing of float ``(y, x, channel)``, as torchvision resizes tensors."""
    import torch
    import torch.nn.functional as F

    mode = {_BILINEAR: "bilinear", _BICUBIC: "bicubic"}.get(resample)
    if mode is None:
        raise ModelError(f"resample {resample} before rescaling is not supported (2 bilinear, 3 bicubic)")
    planes = torch.from_numpy(values).permute(2, 0, 1)[None]
    resized = F.interpolate(planes, size=(rows, columns), mode=mode, antialias=True, align_corners=False)
    return resized[0].permute(1, 2, 0).numpy()
