"""Shapley values of two cues: what appearance and motion each add to a score, and what only both together add.

With v(S) the score when only the cues in S are left (Shapley 1953; for two players, Grabisch and Roubens 1999, the
interaction index)::

    phi_appearance = ((v(a) - v(0)) + (v(am) - v(m))) / 2
    phi_motion     = ((v(m) - v(0)) + (v(am) - v(a))) / 2
    interaction    = v(am) - v(a) - v(m) + v(0)

phi_appearance + phi_motion = v(am) - v(0), the total effect. An interaction above 0 means that the cues do more
together than the sum of each alone (XOR); below 0, that one does what the other would do too (redundant cues).
All are linear in v, so they are computed for every video and averaged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.temporal.coalitions import CHANGED, COALITIONS

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class Effects:
    """Per video ``(video,)`` float64; ``alone`` is v(c) - v(none), ``given`` is v(both) - v(the other cue)."""

    appearance: NDArray[np.float64]
    motion: NDArray[np.float64]
    interaction: NDArray[np.float64]
    total: NDArray[np.float64]
    appearance_alone: NDArray[np.float64]
    motion_alone: NDArray[np.float64]
    appearance_given_motion: NDArray[np.float64]
    motion_given_appearance: NDArray[np.float64]

    def named(self) -> dict[str, NDArray[np.float64]]:
        """All of them by name, the two Shapley values first."""
        return dict(vars(self))


def effects(scores: Mapping[str, ArrayLike]) -> Effects:
    """Shapley values and interaction of every video from scores ``(video,)`` of the four coalitions.

    Raises UsageError where a coalition is missing or lengths differ.
    """
    none, appearance, motion, both = _columns(scores, COALITIONS)
    alone_a, alone_m = appearance - none, motion - none
    given_a, given_m = both - motion, both - appearance
    return Effects(
        appearance=(alone_a + given_a) / 2.0,
        motion=(alone_m + given_m) / 2.0,
        interaction=given_a - alone_a,
        total=both - none,
        appearance_alone=alone_a,
        motion_alone=alone_m,
        appearance_given_motion=given_a,
        motion_given_appearance=given_m,
    )


def sham_corrected(scores: Mapping[str, ArrayLike]) -> dict[str, NDArray[np.float64]]:
    """Scores of the coalitions less what their shams did: v(S) + (v(both) - v(sham S)), by video.

    A sham changes as much of the clip and no cue; what it costs is the price of an unusual clip, not of a lost
    cue. ``scores`` also holds ``sham none``, ``sham appearance`` and ``sham motion``.
    """
    columns = dict(zip(COALITIONS, _columns(scores, COALITIONS), strict=True))
    shams = _columns(scores, tuple(f"sham {name}" for name in CHANGED))
    corrected: dict[str, NDArray[np.float64]] = {"both": columns["both"]}
    for name, sham in zip(CHANGED, shams, strict=True):
        corrected[name] = columns[name] + (columns["both"] - sham)
    return {name: corrected[name] for name in COALITIONS}


def _columns(scores: Mapping[str, ArrayLike], names: tuple[str, ...]) -> list[NDArray[np.float64]]:
    missing = [name for name in names if name not in scores]
    if missing:
        raise UsageError(f"no scores of {', '.join(missing)}", remedy=f"needed are {', '.join(names)}")
    columns = [np.asarray(scores[name], np.float64) for name in names]
    if any(column.ndim != 1 or column.shape != columns[0].shape for column in columns):
        raise UsageError(
            f"scores of shapes {[column.shape for column in columns]}", remedy="one number a video: (video,)"
        )
    return columns
