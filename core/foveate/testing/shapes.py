"""Synthetic pictures of several objects, with boxes, masks and labels known by construction.

A picture shows one to three coloured shapes (disc, square, triangle, cross; turned at random) and up to two
grey ones on a sinusoid texture with noise. Coloured shapes are the objects; grey shapes are none, so that a
detector must look at the colour inside an outline and not only for outlines. Shapes may cover each other a
little: **masks and boxes are of the visible pixels**, and every object shows at least :data:`VISIBLE` of itself.
The label is the hue (default) or the shape; the other one is drawn independently of it.

Picture ``i`` of seed ``s`` is a function of ``(s, i)`` alone: any part of a stream can be made again.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.testing.synthetic import HUES

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 96
"""Height and width of every picture, in pixels."""

SHAPES: tuple[str, ...] = ("disc", "square", "triangle", "cross")
CLASSES: tuple[str, ...] = tuple(f"{hue} shape" for hue in HUES)
"""Labels by hue; the order is the class index. By shape the labels are :data:`SHAPES`."""

MOST = 3
"""Objects a picture at most; it shows at least one."""

GREYS = 2  # grey shapes at most
RADIUS = (10.0, 18.0)  # of the circle around a shape, pixels
CLOSEST = 0.8  # distance of two centres, as a share of the sum of their radii
VISIBLE = 0.6  # share of a shape's pixels that later shapes must leave
NOISE = 0.06  # standard deviation, in units of full scale

By = Literal["hue", "shape"]

_PALETTE = np.array(list(HUES.values()))
_Y, _X = (np.mgrid[0:SIZE, 0:SIZE] + 0.5).astype(np.float32)  # pixel centres


@dataclass(frozen=True, eq=False)
class Scene:
    """One picture and its objects, in the order they were painted (the last one lies on top).

    ``image`` uint8 ``(y, x, channel)``; ``hues`` and ``shapes`` int64 ``(object,)``, positions in
    :data:`CLASSES` and :data:`SHAPES`; ``masks`` bool ``(object, y, x)``: visible pixels; ``boxes`` float64
    ``(object, 4)``: (top, left, bottom, right) edges around them, in pixels.
    """

    image: NDArray[np.uint8]
    hues: NDArray[np.int64]
    shapes: NDArray[np.int64]
    masks: NDArray[np.bool_]
    boxes: NDArray[np.float64]

    def __len__(self) -> int:
        return int(self.hues.size)

    def labels(self, by: By = "hue") -> NDArray[np.int64]:
        """Class index of every object."""
        return self.hues if by == "hue" else self.shapes


def names(by: By = "hue") -> tuple[str, ...]:
    """Class names, in the order of the class index."""
    return CLASSES if by == "hue" else SHAPES


def scene(index: int, *, seed: int) -> Scene:
    """Picture ``index`` of the stream of ``seed``."""
    rng = np.random.default_rng((seed, index))
    while True:
        drawn = _draw(rng)
        if drawn is not None:
            return drawn


def scenes(count: int, *, seed: int, start: int = 0) -> list[Scene]:
    """Pictures ``start`` to ``start + count`` of the stream of ``seed``."""
    return [scene(index, seed=seed) for index in range(start, start + count)]


def box_of(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Edges (top, left, bottom, right) of the smallest box around a mask ``(y, x)``, in pixels.

    Raises ValueError for an empty mask: it has no box.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not rows.size:
        raise ValueError("box_of: the mask is empty")
    return float(rows[0]), float(columns[0]), float(rows[-1] + 1), float(columns[-1] + 1)


def write_dataset(folder: Path | str, count: int, *, seed: int, by: By = "hue") -> Path:
    """Write pictures, masks, ``manifest.csv`` and ``objects.json`` to ``folder``; returns the manifest's path.

    ``manifest.csv`` has the columns path, label (of the largest object), mask (all objects together) and
    objects (how many). ``objects.json`` maps each path to its objects: label, box (top, left, bottom, right in
    pixels) and mask (an 8-bit PNG, 255 on the object). Files of an earlier call with the same arguments are
    written again, byte for byte alike.
    """
    root = Path(folder)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    rows, truth = [], {}
    for index, drawn in enumerate(scenes(count, seed=seed)):
        row, objects = _write_scene(root, index, drawn, by)
        rows.append(row)
        truth[row[0]] = objects
    document = {"schema_version": 1, "classes": names(by), "images": truth}
    (root / "objects.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    manifest = root / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "mask", "objects"), *rows])
    return manifest


def _write_scene(
    root: Path, index: int, drawn: Scene, by: By
) -> tuple[tuple[str, str, str, int], list[dict[str, object]]]:
    """One picture's files, its row of the manifest and its objects."""
    from PIL import Image

    classes, labels = names(by), drawn.labels(by)
    image, union = f"images/{index:05d}.png", f"masks/{index:05d}.png"
    Image.fromarray(drawn.image).save(root / image)
    Image.fromarray(drawn.masks.any(0).astype(np.uint8) * 255).save(root / union)
    objects: list[dict[str, object]] = []
    for number, (mask, box) in enumerate(zip(drawn.masks, drawn.boxes, strict=True)):
        file = f"masks/{index:05d}_{number}.png"
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / file)
        objects.append({"label": classes[labels[number]], "box": box.tolist(), "mask": file})
    largest = int(drawn.masks.sum((1, 2)).argmax())
    return (image, classes[labels[largest]], union, len(drawn)), objects


def _draw(rng: np.random.Generator) -> Scene | None:
    """A picture, or None where an object came to lie too far under others."""
    objects = int(rng.integers(1, MOST + 1))
    coloured = rng.permutation(np.arange(objects + int(rng.integers(GREYS + 1))) < objects)
    outlines = np.stack([_outline(rng, *place) for place in _places(rng, coloured.size)])
    kinds = rng.integers(len(SHAPES), size=coloured.size)
    inside = np.stack([outline[kind] for outline, kind in zip(outlines, kinds, strict=True)])
    covered = np.cumsum(inside[::-1], axis=0)[::-1] - inside > 0
    visible = inside & ~covered
    if np.any(visible.sum((1, 2)) < VISIBLE * inside.sum((1, 2))):
        return None
    hues = rng.integers(len(HUES), size=coloured.size)
    picture = _texture(rng)
    for mask, hue, colour in zip(visible, hues, coloured, strict=True):
        picture[mask] = _PALETTE[hue] + rng.uniform(-0.1, 0.1) if colour else rng.uniform(0.1, 0.9)
    picture += NOISE * rng.standard_normal(picture.shape, np.float32)
    masks = visible[coloured]
    boxes = np.array([box_of(mask) for mask in masks])
    pixels = np.round(np.clip(picture, 0.0, 1.0) * 255).astype(np.uint8)
    return Scene(pixels, hues[coloured], kinds[coloured], masks, boxes)


def _outline(rng: np.random.Generator, y: float, x: float, radius: float) -> NDArray[np.bool_]:
    """All shapes around one place, turned by the same random angle: (shape, y, x)."""
    angle = rng.uniform(0.0, np.pi / 2)
    down, right = (_Y - y) / radius, (_X - x) / radius
    u, v = np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right
    wide, high = np.abs(u), np.abs(v)
    disc = u * u + v * v < 0.81
    square = np.maximum(wide, high) < 0.7
    triangle = (v < 0.5) & (v > -1.0 + np.sqrt(3.0) * wide)
    cross = ((wide < 0.34) & (high < 0.94)) | ((high < 0.34) & (wide < 0.94))
    return np.stack([disc, square, triangle, cross])


def _places(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Circles inside the picture whose centres keep their distance: (shape, [y, x, radius])."""
    while True:
        radius = rng.uniform(*RADIUS, count)
        centre = radius[:, None] + rng.random((count, 2)) * (SIZE - 2 * radius[:, None])
        apart = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
        least = CLOSEST * (radius[:, None] + radius[None])
        if np.all((apart > least)[np.triu_indices(count, 1)]):
            return np.column_stack([centre, radius])


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """A grey level plus three plane waves with a colour of their own: (y, x, channel) around [0.2, 0.8]."""
    level = rng.uniform(0.35, 0.65)
    frequency = rng.uniform(-0.4, 0.4, (3, 2))  # radians a pixel
    phase = rng.uniform(0.0, 2 * np.pi, 3)
    tint = rng.uniform(-0.12, 0.12, (3, 3)) / np.sqrt(3)
    waves = np.sin(frequency[:, 0, None, None] * _Y + frequency[:, 1, None, None] * _X + phase[:, None, None])
    return np.asarray(level + np.einsum("wyx,wc->yxc", waves, tint), np.float32)
