"""From a clip to the frames that a model takes: choosing frames, then the processor's rule for each.

Every frame is treated alike, so that one :class:`~foveate.geometry.Geometry` holds for the clip. The steps are
those of :class:`foveate.pretrained.preprocess.Recipe`; a video processor adds little to them:

- ViViT scales to [-1, 1] first (``offset``) and then applies mean and standard deviation;
- V-JEPA 2 resizes to 256 / 224 of its crop, whatever ``size`` its file states;
- processors that exist for torchvision only resize with torch's own 8-bit filter, which torchvision calls; it
  differs from Pillow's by at most one grey level. Processors with a Pillow variant use Pillow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import SampleError
from foveate.pretrained.preprocess import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import Geometry

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_BILINEAR, _BICUBIC = 2, 3  # PIL.Image.Resampling


def _edge(resized: int, crop: int) -> dict[str, Any]:
    """Shorter side to ``resized``, then the middle ``crop`` x ``crop``, as most video processors do."""
    square = {"height": crop, "width": crop}
    return {"size": {"shortest_edge": resized}, "do_center_crop": True, "crop_size": square, "resample": _BILINEAR}


def _exact(side: int) -> dict[str, Any]:
    return {"size": {"height": side, "width": side}, "do_center_crop": False, "resample": _BILINEAR}


DEFAULTS: dict[str, dict[str, Any]] = {
    "VideoMAE": _edge(224, 224) | _HALF,
    "Vivit": _edge(256, 224) | _HALF | {"rescale_factor": 1 / 127.5, "offset": True},
    "Timesformer": _edge(224, 224) | _IMAGENET,
    "VJEPA2": _edge(292, 256) | _IMAGENET,
    "Videomt": _exact(640) | _IMAGENET,
    "Sam2Video": _exact(1024) | _IMAGENET,
}
"""What a processor does where its file leaves a field out, by the beginning of its class name."""
_TORCH_ONLY = ("VJEPA2", "Videomt", "Sam2Video")
_ALIASES = {"Sam2": "Sam2Video"}  # checkpoints of SAM 2 serve pictures, too, and name that processor
_SUFFIXES = ("VideoProcessor", "ImageProcessorPil", "ImageProcessorFast", "ImageProcessor", "FeatureExtractor")


@dataclass(frozen=True)
class _TorchRecipe(Recipe):
    """Resizes 8-bit frames with torch, as torchvision does."""

    def _resize(self, pixels: NDArray[np.uint8], rows: int, columns: int) -> NDArray[Any]:
        if self.rescale_first or self.resample not in (_BILINEAR, _BICUBIC):
            return super()._resize(pixels, rows, columns)
        if pixels.shape[:2] == (rows, columns):
            return pixels
        import torch
        import torch.nn.functional as F

        planes = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].contiguous()
        mode = "bilinear" if self.resample == _BILINEAR else "bicubic"
        resized = F.interpolate(planes, (rows, columns), mode=mode, antialias=True, align_corners=False)
        return resized[0].permute(1, 2, 0).numpy()


@dataclass(frozen=True)
class ClipRecipe:
    """One rule for every frame of a clip."""

    frame: Recipe

    @classmethod
    def read(cls, config: Mapping[str, Any] | None, *, default: str) -> ClipRecipe:
        """From a parsed processor file; None means the defaults of ``default`` (``VideoMAE``, ``VJEPA2`` ...).

        Raises ModelError where a field cannot be read.
        """
        given = {key: value for key, value in (config or {}).items() if value is not None}
        name = _name(given) or f"{default}VideoProcessor"
        kind = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)
        kind = _ALIASES.get(kind, kind)
        merged = DEFAULTS.get(kind, {}) | given
        if kind == "VJEPA2":
            crop = merged["crop_size"]
            side = int(crop["height"] if isinstance(crop, Mapping) else crop)
            merged["size"] = {"shortest_edge": int(side * 256 / 224)}
        recipe = _shifted(Recipe.read(merged | {"image_processor_type": name}, default=name), merged)
        by_torch = kind in _TORCH_ONLY or (bool(given) and name.endswith("VideoProcessor"))
        return cls(_by_torch(recipe) if by_torch else recipe)

    @property
    def processor(self) -> str:
        """Name of the processor whose rule this is."""
        return self.frame.processor

    def at(self, height: int, width: int) -> ClipRecipe:
        """The same rule for another input size."""
        return replace(self, frame=self.frame.at(height, width))

    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of every frame of the input, or None where it follows the clip."""
        return self.frame.output_size()

    def __call__(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], Geometry]:
        """Frames uint8 ``(frame, y, x, 3)`` as float32 ``(frame, channel, y, x)``, and the geometry of all.

        Raises SampleError for a single picture, an empty clip, and shapes too extreme to resize.
        """
        if pixels.ndim != 4:
            raise SampleError(
                f"expected a clip, uint8 (frame, y, x, 3), got shape {pixels.shape}",
                remedy="this model takes clips: give a video file, or a folder of frames",
            )
        if not len(pixels):
            raise SampleError("the clip has no frame")
        made = [self.frame(frame) for frame in pixels]
        return np.stack([values for values, _ in made]), made[0][1]


def choose_frames(have: int, want: int) -> NDArray[np.int64]:
    """``want`` frames spread evenly over ``have``, ascending: the middle one of each of ``want`` equal spans.

    ``floor((i + 1/2) have / want)``: all frames where ``have == want``; of a shorter clip frames are repeated.
    """
    if have < 1 or want < 1:
        raise SampleError(f"cannot choose {want} of {have} frames")
    return np.asarray((2 * np.arange(want, dtype=np.int64) + 1) * have // (2 * want), dtype=np.int64)


def _name(config: Mapping[str, Any]) -> str:
    keys = ("video_processor_type", "image_processor_type", "feature_extractor_type")
    return next((str(config[key]) for key in keys if config.get(key)), "")


def _shifted(recipe: Recipe, merged: Mapping[str, Any]) -> Recipe:
    """``(v s - 1 - mean) / std`` is the rule with mean + 1."""
    if not merged.get("offset", False):
        return recipe
    mean, std = recipe.mean or (0.0, 0.0, 0.0), recipe.std or (1.0, 1.0, 1.0)
    return replace(recipe, mean=tuple(value + 1.0 for value in mean), std=std)


def _by_torch(recipe: Recipe) -> Recipe:
    return _TorchRecipe(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)})
