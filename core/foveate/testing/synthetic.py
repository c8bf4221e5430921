"""Synthetic pictures whose answer, and the place of its evidence, are known by construction.

A picture shows three discs of three different hues on a sinusoid texture with noise. One disc has a light
rim, the others a dark one; **the class is the hue of the disc with the light rim**, and its pixels are the
mask. The places and radii of the discs are drawn jointly before one of them is made the target, and all
hues have the same saturation and value, so whatever ignores the rim (a saturation filter, a centre prior,
a colour detector) finds the right disc in one picture of three, no more. The light and the dark rim lie
equally far from the mean of the background, so that an edge filter has no large advantage either.

Picture ``i`` of seed ``s`` is a function of ``(s, i)`` alone: any part of a stream can be made again.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 64
"""Height and width of every picture, in pixels."""

HUES: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "yellow": (0.85, 0.85, 0.15),
    "green": (0.15, 0.85, 0.15),
    "cyan": (0.15, 0.85, 0.85),
    "blue": (0.15, 0.15, 0.85),
    "magenta": (0.85, 0.15, 0.85),
}
"""Class name -> RGB in [0, 1]; HSV value 0.85 and saturation 0.82 for all. The order is the class index."""

CLASSES: tuple[str, ...] = tuple(HUES)
DISCS = 3
RADIUS = (7.0, 11.0)  # pixels
RIM = 0.30  # share of the radius that the rim takes
LIGHT, DARK = 0.95, 0.05
NOISE = 0.08  # standard deviation, in units of full scale

_PALETTE = np.array(list(HUES.values()))
_Y, _X = np.mgrid[0:SIZE, 0:SIZE] + 0.5  # pixel centres


@dataclass(frozen=True, eq=False)
class RimDiscs:
    """Pictures with their answers and evidence.

    ``images`` uint8 ``(sample, y, x, channel)``; ``labels`` int64 ``(sample,)``, index into
    :data:`CLASSES`; ``masks`` bool ``(sample, y, x)``: the disc with the light rim, rim included.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    masks: NDArray[np.bool_]

    def __len__(self) -> int:
        return int(self.labels.size)


def rim_discs(count: int, *, seed: int, start: int = 0) -> RimDiscs:
    """Pictures ``start`` to ``start + count`` of the stream of ``seed``."""
    images = np.empty((count, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(count, np.int64)
    masks = np.empty((count, SIZE, SIZE), np.bool_)
    for i in range(count):
        images[i], labels[i], masks[i] = _picture(np.random.default_rng((seed, start + i)))
    return RimDiscs(images, labels, masks)


def write_dataset(folder: Path | str, count: int, *, seed: int) -> Path:
    """Write pictures, masks and ``manifest.csv`` (columns path, label, mask; relative paths) to ``folder``.

    Masks are 8-bit PNGs, 255 on the evidence. Returns the path of the manifest. Files of an earlier
    call with the same arguments are written again, byte for byte alike.
    """
    from PIL import Image

    root = Path(folder)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    data = rim_discs(count, seed=seed)
    rows = []
    for i in range(count):
        label = CLASSES[data.labels[i]]
        image, mask = f"images/{i:05d}_{label}.png", f"masks/{i:05d}.png"
        Image.fromarray(data.images[i]).save(root / image)
        Image.fromarray(data.masks[i].astype(np.uint8) * 255).save(root / mask)
        rows.append((image, label, mask))
    manifest = root / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "mask"), *rows])
    return manifest


def _picture(rng: np.random.Generator) -> tuple[NDArray[np.uint8], int, NDArray[np.bool_]]:
    """One picture (y, x, channel), its class and its mask (y, x)."""
    picture = _texture(rng)
    hues = rng.permutation(len(CLASSES))[:DISCS]
    target = int(rng.integers(DISCS))
    mask = np.zeros((SIZE, SIZE), np.bool_)
    for disc, (y, x, radius) in enumerate(_places(rng)):
        distance = np.hypot(_Y - y, _X - x) / radius
        picture[distance < 1.0] = _PALETTE[hues[disc]]
        picture[(distance < 1.0) & (distance > 1.0 - RIM)] = LIGHT if disc == target else DARK
        if disc == target:
            mask = distance < 1.0
    picture += NOISE * rng.standard_normal(picture.shape)
    pixels = np.round(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
    return pixels, int(hues[target]), mask


def _texture(rng: np.random.Generator) -> NDArray[np.float64]:
    """A grey level plus three plane waves with a colour of their own: (y, x, channel) around [0.2, 0.8]."""
    level = rng.uniform(0.35, 0.65)
    frequency = rng.uniform(-0.6, 0.6, (3, 2))  # radians a pixel
    phase = rng.uniform(0.0, 2 * np.pi, 3)
    tint = rng.uniform(-0.15, 0.15, (3, 3)) / np.sqrt(3)
    waves = np.sin(frequency[:, 0, None, None] * _Y + frequency[:, 1, None, None] * _X + phase[:, None, None])
    return np.asarray(level + np.einsum("wyx,wc->yxc", waves, tint))


def _places(rng: np.random.Generator) -> NDArray[np.float64]:
    """Centres and radii of discs that lie inside the picture and do not touch: (disc, [y, x, radius])."""
    while True:
        radius = rng.uniform(*RADIUS, DISCS)
        centre = radius[:, None] + rng.random((DISCS, 2)) * (SIZE - 2 * radius[:, None])
        gap = np.linalg.norm(centre[:, None] - centre[None], axis=-1) - (radius[:, None] + radius[None])
        if np.all(gap[np.triu_indices(DISCS, 1)] > 1.0):
            return np.column_stack([centre, radius])
