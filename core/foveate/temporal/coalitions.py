"""The four coalitions of {appearance, motion} of one clip, and the sham of each.

``both`` is the clip itself; ``appearance`` keeps appearance (motion is removed), ``motion`` keeps motion
(appearance is removed), ``none`` keeps neither. Where a removal has a free choice (which frame is frozen, which
noise), each coalition is made several times and scores are averaged: the choice is no property of the clip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import SampleError, UsageError
from foveate.temporal import cues
from foveate.temporal.sham import Change, change_of, sham_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Clip = NDArray[np.uint8]
    Masks = NDArray[np.bool_]

Appearance = Literal["neutral", "scrambled", "advected"]
Motion = Literal["freeze", "shuffle"]
Coalition = Literal["none", "appearance", "motion", "both"]
COALITIONS: tuple[Coalition, ...] = ("none", "appearance", "motion", "both")
CHANGED: tuple[Coalition, ...] = ("none", "appearance", "motion")


@dataclass(frozen=True)
class Removal:
    """How cues are removed.

    ``draws``: how often each coalition is made, with other frames frozen or other orders and noise. ``level`` is
    the grey of ``neutral``, ``block`` the pixels of ``scrambled``. Everything random follows from ``seed``.
    """

    appearance: Appearance = "neutral"
    motion: Motion = "freeze"
    draws: int = 4
    level: int = cues.GREY
    block: int = cues.BLOCK
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("appearance", ("neutral", "scrambled", "advected")),
            ("motion", ("freeze", "shuffle")),
        ):
            if getattr(self, name) not in known:
                raise UsageError(f"Removal: {name}={getattr(self, name)!r}", remedy=f"one of {', '.join(known)}")
        if self.draws < 1 or not 0 <= self.level <= 255:
            raise UsageError(
                f"Removal: draws={self.draws}, level={self.level}", remedy="draws >= 1, level 0 to 255"
            )

    def record(self) -> dict[str, Any]:
        """All that fixes it, as plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Variant:
    """One changed clip.

    ``order[t]`` is the original frame behind frame t, ``masks`` the masks that fit it. ``sham`` marks the control;
    ``change`` is its size against the intact clip, ``apart`` whether a sham's pattern kept off the masks.
    """

    coalition: Coalition
    draw: int
    sham: bool
    clip: Clip
    masks: Masks | None
    order: NDArray[np.intp]
    change: Change
    apart: bool = True


def variants(clip: Clip, masks: Masks | None, removal: Removal, *, video: int = 0) -> Iterator[Variant]:
    """Every changed clip that the test needs, and the sham of each: ``2 * 3 * draws`` at most, one at a time.

    ``clip`` is uint8 ``(frame, y, x, channel)``, ``masks`` bool ``(frame, y, x)`` or None. ``video`` numbers the
    clip within a study, so that no two share draws. ``neutral`` without masks takes them from motion
    (:func:`foveate.temporal.cues.moving_masks`). A coalition that has no free choice is made once. Raises
    SampleError for a clip of one frame (it has no motion to remove) and for masks that are empty throughout.
    """
    if len(clip) < 2:
        raise SampleError(f"a clip of {len(clip)} frame has no motion", remedy="give clips of two frames or more")
    tracked = cues.moving_masks(clip) if masks is None else masks
    if removal.appearance == "neutral" and not tracked.any():
        raise SampleError(
            "no pixel is under a mask, so there is no appearance to remove",
            remedy='give masks, or remove appearance otherwise (appearance="scrambled" or "advected")',
        )
    protect = tracked if tracked.any() else None
    for coalition in CHANGED:
        for draw in range(_draws(coalition, len(clip), removal)):
            seed = _seed(removal.seed, video, draw)
            changed, order = _changed(clip, tracked, coalition, draw, seed, removal)
            if draw == 0 or _free(coalition, removal):
                fitting = None if masks is None else cues.reorder(masks, order)
                yield Variant(coalition, draw, False, changed, fitting, order, change_of(clip, changed))
            control = sham_of(clip, changed, protect, seed)
            straight = np.arange(len(clip), dtype=np.intp)
            size = change_of(clip, control.clip)
            yield Variant(coalition, draw, True, control.clip, masks, straight, size, control.apart)


def _changed(
    clip: Clip, masks: Masks, coalition: Coalition, draw: int, seed: int, removal: Removal
) -> tuple[Clip, NDArray[np.intp]]:
    """The clip with only what the coalition keeps, and its order of frames."""
    out, order = clip, np.arange(len(clip), dtype=np.intp)
    if coalition in ("motion", "none"):
        out = _without_appearance(clip, masks, seed, removal)
    if coalition in ("appearance", "none"):
        order = _order(len(clip), draw, seed, removal)
        out = cues.reorder(out, order)
    return out, order


def _without_appearance(clip: Clip, masks: Masks, seed: int, removal: Removal) -> Clip:
    if removal.appearance == "neutral":
        return cues.neutral(clip, masks, removal.level)
    if removal.appearance == "scrambled":
        return cues.scrambled(clip, seed, removal.block)
    return cues.advected(clip, seed)


def _order(frames: int, draw: int, seed: int, removal: Removal) -> NDArray[np.intp]:
    if removal.motion == "shuffle":
        return cues.shuffled_order(frames, seed)
    return cues.freeze(frames, cues.freezing_frames(frames, removal.draws)[draw])


def _draws(coalition: Coalition, frames: int, removal: Removal) -> int:
    """How often a coalition (at least its sham) is made: a clip has no more frozen frames than frames."""
    return min(removal.draws, frames) if removal.motion == "freeze" and coalition != "motion" else removal.draws


def _free(coalition: Coalition, removal: Removal) -> bool:
    """Whether another draw gives another clip."""
    return coalition != "motion" or removal.appearance != "neutral"


def _seed(seed: int, video: int, draw: int) -> int:
    return int(np.random.SeedSequence([seed, video, draw]).generate_state(1)[0])
