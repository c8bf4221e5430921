"""Which reference belongs to which record, and how far apart they are."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from foveate.capture.deformable import DeformableRecord
from foveate.capture.records import Record
from zoo.kernels import Call

TOLERANCE = 1e-5
"""max |difference| / max |reference| of float32 weights, for the same q and k."""
ROUNDING = 4 * 6e-8
"""Added to it per unit of the largest score: what float32 does not know of a score is a relative error of exp."""
EAGER_TOLERANCE = 5e-5
"""The same against the eager twin: two forwards on different kernels drift apart, and peaked layers amplify it."""
CAUGHT = 1e-3
"""A mutant farther than this from a reference is caught."""


@dataclass(eq=False)
class References:
    """By position of the record: what it must equal, from kernels and from the eager twin."""

    kernels: dict[int, Tensor] = field(default_factory=dict)
    eager: dict[int, Tensor] = field(default_factory=dict)
    slack: dict[int, float] = field(default_factory=dict)
    unclaimed: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    unmatched: list[str] = field(default_factory=list)

    def error(self, position: int, record: Record) -> float:
        """Largest distance of a record (or its mutant) from the references of a position; NaN without any."""
        references = (self.kernels.get(position), self.eager.get(position))
        found = [distance(record, reference) for reference in references if reference is not None]
        return max(found, default=math.nan)

    def noticed(self, position: int, mutant: Record) -> bool:
        """Whether the comparison rejects a mutant."""
        return self.error(position, mutant) > CAUGHT


def distance(record: Record, reference: Tensor) -> float:
    """max |A - reference| / max |reference| over rows that see a key; infinite where sizes differ."""
    found = record.rows(slice(None)).double()
    if found.shape[1] > 1 and found.numel() == found.shape[1] * reference.numel():
        found = found.mean(1)  # nn.MultiheadAttention returns the mean over heads
    if found.numel() != reference.numel() or found.shape[-1] != reference.shape[-1]:
        points = record.weights.transpose(1, 2) if isinstance(record, DeformableRecord) else None
        if points is None or points.numel() != reference.numel():
            return math.inf
        found = points.double()  # a model returns the weights of its points, not the cells they fall on
    seen = (found != 0).any(-1, keepdim=True).expand_as(found).reshape(reference.shape)
    found, reference = found.reshape(reference.shape), reference.double()
    if not bool(seen.any()):
        return math.inf
    off = torch.where(seen, found - reference, torch.zeros_like(reference)).abs().amax()
    size = torch.where(seen, reference, torch.zeros_like(reference)).abs().amax()
    return float(off / size) if size > 0 else math.inf


def assign(records: list[Record], calls: list[Call], ignored: dict[str, str]) -> References:
    """Give each record one kernel call of its own module; what is left over is ignored by name or unclaimed."""
    references = References()
    free = list(calls)
    for position, record in enumerate(records):
        options = [(distance(record, ref), call, ref) for call in free for ref in _reference(record, call)]
        if not options:
            references.unmatched.append(f"{record.name}: recorded, but no kernel ran there")
            continue
        _, call, ref = min(options, key=lambda option: option[0])
        free.remove(call)
        references.kernels[position], references.slack[position] = ref, ROUNDING * call.largest
    for call in free:
        reason = next((why for pattern, why in ignored.items() if fnmatchcase(call.owner, pattern)), "")
        (references.ignored if reason else references.unclaimed)[reason or f"{call.owner} ({call.kernel})"] += 1
    return references


def _reference(record: Record, call: Call) -> list[Tensor]:
    if call.owner != record.name or call.weights is None:
        return []
    if isinstance(record, DeformableRecord):
        return [call.splatted()] if len(call.samples) == len(record.levels) else []
    shape = record.shape
    same = call.weights.numel() == shape.batch * shape.heads * shape.queries * shape.keys
    return [call.weights] if same and call.weights.shape[-1] == shape.keys else []


def assign_eager(references: References, records: list[Record], maps: list[Tensor]) -> None:
    """Give each returned matrix the record that it equals best, in order; note those that none equals."""
    free = dict(enumerate(records))
    for number, matrix in enumerate(maps):
        if any(matrix.shape == earlier.shape and torch.equal(matrix, earlier) for earlier in maps[:number]):
            continue  # some return the same matrix under two names
        options = [(distance(record, matrix), position) for position, record in free.items()]
        error, position = min(options, default=(math.inf, -1))
        if math.isinf(error):
            references.unmatched.append(f"eager matrix {number} {tuple(matrix.shape)}: no record of this size")
        elif error > EAGER_TOLERANCE + 10 * references.slack.get(position, 0.0):
            references.unmatched.append(
                f"eager matrix {number} {tuple(matrix.shape)}: closest record off by {error:.1e}"
            )
        else:
            references.eager[position] = matrix
            del free[position]
