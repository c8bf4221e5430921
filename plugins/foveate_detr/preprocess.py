"""Preprocessing of detectors: resize, normalise, and pad to a common canvas with a mask of what is image.

Without torchvision. Resizing and normalising are those of :class:`foveate_vit.preprocess.Recipe`; what
detectors add is padding at the bottom and right. Transformers pads each batch to its largest image, so that a
detector's numbers change a little with the batch-mates of an image (padding reaches the border features
through the convolutions). Here the canvas is fixed by default: the same numbers whatever the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import ModelError, SampleError
from foveate.interfaces import Sample
from foveate_vit.preprocess import Recipe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import Geometry

Canvas = Literal["fixed", "batch"] | tuple[int, int]

_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225), "resample": 2}
_EDGES = {"size": {"shortest_edge": 800, "longest_edge": 1333}}
DEFAULTS: dict[str, dict[str, Any]] = {
    "DetrImageProcessor": _IMAGENET | _EDGES | {"do_pad": True},
    "MaskFormerImageProcessor": _IMAGENET | _EDGES | {"size_divisor": 32},
    "RTDetrImageProcessor": _IMAGENET
    | {"size": {"height": 640, "width": 640}, "do_normalize": False, "do_pad": False},
    "Owlv2ImageProcessor": {
        "size": {"height": 960, "width": 960},
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
        "resample": 2,
        "do_pad": False,
    },
    "EomtImageProcessor": _IMAGENET | {"size": {"shortest_edge": 640, "longest_edge": 640}, "do_pad": False},
}
"""What a processor does where its file leaves a field out; other processors of the family are aliases."""
ALIASES = dict.fromkeys(
    (
        "ConditionalDetrImageProcessor",
        "DeformableDetrImageProcessor",
        "YolosImageProcessor",
        "GroundingDinoImageProcessor",
        "RfDetrImageProcessor",
        "OneFormerImageProcessor",
    ),
    "DetrImageProcessor",
) | {"Mask2FormerImageProcessor": "MaskFormerImageProcessor"}


@dataclass(frozen=True)
class SteppedRecipe(Recipe):
    """A recipe whose resized sides are stretched to multiples of ``step``: rounded down (YOLOS) or ``up``
    (MaskFormer, Mask2Former).
    """

    step: int = 1
    up: bool = True

    @classmethod
    def over(cls, recipe: Recipe, step: int, *, up: bool) -> SteppedRecipe:
        """``recipe`` with stepped sides."""
        return cls(**{f.name: getattr(recipe, f.name) for f in fields(Recipe)}, step=step, up=up)

    def _resized_size(self, height: int, width: int) -> tuple[int, int]:
        rows, columns = super()._resized_size(height, width)
        return (rows, columns) if self.exact is not None else (self._stepped(rows), self._stepped(columns))

    def _stepped(self, side: int) -> int:
        return max(-(-side // self.step) if self.up else side // self.step, 1) * self.step


@dataclass(frozen=True, eq=False)
class Encoded:
    """``inputs`` float32 (sample, channel, y, x), 0 outside the image; ``mask`` int64 (sample, y, x), 1 on it."""

    inputs: NDArray[np.float32]
    mask: NDArray[np.int64]
    geometry: tuple[Geometry, ...]


@dataclass(frozen=True)
class PaddedRecipe:
    """One image's :class:`~foveate_vit.preprocess.Recipe`, then padding to ``canvas``.

    ``canvas``: ``"fixed"`` is the smallest square that holds every image (the recipe's longest edge),
    ``"batch"`` the largest image of the batch as transformers does, or (height, width). Sides are rounded up
    to multiples of ``divisor``. Without ``pads`` images of one batch must have one size. Padding is 0 in
    normalised units, the training set's mean colour, or with ``black`` a black pixel (EoMT pads first).
    """

    recipe: Recipe
    pads: bool = True
    canvas: Canvas = "fixed"
    divisor: int = 1
    black: bool = False

    @classmethod
    def read(
        cls, config: Mapping[str, Any] | None, *, default: str, canvas: Canvas = "fixed", divisor: int = 1
    ) -> PaddedRecipe:
        """From a parsed ``preprocessor_config.json``; None means the defaults of processor ``default``.

        Raises ModelError where a field cannot be read.
        """
        given = {key: value for key, value in (config or {}).items() if value is not None}
        name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or default)
        name = name.removesuffix("Fast").removesuffix("Pil").replace("FeatureExtractor", "ImageProcessor")
        given = DEFAULTS.get(ALIASES.get(name, name), {}) | given | {"image_processor_type": name}
        pads = bool(given.get("do_pad", given.get("pad_and_return_pixel_mask", True)))
        if isinstance(given.get("pad_size"), Mapping) and canvas == "fixed":
            canvas = (int(given["pad_size"]["height"]), int(given["pad_size"]["width"]))
        recipe = Recipe.read(_edges(given), default=name)
        step = int(given.get("size_divisor") or 0)
        if step > 1:
            return cls(SteppedRecipe.over(recipe, step, up=True), pads, canvas, math.lcm(divisor, step))
        return cls(recipe, pads, canvas, divisor)

    def at(self, height: int, width: int) -> PaddedRecipe:
        """The same recipe with every image resized to exactly (height, width), and no padding."""
        return replace(self, recipe=self.recipe.at(height, width))

    def size(self) -> tuple[int, int] | None:
        """(height, width) of every input, or None where it follows the batch."""
        if isinstance(self.canvas, tuple):
            return self._rounded(*self.canvas)
        exact = self.recipe.output_size()
        if exact is not None:
            return self._rounded(*exact)
        if self.canvas == "fixed" and self.pads and self.recipe.longest:
            return self._rounded(self.recipe.longest, self.recipe.longest)
        return None

    def __call__(self, samples: Sequence[Sample]) -> Encoded:
        """All samples on one canvas. Raises SampleError naming the sample that cannot be used or does not fit."""
        pairs = [self._one(sample) for sample in samples]
        height, width = self._common([values.shape[1:] for values, _ in pairs])
        inputs = np.broadcast_to(self._fill(), (len(pairs), 3, height, width)).copy()
        mask = np.zeros((len(pairs), height, width), np.int64)
        geometry = []
        for i, (values, placed) in enumerate(pairs):
            rows, columns = values.shape[1:]
            self._check_fit(samples[i], (rows, columns), (height, width))
            inputs[i, :, :rows, :columns] = values
            mask[i, :rows, :columns] = 1
            geometry.append(replace(placed, input_height=height, input_width=width))
        return Encoded(inputs, mask, tuple(geometry))

    def _one(self, sample: Sample) -> tuple[NDArray[np.float32], Geometry]:
        try:
            return self.recipe(sample.pixels)
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error.message}", remedy=error.remedy) from error

    def _fill(self) -> NDArray[np.float32]:
        """What padding is made of, (channel, 1, 1)."""
        recipe = self.recipe
        if not self.black or recipe.mean is None or recipe.std is None:
            return np.zeros((3, 1, 1), np.float32)
        dark = -np.asarray(recipe.mean, np.float32) / np.asarray(recipe.std, np.float32)
        return np.asarray(dark.reshape(3, 1, 1), np.float32)

    def _common(self, sizes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
        fixed = self.size()
        if fixed is not None or not sizes:
            return fixed or (self.divisor, self.divisor)
        if not self.pads and len(set(sizes)) > 1:
            raise SampleError(
                f"this model takes images of one size a batch, got {sorted(set(sizes))} (height, width)",
                remedy="open it with image_size=(height, width), or encode one image at a time",
            )
        return self._rounded(max(rows for rows, _ in sizes), max(columns for _, columns in sizes))

    def _rounded(self, height: int, width: int) -> tuple[int, int]:
        step = self.divisor
        return -(-height // step) * step, -(-width // step) * step

    @staticmethod
    def _check_fit(sample: Sample, size: tuple[int, int], canvas: tuple[int, int]) -> None:
        if size[0] > canvas[0] or size[1] > canvas[1]:
            raise SampleError(
                f"sample {sample.id!r}: resized to {size} (height, width), the canvas is {canvas}",
                remedy="open the model with a larger canvas=(height, width), or canvas='batch'",
            )


def _edges(fields: Mapping[str, Any]) -> dict[str, Any]:
    """``size`` in its present spelling: old files give one number, and ``max_size`` beside it."""
    size = fields.get("size")
    if isinstance(size, int):
        size = {"shortest_edge": size, "longest_edge": int(fields.get("max_size", 1333))}
    elif isinstance(size, Mapping) and size.get("shortest_edge") and not size.get("longest_edge"):
        size = {**size, "longest_edge": int(fields.get("max_size", 1333))}
    elif isinstance(size, Mapping) and size.get("max_height"):
        raise ModelError(f"preprocessor_config.json: size {dict(size)!r} is not supported")
    return {**fields, "size": size}
