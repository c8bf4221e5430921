"""Synthetic clips of swimming shapes: which cue tells each class is known by construction.

One or two shapes swim over a textured background. Each has a *look* (a texture; its colour, size and outline tell
nothing) and a *motion* (the way it goes). Which class a shape is follows from the pair:

    striped, spotted   by look alone: they go left or right, as others do
    climber, diver     by motion alone: they are ringed or split, as others are
    matched, crossed   only by look and motion together: a ringed shape that goes right, or a split one that goes
                       left, is matched; the other two pairs are crossed (exclusive or)

Textures are mirror images of themselves from left to right and shapes start anywhere whatever their motion: the
first frame does not tell which way a shape goes (in later ones its place tells a little). Either cue can be
withheld as :mod:`foveate.temporal.cues` takes it away: without ``look`` shapes are one grey, without ``motion``
every frame is the same one. What is then left of the answer is known, too (:func:`answer`; the little that the
place of a still shape tells is left out). **Masks are of the visible pixels.**

Clip ``i`` of seed ``s`` is a function of ``(s, i)`` alone, and withholding a cue changes nothing else of it.
"""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.temporal.cues import freeze, neutral, reorder

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

SIZE = 48
"""Height and width of every frame, in pixels."""
FRAMES = 6
RATE = 6.0
"""Frames a second: a clip lasts one."""

LOOKS: tuple[str, ...] = ("striped", "spotted", "ringed", "split")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down")
Cue = Literal["look", "motion"]

CELLS: dict[str, tuple[tuple[str, str], ...]] = {
    "striped": (("striped", "left"), ("striped", "right")),
    "spotted": (("spotted", "left"), ("spotted", "right")),
    "climber": (("ringed", "up"), ("split", "up")),
    "diver": (("ringed", "down"), ("split", "down")),
    "matched": (("ringed", "right"), ("split", "left")),
    "crossed": (("ringed", "left"), ("split", "right")),
}
"""The (look, motion) pairs of each class, equally frequent; the order is the class index."""
CLASSES: tuple[str, ...] = tuple(CELLS)
TOLD_BY: dict[str, str] = dict(
    zip(CLASSES, ("look", "look", "motion", "motion", "look and motion", "look and motion"), strict=True)
)

MOST = 2
"""Shapes a clip at most; it shows at least one."""
RADIUS = (5.5, 7.5)  # pixels
SPEED = (1.4, 2.2)  # pixels a frame
WOBBLE = 0.8  # pixels to the sides of the way
START = (14.0, 34.0)  # centre in the first frame, pixels along y and x
CLOSEST = 1.25  # distance of two centres at the start, as a share of the sum of their radii
NOISE = 0.03  # standard deviation, in units of full scale

_STEPS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
_Y, _X = (np.mgrid[0:SIZE, 0:SIZE] + 0.5).astype(np.float32)  # pixel centres


@dataclass(frozen=True, eq=False)
class Clip:
    """One clip and its shapes, in the order they were painted (the last one lies on top).

    ``frames`` uint8 ``(frame, y, x, channel)``; ``classes``, ``looks`` and ``motions`` int64 ``(track,)``:
    positions in :data:`CLASSES`, :data:`LOOKS` and :data:`MOTIONS`, of the clip with nothing withheld; ``masks``
    bool ``(track, frame, y, x)``: visible pixels; ``withheld``: the cues that the frames do not show.
    """

    frames: NDArray[np.uint8]
    classes: NDArray[np.int64]
    looks: NDArray[np.int64]
    motions: NDArray[np.int64]
    masks: NDArray[np.bool_]
    withheld: frozenset[Cue] = frozenset()

    def __len__(self) -> int:
        return int(self.classes.size)

    def answers(self) -> NDArray[np.float64]:
        """What the frames say of every shape: probability of each class, ``(track, class)``."""
        shown = [
            answer(
                None if "look" in self.withheld else LOOKS[look],
                None if "motion" in self.withheld else MOTIONS[motion],
            )
            for look, motion in zip(self.looks, self.motions, strict=True)
        ]
        return np.array(shown).reshape(len(self), len(CLASSES))


def answer(look: str | None, motion: str | None) -> NDArray[np.float64]:
    """Probability of each class, float64 ``(class,)``, given a look and a motion; None is a cue that is withheld.

    Bayes' rule with equally frequent classes. Raises ValueError for a pair that no class has.
    """
    likelihood = np.array(
        [np.mean([look in (None, a) and motion in (None, b) for a, b in cells]) for cells in CELLS.values()]
    )
    if not likelihood.any():
        raise ValueError(f"answer: no class is {look} and goes {motion}")
    return np.asarray(likelihood / likelihood.sum(), np.float64)


def clip(index: int, *, seed: int, withhold: Collection[Cue] = (), shapes: int | None = None) -> Clip:
    """Clip ``index`` of the stream of ``seed``, with some cues withheld.

    ``shapes`` fixes how many there are (1 or 2), which otherwise is drawn.
    """
    rng = np.random.default_rng((seed, index))
    drawn = int(rng.integers(1, MOST + 1))
    count = drawn if shapes is None else shapes
    swimmers = [_draw(rng, *place) for place in _places(rng, count)]
    still = int(rng.integers(FRAMES))
    background = _texture(rng)
    painted = [_paint(background, swimmers, time) for time in range(FRAMES)]
    seen, masks = np.stack([frame for frame, _ in painted]), np.stack([mask for _, mask in painted], 1)
    seen += NOISE * rng.standard_normal(seen.shape, np.float32)
    frames = np.round(np.clip(seen, 0.0, 1.0) * 255).astype(np.uint8)
    if "look" in withhold:
        frames = neutral(frames, np.any(masks, axis=0))
    if "motion" in withhold:
        order = freeze(FRAMES, still)
        frames, masks = reorder(frames, order), masks[:, order]
    return Clip(
        frames=frames,
        classes=np.array([shape.class_index for shape in swimmers]),
        looks=np.array([LOOKS.index(shape.look) for shape in swimmers]),
        motions=np.array([MOTIONS.index(shape.motion) for shape in swimmers]),
        masks=masks,
        withheld=frozenset(withhold),
    )


def clips(
    count: int, *, seed: int, start: int = 0, withhold: Collection[Cue] = (), shapes: int | None = None
) -> list[Clip]:
    """Clips ``start`` to ``start + count`` of the stream of ``seed``."""
    return [clip(index, seed=seed, withhold=withhold, shapes=shapes) for index in range(start, start + count)]


def balanced(per_class: int, *, seed: int, start: int = 0) -> list[int]:
    """Indices of clips of one shape, ascending from ``start``, that hold every class ``per_class`` times."""
    wanted = dict.fromkeys(range(len(CLASSES)), per_class)
    found, index = [], start
    while any(wanted.values()):
        kind = int(clip(index, seed=seed, shapes=1).classes[0])
        if wanted[kind]:
            wanted[kind] -= 1
            found.append(index)
        index += 1
    return found


def write_dataset(folder: Path | str, clips: int | Sequence[int], *, seed: int, shapes: int | None = None) -> Path:
    """Write clips, masks, ``manifest.csv`` and ``tracks.json`` to ``folder``; returns the manifest's path.

    ``clips`` is how many of the stream, or their indices.
    A clip is a folder of PNG frames: nothing is lost by video compression. ``manifest.csv`` has the columns path,
    label (of the largest shape), mask (a folder with one mask a frame, all shapes together), fps, told_by and
    shapes (how many). ``tracks.json`` maps each path to its shapes: label, look, motion, told_by and mask. Files
    of an earlier call with the same arguments are written again, byte for byte alike.
    """
    root = Path(folder)
    rows, truth = [], {}
    for index in range(clips) if isinstance(clips, int) else clips:
        drawn = clip(index, seed=seed, shapes=shapes)
        frames, union = f"clips/{index:05d}", f"masks/{index:05d}"
        _write_frames(root / frames, drawn.frames)
        _write_frames(root / union, np.where(np.any(drawn.masks, axis=0), np.uint8(255), np.uint8(0)))
        tracks = [_describe(root, f"masks/{index:05d}_{number}", drawn, number) for number in range(len(drawn))]
        largest = tracks[int(drawn.masks.sum((1, 2, 3)).argmax())]
        rows.append((frames, largest["label"], union, RATE, largest["told_by"], len(drawn)))
        truth[frames] = tracks
    document = {"schema_version": 1, "classes": CLASSES, "rate": RATE, "clips": truth}
    (root / "tracks.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    manifest = root / "manifest.csv"
    with manifest.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("path", "label", "mask", "fps", "told_by", "shapes"), *rows])
    return manifest


def _describe(root: Path, mask: str, drawn: Clip, number: int) -> dict[str, str]:
    """One shape of one clip, its masks written."""
    _write_frames(root / mask, drawn.masks[number].astype(np.uint8) * 255)
    label = CLASSES[drawn.classes[number]]
    look, motion = LOOKS[drawn.looks[number]], MOTIONS[drawn.motions[number]]
    return {"label": label, "look": look, "motion": motion, "told_by": TOLD_BY[label], "mask": mask}


def _write_frames(folder: Path, frames: NDArray[np.uint8]) -> None:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for time, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{time:03d}.png")


# --------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Shape:
    """What a shape is; ``start``, ``wobble`` in pixels, ``tones`` (light, dark) RGB in [0, 1]."""

    class_index: int
    look: str
    motion: str
    start: tuple[float, float]
    radius: float
    outline: int
    speed: float
    phase: float
    tones: NDArray[np.float32]

    def centre(self, time: int) -> tuple[float, float]:
        """Where it is in frame ``time``: (y, x)."""
        down, right = _STEPS[self.motion]
        way, side = self.speed * time, WOBBLE * (np.sin(1.6 * time + self.phase) - np.sin(self.phase))
        return self.start[0] + down * way + abs(right) * side, self.start[1] + right * way + abs(down) * side

    def inside(self, time: int) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
        """Pixels that it covers, and its own coordinates (v down, u right, 1 at the radius): (y, x) each."""
        y, x = self.centre(time)
        v, u = (_Y - np.float32(y)) / self.radius, (_X - np.float32(x)) / self.radius
        outlines = (u * u + v * v < 1.0, np.maximum(np.abs(u), np.abs(v)) < 0.87, np.abs(u) + np.abs(v) < 1.25)
        return outlines[self.outline], v, u


def _draw(rng: np.random.Generator, y: float, x: float, radius: float) -> _Shape:
    """A shape of a random class at a place; colours are drawn whatever the class."""
    kind = int(rng.integers(len(CLASSES)))
    cells = CELLS[CLASSES[kind]]
    look, motion = cells[int(rng.integers(len(cells)))]
    mean = 0.55 + rng.uniform(-0.12, 0.12, 3)
    contrast = rng.uniform(0.2, 0.3)
    return _Shape(
        class_index=kind,
        look=look,
        motion=motion,
        start=(y, x),
        radius=radius,
        outline=int(rng.integers(3)),
        speed=float(rng.uniform(*SPEED)),
        phase=float(rng.uniform(0.0, 2 * np.pi)),
        tones=np.stack([mean + contrast, mean - contrast]).astype(np.float32),
    )


def _paint(
    background: NDArray[np.float32], shapes: list[_Shape], time: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """One frame without noise ``(y, x, channel)``, and the visible pixels ``(track, y, x)``."""
    seen, masks = background.copy(), np.zeros((len(shapes), SIZE, SIZE), np.bool_)
    for number, shape in enumerate(shapes):
        inside, v, u = shape.inside(time)
        light, dark = shape.tones
        seen = np.where(inside[..., None], np.where(_light(shape.look, v, u)[..., None], light, dark), seen)
        masks[:number] &= ~inside
        masks[number] = inside
    return seen, masks


def _light(look: str, v: NDArray[np.float32], u: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a texture has its light tone; about half of the shape, and the same for u and -u."""
    if look == "striped":
        tone = np.sin(2.5 * np.pi * v)
    elif look == "spotted":
        tone = np.cos(2.2 * np.pi * u) * np.cos(2.2 * np.pi * v)
    elif look == "ringed":
        tone = np.abs(np.hypot(u, v) - 0.5) - 0.25
    else:
        tone = -v
    return np.asarray(tone > 0)


def _places(rng: np.random.Generator, count: int) -> NDArray[np.float64]:
    """Where shapes start, not too close: (shape, [y, x, radius]). Independent of which way they will go."""
    while True:
        radius = rng.uniform(*RADIUS, count)
        centre = rng.uniform(*START, (count, 2))
        apart = np.linalg.norm(centre[:, None] - centre[None], axis=-1)
        least = CLOSEST * (radius[:, None] + radius[None])
        if np.all((apart > least)[np.triu_indices(count, 1)]):
            return np.column_stack([centre, radius])


def _texture(rng: np.random.Generator) -> NDArray[np.float32]:
    """Dark water: a level and three plane waves with a colour of their own, (y, x, channel)."""
    level = rng.uniform(0.15, 0.3) + np.array([-0.05, 0.02, 0.05])
    frequency = rng.uniform(-0.5, 0.5, (3, 2))  # radians a pixel
    phase = rng.uniform(0.0, 2 * np.pi, 3)
    tint = rng.uniform(-0.12, 0.12, (3, 3)) / np.sqrt(3)
    waves = np.sin(frequency[:, 0, None, None] * _Y + frequency[:, 1, None, None] * _X + phase[:, None, None])
    return np.asarray(level + np.einsum("wyx,wc->yxc", waves, tint), np.float32)
