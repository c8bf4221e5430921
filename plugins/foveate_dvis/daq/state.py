"""What the tracker remembers of a clip between two frames, and between two blocks of frames.

Plain data. Within a block the tensors stay in the autograd graph, so that a class score can be followed back
through the recurrence; :meth:`TrackerState.detached` is what a block hands on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from foveate_dvis.daq.outputs import Track

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TrackMemory:
    """One track as the tracker remembers it.

    ``appearance``: valid or not, a frame of its life; ``misses``: consecutive invalid frames now; ``state``
    (channel,): its row's last output, the query of the next frame; ``position`` (channel,): blended position
    memory; ``stored`` (position,) of (channel,): positions of its last valid frames; ``logit_sum`` (class + 1,):
    over its life; ``states``: (channel,) a frame of its life, kept for a refiner only.
    """

    id: int
    start: int
    appearance: tuple[bool, ...]
    misses: int
    dead: bool
    state: Tensor
    position: Tensor
    stored: tuple[Tensor, ...]
    logit_sum: Tensor
    states: tuple[Tensor, ...] = ()

    @property
    def end(self) -> int:
        """The frame after its last."""
        return self.start + len(self.appearance)

    @property
    def track(self) -> Track:
        """The plain facts."""
        return Track(self.id, self.start, self.appearance, self.dead)

    @property
    def logits(self) -> Tensor:
        """Class logits (class + 1), mean over the frames of its life, valid or not."""
        return self.logit_sum / len(self.appearance)

    def map(self, change: Callable[[Tensor], Tensor]) -> TrackMemory:
        """With ``change`` applied to every tensor."""
        return replace(
            self,
            state=change(self.state),
            position=change(self.position),
            stored=tuple(change(one) for one in self.stored),
            logit_sum=change(self.logit_sum),
            states=tuple(change(one) for one in self.states),
        )


@dataclass(frozen=True)
class FrameMemory:
    """What the refiner needs of a frame: segmenter ``embeds`` (query, channel), ``logits`` (query, class + 1)."""

    embeds: Tensor
    logits: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> FrameMemory:
        """With ``change`` applied to every tensor."""
        return FrameMemory(change(self.embeds), change(self.logits))


@dataclass(frozen=True)
class TrackerState:
    """All that the next frame depends on. ``next_frame``: its number; ``tracks``: in the order of creation.

    ``frames``: one :class:`FrameMemory` for every frame read so far; offline mode only, else empty.
    """

    next_frame: int = 0
    tracks: tuple[TrackMemory, ...] = ()
    frames: tuple[FrameMemory, ...] = ()

    @property
    def live(self) -> tuple[TrackMemory, ...]:
        """The tracks that are carried into the next frame, in the order of the tracker's rows."""
        return tuple(track for track in self.tracks if not track.dead)

    def replaced(self, changed: Mapping[int, TrackMemory]) -> tuple[TrackMemory, ...]:
        """``tracks`` with those of ``changed`` (by id) in the place of the old ones."""
        return tuple(changed.get(track.id, track) for track in self.tracks)

    def remembering(self, frame: FrameMemory) -> TrackerState:
        """With one frame more for the refiner."""
        return replace(self, frames=(*self.frames, frame))

    def map(self, change: Callable[[Tensor], Tensor]) -> TrackerState:
        """With ``change`` applied to every tensor."""
        return replace(
            self,
            tracks=tuple(track.map(change) for track in self.tracks),
            frames=tuple(frame.map(change) for frame in self.frames),
        )

    def detached(self) -> TrackerState:
        """Cut off from the autograd graph; memory of earlier activations can then be freed."""
        return self.map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> TrackerState:
        """On another device."""
        return self.map(lambda tensor: tensor.to(device))
