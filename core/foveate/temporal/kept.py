"""Whether a tracker still follows the same object after a clip was changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Masks = NDArray[np.bool_]

OVERLAP = 0.5
"""IoU in a frame from which a mask counts as the same object (Lin et al. 2014, COCO: AP50)."""


def frames_lost(own: Masks, tracks: Sequence[Masks], overlap: float = OVERLAP) -> float:
    """Share of the frames that show ``own`` (frame, y, x) in which its match is lost, in [0, 1].

    The match is the one track with the largest IoU over the whole clip: a tracker that gives the object another
    identity half way has lost it there, even where another track covers it. NaN where ``own`` is empty throughout.
    Raises UsageError where shapes differ.
    """
    shown = own.any((1, 2))
    if not shown.any():
        return float("nan")
    wrong = [track.shape for track in tracks if track.shape != own.shape]
    if wrong:
        raise UsageError(f"frames_lost: a track of shape {wrong[0]} beside one of {own.shape}")
    if not tracks:
        return 1.0
    match = max(tracks, key=lambda track: _iou(own.ravel(), track.ravel()))
    held = [_iou(own[t].ravel(), match[t].ravel()) >= overlap for t in np.flatnonzero(shown)]
    return 1.0 - float(np.mean(held))


def _iou(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0
