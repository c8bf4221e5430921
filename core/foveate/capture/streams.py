"""Vectors over token streams: how a row of a product of matrices is swept through a model.

A sweep never forms an N x N product. It carries, for each stream, vectors ``(sample, slot, token)`` - one
slot for each explained row of a sample - and multiplies them with one attention matrix at a time,
last step first. Here are the two changes of layout that sweeps need: rows of targets to and from slots of
samples, and a stream's tokens to and from the batch axis of calls on windows, frames or tracks. A stream with
group axes holds its tokens group by group: ``(frame, token)`` of a clip, frame by frame. A call that holds a part
of them (one frame, the tracks that live in it) reads and writes that part alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from foveate.capture.labels import positions
from foveate.capture.trace import Trace
from foveate.errors import CaptureError
from foveate.interfaces import BoundTarget, CallLabels, Place, Site, TokenAxis


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
    """The site where the answer is read from, and weights over its query stream ``(sample | target, token)``.

    Weights without the site's group axes are of every group alike: the class token's row of each frame.
    """
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
    weights = readout.weights.detach().to(trace.batch.inputs.device, torch.float32)
    call = next((call for call in trace.records if call.site == site_id), None)
    labels = None if call is None else trace.labels(call)
    if labels is not None and weights.dim() == 2 and weights.shape[1] == len(labels.query_axis):
        groups = math.prod(_groups(labels).values())
        weights = weights.repeat(1, groups) / groups
    return site, weights.flatten(1)


def packing_of(trace: Trace, bound: BoundTarget | None) -> Packing:
    """One slot a sample, or one for each row of ``bound``."""
    count = len(trace.batch)
    rows = list(range(count)) if bound is None else [row.sample for row in bound.rows]
    return Packing.of(count, rows)


def through_calls(
    vectors: Tensor,
    labels: CallLabels,
    tokens: tuple[int, int],
    product: Callable[[Tensor], Tensor],
    *,
    reverse: bool = False,
) -> Tensor:
    """Apply a product of calls ``(batch, slot, in) -> (batch, slot, out)`` to a stream's vectors.

    ``vectors`` is ``(sample, slot, group * in)``, with the call's group axes (windows, frames) in the order
    of ``labels.leading`` after those of which it has one position; the result ``(sample, slot, group * out)``.
    ``tokens`` is (in, out) of one call, queries to keys, or keys to queries in ``reverse``. Where the call holds a
    part of the stream only that part is read, and the result is zero elsewhere.
    """
    places = (labels.query_place, labels.key_place)
    return _across(vectors, labels, tokens, places[::-1] if reverse else places, product)


def at_queries(vectors: Tensor, labels: CallLabels, product: Callable[[Tensor], Tensor]) -> Tensor:
    """As :func:`through_calls`, from queries to queries."""
    own = len(labels.query)
    return _across(vectors, labels, (own, own), (labels.query_place, labels.query_place), product)


def own_part(vectors: Tensor, labels: CallLabels) -> Tensor:
    """What a call holds of its query stream's vectors, zero elsewhere."""
    return at_queries(vectors, labels, lambda part: part) if labels.partial else vectors


def _across(
    vectors: Tensor,
    labels: CallLabels,
    tokens: tuple[int, int],
    places: tuple[Place | None, ...],
    product: Callable[[Tensor], Tensor],
) -> Tensor:
    """:func:`through_calls`, from the tokens at the first of ``places`` to those at the second."""
    samples, slots, length = vectors.shape
    groups = _groups(labels)
    whole = tuple(n if place is None else len(place.axis) for n, place in zip(tokens, places, strict=True))
    said = labels.at["sample"].size if "sample" in labels.at else dict(labels.leading)["sample"]
    if length != math.prod(groups.values()) * whole[0] or said != samples:
        raise CaptureError(
            f"sweep: a stream of {length} tokens and {samples} samples meets calls of {whole[0]} tokens "
            f"with leading axes {labels.leading}",
            remedy="add the MergeStep that cuts the stream into windows to AttentionSource.flow",
        )
    split = vectors.reshape(samples, slots, *groups.values(), whole[0])
    if not labels.partial:
        back = _calls(split, labels, list(groups), tokens, product)
        return back.reshape(samples, slots, math.prod(groups.values()) * tokens[1])
    where = [positions(labels, "sample"), list(range(slots)), *(positions(labels, name) for name in groups)]
    ends = [
        list(range(n)) if place is None else list(place.index) for n, place in zip(tokens, places, strict=True)
    ]
    part = split[_grid([*where, ends[0]], split.device)]
    found = split.new_zeros(samples, slots, *groups.values(), whole[1])
    found[_grid([*where, ends[1]], split.device)] = _calls(part, labels, list(groups), tokens, product)
    return found.reshape(samples, slots, math.prod(groups.values()) * whole[1])


def _groups(labels: CallLabels) -> dict[str, int]:
    """Group axes of the stream and their whole sizes: those of which the call has one position come first."""
    sizes = dict(labels.leading)
    names = [*(name for name in labels.at if name not in sizes), *sizes]
    return {name: labels.at[name].size if name in labels.at else sizes[name] for name in names if name != "sample"}


def _calls(
    split: Tensor,
    labels: CallLabels,
    groups: list[str],
    tokens: tuple[int, int],
    product: Callable[[Tensor], Tensor],
) -> Tensor:
    """``(sample, slot, *groups, in)`` of a call to ``(sample, slot, *groups, out)``."""
    names = [name for name, _ in labels.leading]
    sizes = [size for _, size in labels.leading]
    slots, single = split.shape[1], [name for name in groups if name not in names]
    split = split.flatten(2, 2 + len(single)) if single else split  # one entry each: they fall into the next axis
    inner = iter(range(2, 2 + len(names) - 1))
    # (sample, slot, *groups, token) -> (*leading, slot, token)
    order = [0 if name == "sample" else next(inner) for name in names]
    last = split.dim() - 1
    calls = split.permute(*order, 1, last).reshape(math.prod(sizes), slots, tokens[0])
    back = product(calls).reshape(*sizes, slots, tokens[1])
    axes = [names.index("sample"), len(names), *(i for i, n in enumerate(names) if n != "sample"), len(names) + 1]
    back = back.permute(*axes)
    return back.reshape(*back.shape[:2], *(1 for _ in single), *back.shape[2:])


def _grid(index: list[list[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Positions along each axis as indices that broadcast against each other."""
    last = len(index) - 1
    return tuple(
        torch.tensor(part, dtype=torch.long, device=device).reshape(-1, *(1 for _ in range(last - axis)))
        for axis, part in enumerate(index)
    )


def stream_tokens(labels: CallLabels, side: str = "key") -> TokenAxis:
    """The tokens of a call's whole stream, in the order of a sweep's vectors: the axis repeated over its groups.

    Tokens of a stream with a group axis "frame" say which frame they are of, unless their axis says so itself.
    """
    axis: TokenAxis = getattr(labels, f"{side}_axis")
    groups = _groups(labels)
    count = math.prod(groups.values())
    if count == 1 and "frame" not in groups:
        return axis
    whole = TokenAxis.concat(*[axis] * count)
    if "frame" not in groups:
        return whole
    shape = [-1 if name == "frame" else 1 for name in groups]
    frame = np.broadcast_to(np.arange(groups["frame"]).reshape(shape), tuple(groups.values()))
    numbers = np.repeat(frame.ravel(), len(axis)).astype(np.int32)
    return replace(whole, frame=np.where(whole.frame >= 0, whole.frame, numbers))


def bottom_rows(trace: Trace, found: Tensor | None, stopped: str, tokens_elsewhere: list[str]) -> Tensor:
    """What arrived at the bottom stream, or a CaptureError that says where the sweep ended instead."""
    if found is None:
        end = f"an opaque step, {stopped!r}" if stopped else "the first step"
        raise CaptureError(
            f"sweep: reached {end} with vectors over {tokens_elsewhere}, but not the stream {trace.stream!r}",
            remedy="AttentionSource.stream must name a stream above the last opaque step of its flow",
        )
    return found
