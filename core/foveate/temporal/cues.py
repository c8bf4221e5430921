"""Taking appearance or motion out of a clip, and leaving the other.

Motion is removed by showing one frame for all (:func:`freeze`) or the frames in another order (:func:`reorder`,
:func:`shuffled_order`); what every frame shows stays as it is. Reversed frames contradict the motion and remove
nothing.

Appearance is removed in one of three ways, by what is known of the clip:

- :func:`neutral`: pixels under a track of masks become one grey, the same in every clip. Exact where masks are;
  the silhouette stays, since it moves with the object, and counts as motion.
- :func:`scrambled`: no masks needed. Grey levels only, and pixels permuted within small blocks, anew in every
  frame: colour and fine texture are gone, displacements larger than a block stay.
- :func:`advected`: no masks needed. Noise carried along by the optical flow: no single frame shows anything at all
  (appearance-free video; Ilic, Pock and Wildes, ECCV 2022).

Clips are uint8 ``(frame, y, x, channel)``, masks bool ``(frame, y, x)``; nothing is changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from foveate.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Clip = NDArray[np.uint8]
    Masks = NDArray[np.bool_]

Frames = TypeVar("Frames", bound="NDArray[Any]")

GREY = 120
"""Level that replaces what is under a mask."""
BLOCK = 4
"""Pixels a side of the blocks within which pixels are permuted."""
LUMA = np.array([0.299, 0.587, 0.114])
"""ITU-R BT.601 weights of red, green and blue."""
STILL = 12.0
"""Grey levels: a smaller change from the clip's median picture never counts as motion."""

MEDIAN_OF = 31
"""Frames whose median is taken for the background, at most."""


# ------------------------------------------------------------------------------------------- motion


def freeze(frames: int, at: int) -> NDArray[np.intp]:
    """The order that shows frame ``at`` at all ``frames`` times."""
    if not 0 <= at < frames:
        raise UsageError(f"freeze: frame {at} of a clip of {frames}", remedy=f"0 to {frames - 1}")
    return np.full(frames, at, np.intp)


def freezing_frames(frames: int, count: int) -> list[int]:
    """Up to ``count`` different frames spread evenly over the clip, for freezing at each by turns.

    The middles of ``count`` equal parts: of one it is the middle frame.
    """
    count = min(count, frames)
    return [int((i + 0.5) * frames / count) for i in range(count)]


def shuffled_order(frames: int, seed: int) -> NDArray[np.intp]:
    """A uniformly random order, fixed by the seed."""
    return np.random.default_rng(seed).permutation(frames).astype(np.intp)


def reorder(frames: Frames, order: Sequence[int] | NDArray[np.intp]) -> Frames:
    """A clip (or its masks, any array with frames first) whose frame t is the old frame ``order[t]``."""
    return cast("Frames", np.take(frames, np.asarray(order, np.intp), axis=0))


# --------------------------------------------------------------------------------------- appearance


def neutral(clip: Clip, masks: Masks, level: int = GREY) -> Clip:
    """What is under the masks in one grey ``level``."""
    _check(clip, masks)
    out = clip.copy()
    out[masks] = level
    return out


def scrambled(clip: Clip, seed: int, block: int = BLOCK) -> Clip:
    """Grey levels, permuted within ``block x block`` pixels, in every frame and block otherwise."""
    if block < 1:
        raise UsageError(f"scrambled: blocks of {block} pixels", remedy="1 or more (1 takes only the colour out)")
    rng = np.random.default_rng(seed)
    grey = luminance(clip)
    out = grey.copy()
    for top in range(0, grey.shape[1], block):
        for left in range(0, grey.shape[2], block):
            part = grey[:, top : top + block, left : left + block]
            mixed = rng.permuted(part.reshape(len(part), -1), axis=1)
            out[:, top : top + block, left : left + block] = mixed.reshape(part.shape)
    return _as_clip(out)


def advected(clip: Clip, seed: int) -> Clip:
    """Grey noise that moves as the clip's pixels do; where flow leads outside the picture, noise is new.

    Optical flow is TV-L1 (Zach, Pock and Bischof 2007) by scikit-image, from every frame back to the one before.
    Raises MissingDependencyError without scikit-image.
    """
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, clip.shape[:3], np.uint8)
    out = noise.copy()
    height, width = clip.shape[1:3]
    grid = np.mgrid[0:height, 0:width]
    for t, flow in enumerate(flows(clip), start=1):
        y, x = np.rint(grid + flow).astype(np.intp)
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        out[t][inside] = out[t - 1][y[inside], x[inside]]
    return _as_clip(out)


def flows(clip: Clip) -> list[NDArray[np.float64]]:
    """For frames 1, 2, ...: where each pixel came from, ``(2, y, x)`` displacements (rows, columns) in pixels."""
    try:
        from skimage.registration import optical_flow_tvl1
    except ImportError:
        raise MissingDependencyError(
            "optical flow needs scikit-image", remedy='pip install "foveate[video]"'
        ) from None
    grey = luminance(clip).astype(np.float64) / 255.0
    return [np.asarray(optical_flow_tvl1(grey[t], grey[t - 1])) for t in range(1, len(grey))]


# -------------------------------------------------------------------------------------------- masks


def moving_masks(clip: Clip, background: NDArray[np.float32] | None = None) -> Masks:
    """Where something moves, where nobody gave masks: pixels far from the background, by default the clip's own.

    The distance is the largest over channels; the limit is Otsu's (1979), at least :data:`STILL`. Holds while the
    camera stands still. Raises MissingDependencyError without scikit-image.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError:
        raise MissingDependencyError(
            "masks from motion need scikit-image", remedy='pip install "foveate[video]", or give masks'
        ) from None
    still = background_of(clip) if background is None else background
    distance = np.stack([np.rint(np.abs(frame - still).max(-1)).astype(np.uint8) for frame in clip])
    if distance.max() <= STILL:
        return np.zeros(distance.shape, bool)
    return np.asarray(distance > max(float(threshold_otsu(distance)), STILL))


def background_of(clip: Clip) -> NDArray[np.float32]:
    """What stands still: the median ``(y, x, channel)`` of up to :data:`MEDIAN_OF` frames, evenly chosen."""
    chosen = np.unique(np.linspace(0, len(clip) - 1, MEDIAN_OF).round().astype(np.intp))
    return np.asarray(np.median(clip[chosen], axis=0), np.float32)


def luminance(clip: Clip) -> NDArray[np.uint8]:
    """Grey levels ``(frame, y, x)`` uint8 of a clip (ITU-R BT.601)."""
    return np.asarray(np.rint(clip.astype(np.float64) @ LUMA), np.uint8)


def _as_clip(grey: NDArray[np.uint8]) -> Clip:
    return np.repeat(grey[..., None], 3, axis=-1)


def _check(clip: Clip, masks: Masks) -> None:
    if masks.shape != clip.shape[:3]:
        raise UsageError(
            f"masks of shape {masks.shape} for a clip of {clip.shape}",
            remedy="one mask (y, x) for every frame: shape (frame, y, x)",
        )
