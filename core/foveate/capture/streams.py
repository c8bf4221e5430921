"""Vectors over token streams: how a row of a product of matrices is swept through a model.

A sweep never forms an N x N product. It carries, for each stream, vectors ``(sample, slot, token)`` - one
slot for each explained row of a sample - and multiplies them with one attention matrix at a time,
last step first. Here are the two changes of layout that sweeps need: rows of targets to and from slots of
samples, and a stream's tokens to and from the batch axis of calls on windows, frames or tracks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.capture.trace import Trace
from foveate.errors import CaptureError
from foveate.interfaces import BoundTarget, CallLabels, Site


@dataclass(frozen=True)
class Packing:
    """Which (sample, slot) holds which row."""

    samples: int
    sample: tuple[int, ...]
    slot: tuple[int, ...]

    @classmethod
    def of(cls, samples: int, sample_of_row: list[int]) -> Packing:
        """Rows of one sample take its slots in order."""
        used = [0] * samples
        slots = []
        for sample in sample_of_row:
            slots.append(used[sample])
            used[sample] += 1
        return cls(samples, tuple(sample_of_row), tuple(slots))

    def pack(self, rows: Tensor) -> Tensor:
        """``(row, token)`` to ``(sample, slot, token)``, zero in unused slots."""
        packed = rows.new_zeros(self.samples, max(self.slot, default=0) + 1, rows.shape[-1])
        packed[list(self.sample), list(self.slot)] = rows
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """``(sample, slot, token)`` to ``(row, token)``."""
        return packed[list(self.sample), list(self.slot)]


def start_of_reading(trace: Trace, bound: BoundTarget | None = None) -> tuple[Site, Tensor]:
    """The site where the answer is read from, and the weights over its queries ``(sample | target, query)``."""
    readouts = trace.readout(bound)
    if not readouts:
        raise CaptureError(
            "sweep: the source names no readout, so there is no row to start from",
            remedy="return it from AttentionSource.readout",
        )
    site_id, readout = next(iter(readouts.items()))
    site = next(site for site in trace.source.sites if site.id == site_id)
    expected = len(trace.batch) if bound is None else len(bound)
    if len(readout.weights) != expected:
        raise CaptureError(f"sweep: {len(readout.weights)} readout rows of {site_id}, expected {expected}")
    device = trace.batch.inputs.device
    return site, readout.weights.detach().to(device, torch.float32)


def packing_of(trace: Trace, bound: BoundTarget | None) -> Packing:
    """One slot a sample, or one for each row of ``bound``."""
    count = len(trace.batch)
    rows = list(range(count)) if bound is None else [row.sample for row in bound.rows]
    return Packing.of(count, rows)


def through_calls(
    vectors: Tensor, labels: CallLabels, tokens: tuple[int, int], product: Callable[[Tensor], Tensor]
) -> Tensor:
    """Apply a product of calls ``(batch, slot, in) -> (batch, slot, out)`` to a stream's vectors.

    ``vectors`` is ``(sample, slot, group * in)``, with the call's group axes (windows, frames) in the order
    of ``labels.leading``; the result ``(sample, slot, group * out)``. ``tokens`` is (in, out).
    """
    samples, slots, length = vectors.shape
    names = [name for name, _ in labels.leading]
    sizes = [size for _, size in labels.leading]
    groups = [size for name, size in labels.leading if name != "sample"]
    if length != math.prod(groups) * tokens[0] or dict(labels.leading)["sample"] != samples:
        raise CaptureError(
            f"sweep: a stream of {length} tokens and {samples} samples meets calls of {tokens[0]} tokens "
            f"with leading axes {labels.leading}",
            remedy="add the MergeStep that cuts the stream into windows to AttentionSource.flow",
        )
    split = vectors.reshape(samples, slots, *groups, tokens[0])
    # (sample, slot, *groups, token) -> (*leading, slot, token)
    inner = iter(range(2, 2 + len(groups)))
    order = [0 if name == "sample" else next(inner) for name in names]
    last = split.dim() - 1
    calls = split.permute(*order, 1, last).reshape(math.prod(sizes), slots, tokens[0])
    back = product(calls).reshape(*sizes, slots, tokens[1])
    axes = [names.index("sample"), len(names), *(i for i, n in enumerate(names) if n != "sample"), len(names) + 1]
    return back.permute(*axes).reshape(samples, slots, math.prod(groups) * tokens[1])


def bottom_rows(trace: Trace, found: Tensor | None, stopped: str, tokens_elsewhere: list[str]) -> Tensor:
    """What arrived at the bottom stream, or a CaptureError that says where the sweep ended instead."""
    if found is None:
        end = f"an opaque step, {stopped!r}" if stopped else "the first step"
        raise CaptureError(
            f"sweep: reached {end} with vectors over {tokens_elsewhere}, but not the stream {trace.stream!r}",
            remedy="AttentionSource.stream must name a stream above the last opaque step of its flow",
        )
    return found
