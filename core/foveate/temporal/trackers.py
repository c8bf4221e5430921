"""What a tracker may offer beside its attention, so that identity and recurrence can be analysed.

Masks of all the queries that a tracker chooses among, and the exact split of its state by frames, are known to the
model alone. A source that has :class:`Carried` frames or :class:`Reach` of its tracks gives them by these methods;
the analyses ``identity`` and ``recurrence`` of ``foveate analyse`` are for such sources.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from foveate.interfaces import Batch


@dataclass(frozen=True, eq=False)
class Carried:
    """One frame into which tracks were carried over from the frame before.

    ``attention`` (track, query): what each track's row reads of the frame's queries; ``tracks`` their ids;
    ``track_masks`` and ``query_masks`` bool (track | query, y, x) in this frame, on the same pixels.
    """

    frame: int
    tracks: tuple[str, ...]
    attention: NDArray[np.float64]
    track_masks: NDArray[np.bool_]
    query_masks: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Reach:
    """How far back one track's state reaches, (frame, source frame), NaN where the track is not there.

    ``shares``: exact norms of what each frame contributed, as shares of the row; ``halved``: the same by rollout
    with an even residual, which says nothing of the model (of one frame it leaves at most 2^-layers of the past).
    ``error``: of the exact split, against the model's own logits.
    """

    track: str
    shares: NDArray[np.float64]
    halved: NDArray[np.float64]
    error: float


@runtime_checkable
class CarryingSource(Protocol):
    """A source whose tracks read from the queries of each frame."""

    def carried(self, batch: Batch) -> list[list[Carried]]:
        """For every sample the frames into which tracks were carried."""


@runtime_checkable
class RecurrentSource(Protocol):
    """A source whose tracks carry a state from frame to frame."""

    def reach(self, batch: Batch, *, untrained: bool = False) -> list[list[Reach]]:
        """For every sample its tracks; of the same tracks by ``untrained`` weights, where that is asked for.

        Raises UsageError where the model, as opened, has no such recurrence.
        """
