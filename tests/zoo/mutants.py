"""Mistakes that an engine could make, each made on purpose in a copy of a record.

A mutant is applied where it changes something by construction (one head cannot be swapped); whether
the comparison then notices is the question.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch

from foveate.capture.deformable import DeformableRecord, Level
from foveate.capture.dense import DenseRecord
from foveate.capture.materialised import MaterialisedRecord
from foveate.capture.records import Record

Mutation = Callable[[Record], Record | None]


def swapped_heads(record: Record) -> Record | None:
    """Heads in reverse order."""
    if record.shape.heads < 2 or record.shape.keys < 2:
        return None
    other = copy.copy(record)
    if isinstance(other, DenseRecord):
        if other.q.shape[1] != other.k.shape[1]:
            return None
        other.q, other.k = other.q.flip(1), other.k.flip(1)
        if other.mask is not None:
            other.mask = other.mask.flip(1)
    elif isinstance(other, MaterialisedRecord | DeformableRecord):
        other.weights = other.weights.flip(1)
    return other


def lost_scale(record: Record) -> Record | None:
    """Scores used as they are, without 1 / sqrt(d)."""
    if not isinstance(record, DenseRecord) or abs(record.scale - 1) < 0.1 or record.shape.keys < 2:
        return None
    other = copy.copy(record)
    other.scale = 1.0
    return other


def lost_mask(record: Record) -> Record | None:
    """Scores without the mask or bias that SDPA was given."""
    if not isinstance(record, DenseRecord) or not _masks(record):
        return None
    other = copy.copy(record)
    other.mask, other.causal = None, False
    return other


def _masks(record: DenseRecord) -> bool:
    if record.causal:
        return record.shape.keys > 1
    if record.mask is None or record.shape.keys < 2:
        return False
    if record.mask.dtype == torch.bool:
        shown = record.mask.any(-1)  # a row without any key is zero either way: compared elsewhere
        return bool((~record.mask).any(-1)[shown].any())
    spread = record.mask.amax(-1) - record.mask.amin(-1)
    return bool((spread > 0.1).any())


def transposed(record: Record) -> Record | None:
    """Queries and keys exchanged."""
    shape = record.shape
    if shape.queries != shape.keys or shape.keys < 2:
        return None
    other = copy.copy(record)
    if isinstance(other, DenseRecord) and other.q.shape[1] == other.k.shape[1]:
        other.q, other.k = other.k, other.q
        if other.mask is not None and other.mask.shape[-1] == other.mask.shape[-2]:
            other.mask = other.mask.transpose(-1, -2)
    elif isinstance(other, MaterialisedRecord):
        other.weights = other.weights.transpose(-1, -2)
    else:
        return None
    return other


def exchanged_axes(record: Record) -> Record | None:
    """Sampling points with x and y exchanged."""
    if not isinstance(record, DeformableRecord) or not all(isinstance(s, Level) for s in record.levels):
        return None
    other = copy.copy(record)
    other.levels = tuple(Level(s.values, s.grid.flip(-1), s.align_corners) for s in record.levels)
    return other


def shifted_pixels(record: Record) -> Record | None:
    """Sampling points half a pixel off: the other meaning of ``align_corners``."""
    if not isinstance(record, DeformableRecord) or not all(isinstance(s, Level) for s in record.levels):
        return None
    if max(max(s.size) for s in record.levels) < 2:
        return None
    other = copy.copy(record)
    other.levels = tuple(Level(s.values, s.grid, not s.align_corners) for s in record.levels)
    return other


MUTATIONS: dict[str, Mutation] = {
    "swapped heads": swapped_heads,
    "lost scale": lost_scale,
    "lost mask or bias": lost_mask,
    "transposed": transposed,
    "exchanged axes": exchanged_axes,
    "shifted pixels": shifted_pixels,
}


def mutants(records: list[Record]) -> Iterator[tuple[str, int, Record]]:
    """Every mutant of every record with its kind and position, and each record in the place of another layer's."""
    for position, record in enumerate(records):
        for kind, mutate in MUTATIONS.items():
            mutant = mutate(record)
            if mutant is not None:
                yield kind, position, mutant
        other = next((r for r in records[position + 1 :] if _stands_for(record, r)), None)
        if other is not None:
            yield "shifted layer", position, other


def _stands_for(record: Record, other: Record) -> bool:
    same = record.shape == other.shape and record.form == other.form
    return same and record.name != other.name and record.shape.keys > 1
