"""A batch of clips as DVIS-DAQ read it, and where each row, track and instance of it lies.

The network numbers its rows anew in every frame: carried tracks first, then one new-instance row a segmenter
query. Here they lie on one axis for the clip: the new-instance rows by query, then every track by its number,
which is the order of birth. So a track keeps its position for as long as it lives, and a longer clip only adds
positions.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from foveate.interfaces import TokenAxis
from foveate_dvis.daq.outputs import NEW, DaqOutputs, FrameRows


@dataclass(frozen=True)
class DaqClips:
    """One :class:`~foveate_dvis.daq.outputs.DaqOutputs` a sample; ``held``: whose decisions were kept."""

    clips: tuple[DaqOutputs, ...]
    ids: tuple[str, ...]
    held: tuple[bool, ...]
    queries: int
    slots: int
    window: int

    # ------------------------------------------------------------------------- sizes

    @cached_property
    def frames(self) -> int:
        """Frames of the longest clip in this block."""
        return max((len(clip.rows) for clip in self.clips), default=0)

    @cached_property
    def read_frames(self) -> int:
        """Frames that the refiner reads: of the longest clip, from its very beginning."""
        return max((clip.frames.stop for clip in self.clips), default=0)

    @cached_property
    def tracks(self) -> int:
        """Tracks begun so far, of the sample that has most."""
        return max((len(clip.tracks) for clip in self.clips), default=0)

    @cached_property
    def instances(self) -> int:
        """Refined instances, of the sample that has most."""
        return max((len(clip.refined.ids) for clip in self.clips if clip.refined is not None), default=0)

    # ------------------------------------------------------------------------- axes

    @cached_property
    def row_axis(self) -> TokenAxis:
        """New-instance rows (kind ``object``), then tracks (kind ``track``, labelled by their number)."""
        return TokenAxis.concat(TokenAxis.of_kind("object", self.queries), _tracks(self.tracks))

    @cached_property
    def slot_axis(self) -> TokenAxis:
        """Background slots (kind ``slot``), then tracks."""
        return TokenAxis.concat(TokenAxis.of_kind("slot", self.slots), _tracks(self.tracks))

    @cached_property
    def instance_axis(self) -> TokenAxis:
        """Refined instances in the order of the answer; labelled where the batch is one clip."""
        names: tuple[str, ...] | None = None
        if len(self.clips) == 1 and self.clips[0].refined is not None:
            names = self.clips[0].refined.names
        return TokenAxis.of_kind("track", self.instances, label=names)

    @cached_property
    def frame_axis(self) -> TokenAxis:
        """Frames as tokens."""
        axis = TokenAxis.of_kind("frame", self.read_frames)
        return replace(axis, frame=np.arange(self.read_frames, dtype=np.int32))

    @cached_property
    def query_axis(self) -> TokenAxis:
        """The segmenter's queries."""
        return TokenAxis.of_kind("object", self.queries)

    # ------------------------------------------------------------------------- where things lie

    def rows_at(self, rows: FrameRows) -> tuple[int, ...]:
        """Position on :attr:`row_axis` of every tracker row of a frame."""
        at = zip(rows.ids, rows.anchors, strict=True)
        return tuple(anchor if track == NEW else self.queries + track for track, anchor in at)

    def slots_at(self, rows: FrameRows) -> tuple[int, ...]:
        """Position on :attr:`slot_axis` of every row of the gate: carried tracks, then background slots."""
        carried = (self.slots + track for track in rows.ids if track != NEW)
        return (*carried, *range(self.slots))

    def life(self, sample: int, track: int) -> Iterator[tuple[int, int]]:
        """(frame of the block, position) of every row that is part of a track's answer, births included."""
        for frame, rows in enumerate(self.clips[sample].rows):
            for row, found in enumerate(rows.born):
                if found == track and track not in rows.deaths:
                    yield frame, self.rows_at(rows)[row]

    def decisions(self, sample: int) -> int:
        """A number that two runs share where they decided alike: which rows are tracks, which instances answer."""
        clip = self.clips[sample]
        refined = () if clip.refined is None else (clip.refined.ids, clip.refined.linked)
        told = ([(rows.ids, rows.valid) for rows in clip.rows], clip.ids, refined)
        return zlib.crc32(repr(told).encode())


def _tracks(count: int) -> TokenAxis:
    return TokenAxis.of_kind("track", count, label=tuple(map(str, range(count))))
