"""Sham interventions: as many pixels changed as by a real one, and neither cue touched.

A model's score can fall because a cue is gone, or because the clip looks like nothing it was trained on. The sham
tells the second from the first. It adds one still pattern of grey specks to every frame, at random places outside
everything that the masks cover at any time: the object keeps its look and its motion, and nothing new moves. The
number of changed pixels and the L2 norm of the change are those of the real intervention, as far as the free area
and the range of grey levels allow; what was reached is measured and recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Clip = NDArray[np.uint8]
    Masks = NDArray[np.bool_]

ROUNDS = 24
"""Rounds in which pixels that cannot change further leave the rest of the norm to the others."""


class Change(NamedTuple):
    """Size of a change: how many (frame, y, x) places differ, and the L1 and L2 norms in grey levels."""

    pixels: int
    l1: float
    l2: float


def change_of(before: Clip, after: Clip) -> Change:
    """The size of the change between two clips of one shape."""
    difference = after.astype(np.float64) - before.astype(np.float64)
    return Change(
        int(difference.any(-1).sum()), float(np.abs(difference).sum()), float(np.sqrt((difference**2).sum()))
    )


class Sham(NamedTuple):
    """A sham clip, and whether its pattern kept off the masks (False: nothing was free, it covers all)."""

    clip: Clip
    apart: bool


def sham_of(clip: Clip, changed: Clip, protect: Masks | None, seed: int) -> Sham:
    """The sham of the intervention that made ``changed`` out of ``clip``; ``protect`` (frame, y, x) is kept.

    Each chosen place gets one change for all frames and channels, towards the end of the grey scale that is
    farther; sizes follow the distribution of the real changes.
    """
    wanted = change_of(clip, changed)
    if not wanted.pixels:
        return Sham(clip.copy(), True)
    frames = len(clip)
    covered = np.zeros(clip.shape[1:3], bool) if protect is None else protect.any(0)
    apart = not covered.all()
    free = np.flatnonzero(~covered) if apart else np.arange(covered.size)
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(free)[: max(1, round(wanted.pixels / frames))]
    at = clip.reshape(frames, -1, clip.shape[-1])[:, chosen].astype(np.float64)
    up = at.mean((0, 2)) < 127.5
    room = np.where(up, 255.0 - at.max((0, 2)), at.min((0, 2)))
    shift = _sizes(_norms(clip, changed), room, wanted.l2, frames * clip.shape[-1], rng) * np.where(up, 1.0, -1.0)
    out = clip.copy()
    out.reshape(frames, -1, clip.shape[-1])[:, chosen] = np.rint(at + shift[None, :, None]).astype(np.uint8)
    return Sham(out, apart)


def _norms(clip: Clip, changed: Clip) -> NDArray[np.float64]:
    """Per changed (frame, y, x) place the L2 norm over channels, ascending."""
    difference = changed.astype(np.float64) - clip.astype(np.float64)
    norms = np.sqrt((difference**2).sum(-1)).ravel()
    return np.sort(norms[norms > 0])


def _sizes(
    norms: NDArray[np.float64], room: NDArray[np.float64], l2: float, copies: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    """One size a place, at least 1 and at most its room, such that ``copies`` times their squares come to l2^2."""
    even = (np.arange(room.size) + 0.5) / room.size
    sizes = rng.permutation(np.quantile(norms, even))
    target = l2**2 / copies
    sizes *= np.sqrt(target / (sizes**2).sum())
    for _ in range(ROUNDS):
        held = sizes >= room
        sizes = np.where(held, room, sizes)
        rest = (sizes[~held] ** 2).sum()
        left = target - (sizes[held] ** 2).sum()
        if not rest or left <= 0:
            break
        factor = np.sqrt(left / rest)
        sizes = np.where(held, sizes, sizes * factor)
        if abs(factor - 1.0) < 1e-6:
            break
    return np.asarray(np.clip(sizes, np.minimum(1.0, room), room))
