"""Sizes of recorded calls, and the sites that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foveate_dvis.module_sites import FoundSite, Room, Shape, found_sites
from foveate_dvis.recording import RecordedCall, Recording


def recorded_sites(recording: Recording, calls: Mapping[str, Sequence[RecordedCall]]) -> dict[str, FoundSite]:
    """Sites by id of recorded modules (path -> its calls); see :func:`~foveate_dvis.module_sites.found_sites`."""
    shapes = {path: [_shape(recording, call) for call in made] for path, made in calls.items()}
    return found_sites(shapes, Room(recording.padded, frames=len(recording.frames)))


def _shape(recording: Recording, call: RecordedCall) -> Shape:
    size = recording.weights(call).shape
    if call.form != "deformable":
        return Shape(*size)
    levels = tuple((int(rows), int(columns)) for rows, columns in recording[call.name("shapes")])
    return Shape(size[0], size[2], size[1], sum(rows * columns for rows, columns in levels), levels, "deformable")
