"""Clips whose cause is known: a square's colour, the direction it swims in, both, or either.

Four tasks decide what an analysis of appearance and motion must find:

``colour``      the class is the colour (red or blue); the direction is random
``direction``   the class is the direction (left or right); the colour is any
``xor``         the class is colour XOR direction: neither alone says anything
``redundant``   colour and direction agree and each suffices: in one clip of four the square is grey, in one
                it stands still

The square swims once round a ring (what leaves on one side comes in on the other) from a random start, so that one
frame, or the frames in random order, say nothing of the direction: all that a frozen or shuffled clip still has is
appearance. The background is a still texture of grey noise and bright specks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

TaskName = Literal["colour", "direction", "xor", "redundant"]
TASKS: Mapping[str, str] = {
    "colour": "appearance",
    "direction": "motion",
    "xor": "both (interaction)",
    "redundant": "redundant",
}
"""Task -> the verdict that is true of a model that solves it."""

FRAMES, SIZE, SQUARE, STEP = 4, 12, 3, 3
"""Frames; pixels a side of clip and square; pixels the square moves from one frame to the next."""
COLOURS = np.array([[230, 50, 50], [50, 50, 230]], np.uint8)
NEUTRAL = 120
"""Grey level of a square without a colour."""
LABELS: Mapping[str, tuple[str, str]] = {
    "colour": ("red", "blue"),
    "direction": ("left", "right"),
    "xor": ("alike", "unlike"),
    "redundant": ("red left", "blue right"),
}


@dataclass(frozen=True, eq=False)
class MotionClips:
    """``clips`` uint8 (clip, frame, y, x, channel), ``masks`` bool (clip, frame, y, x), ``labels`` int64 (clip,).

    ``colours`` is 0 (red), 1 (blue) or -1 (grey; in ``direction`` any), ``directions`` -1, 1 or 0 (still).
    """

    task: str
    clips: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    labels: NDArray[np.int64]
    colours: NDArray[np.int64]
    directions: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def samples(self) -> list[Sample]:
        """As samples of a clip source: ids ``<task>-0``, ..., masks, 25 frames a second, a column ``label``."""
        times = np.arange(FRAMES) / 25.0
        return [
            Sample(
                f"{self.task}-{i}",
                self.clips[i],
                times=times,
                mask=self.masks[i],
                columns={"label": LABELS[self.task][int(self.labels[i])]},
            )
            for i in range(len(self))
        ]


def motion_clips(
    task: str, count: int, seed: int, *, alone: bool | None = None, spread: int = SIZE
) -> MotionClips:
    """``count`` clips of a task, balanced over its cues (clip i shows combination i mod 4), places at random.

    ``alone`` says whether clips with one cue are among them: None as the task is defined (only ``redundant`` has
    them), False never, True always (direction alone, colour alone by turns). ``spread`` is how many places of the
    ring the square may start at: all in the task, fewer for a beginner. Raises UsageError for an unknown task.
    """
    if task not in TASKS:
        raise UsageError(f"motion_clips: no task {task!r}", remedy=f"one of {', '.join(TASKS)}")
    rng = np.random.default_rng([seed, list(TASKS).index(task)])
    turn = np.arange(count)
    colour, towards = turn % 2, turn // 2 % 2
    if task == "redundant":
        towards = colour.copy()
    labels = {"colour": colour, "direction": towards, "xor": colour ^ towards, "redundant": colour}[task]
    direction = 2 * towards - 1
    lacks = np.full(count, 0)
    if task == "redundant" if alone is None else alone:
        lacks = turn // 2 % (4 if alone is None else 2) + (0 if alone is None else 1)
    colour, direction = np.where(lacks == 1, -1, colour), np.where(lacks == 2, 0, direction)
    paints = np.where(colour[:, None] >= 0, COLOURS[colour], NEUTRAL)
    if task == "direction":  # a model that only saw two colours would not find a square of a third
        colour, paints = np.full(count, -1), rng.integers(50, 231, (count, 3))
    clips, masks = paint(rng, paints, direction, spread)
    return MotionClips(task, clips, masks, labels.astype(np.int64), colour, direction)


def paint(
    rng: np.random.Generator, colours: NDArray[Any], directions: NDArray[np.int64], spread: int = SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Clips and masks for given cues: ``colours`` (clip, channel) 20 to 235, ``directions`` (clip,).

    Texture, row, start and a little lightness are drawn.
    """
    count = len(colours)
    rows, starts = rng.integers(0, SIZE - SQUARE + 1, count), rng.integers(0, spread, count)
    place = np.arange(SIZE)
    left = starts[:, None] + directions[:, None] * STEP * np.arange(FRAMES)
    inside_x = (place - left[:, :, None]) % SIZE < SQUARE
    inside_y = (place >= rows[:, None]) & (place < rows[:, None] + SQUARE)
    masks = inside_y[:, None, :, None] & inside_x[:, :, None, :]
    paints = colours.astype(np.int16) + rng.integers(-20, 21, (count, 1), np.int16)
    clips = np.where(masks[..., None], paints[:, None, None, None, :], _textures(rng, count)[:, None])
    return clips.astype(np.uint8), masks


def _textures(rng: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Still backgrounds (clip, y, x, 1): grey noise up to 50, every twelfth pixel a speck of any grey."""
    shape = (count, SIZE, SIZE, 1)
    noise = rng.integers(0, 51, shape, np.uint8)
    specks = rng.integers(0, 256, shape, np.uint8)
    return np.where(rng.integers(0, 12, shape, np.uint8) == 0, specks, noise)
