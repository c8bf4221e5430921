"""From a call's batch axis to named axes: samples, frames, windows, tracks, and where the call lies on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.capture.records import Shape
from foveate.errors import CaptureError
from foveate.interfaces import AttentionSource, Batch, CallKey, CallLabels, Outputs, Place


def call_labels(
    source: AttentionSource, call: CallKey, batch: Batch, outputs: Outputs, shape: Shape
) -> CallLabels:
    """The source's labels of one call, checked against its true shape. Raises CaptureError."""
    labels = source.label(call, batch, outputs)
    said = (math.prod(size for _, size in labels.leading), len(labels.query), len(labels.key))
    found = (shape.batch, shape.queries, shape.keys)
    if said != found or "sample" not in dict(labels.leading):
        raise CaptureError(
            f"{call.site} layer {call.layer}: the source labels leading axes {labels.leading}, "
            f"{said[1]} queries and {said[2]} keys, but the call has batch {found[0]}, "
            f"{found[1]} queries and {found[2]} keys",
            remedy="correct AttentionSource.label (patch grid, prefix tokens, group axes)",
        )
    if labels.partial:
        _check_positions(call, labels)
    return labels


def _check_positions(call: CallKey, labels: CallLabels) -> None:
    """Positions must be on their axis, each once, one for each entry. Raises CaptureError."""
    sizes = dict(labels.leading)
    claims = {name: (part.index, sizes.get(name, 1), part.size) for name, part in labels.at.items()}
    for side, place in (("query", labels.query_place), ("key", labels.key_place)):
        if place is not None:
            claims[side] = (place.index, len(getattr(labels, side)), len(place.axis))
    for name, (index, expected, size) in claims.items():
        inside = all(0 <= i < size for i in index)
        if len(index) != expected or len(set(index)) != len(index) or not inside:
            raise CaptureError(
                f"{call.site} layer {call.layer} call {call.number}: the source places {expected} entries of "
                f"{name!r} at {_short(index)} on an axis of {size}",
                remedy="correct CallLabels.at or the place: one position for each entry, none twice",
            )


def _short(index: Sequence[int]) -> str:
    return str(list(index)) if len(index) <= 8 else f"{list(index[:8])} and {len(index) - 8} more"


def positions(labels: CallLabels, name: str) -> list[int]:
    """Where the call's entries lie along ``sample`` or a group axis."""
    part = labels.at.get(name)
    return list(range(dict(labels.leading)[name])) if part is None else list(part.index)


def split_leading(tensor: Tensor, labels: CallLabels, order: Sequence[str]) -> Tensor:
    """``(batch, ...)`` to one axis for each name in ``order``, which permutes the leading axes."""
    names = [name for name, _ in labels.leading]
    split = tensor.reshape(*(size for _, size in labels.leading), *tensor.shape[1:])
    return split.permute(*(names.index(name) for name in order), *range(len(names), split.dim()))


def join_leading(tensor: Tensor, labels: CallLabels) -> Tensor:
    """The reverse for ``(sample, ...)``: the call's samples, repeated over its other leading axes."""
    if "sample" in labels.at:
        tensor = tensor[positions(labels, "sample")]
    names = [name for name, _ in labels.leading]
    sizes = [size for _, size in labels.leading]
    shape = [size if name == "sample" else 1 for name, size in labels.leading]
    spread = tensor.reshape(*shape, *tensor.shape[1:]).expand(*sizes, *tensor.shape[1:])
    return spread.reshape(math.prod(sizes), *tensor.shape[1:]) if len(names) > 1 else tensor


def call_weights(weights: Tensor, labels: CallLabels, group: Sequence[str] = ()) -> Tensor:
    """Readout weights of one call, ``(batch, query)``.

    ``weights`` is ``(sample, query)`` or ``(sample, *group, query)`` over the site's common query axis.
    """
    if weights.dim() == 2:
        found = join_leading(weights, labels)
    else:
        order = ("sample", *group)
        chosen = [positions(labels, name) for name in order]
        for axis, index in enumerate(chosen):
            weights = weights.index_select(axis, torch.tensor(index, dtype=torch.long, device=weights.device))
        names = [name for name, _ in labels.leading]
        # Axes that the call does not have are one entry long: they go last, where the reshape absorbs them.
        axes = [order.index(name) for name in names] + [i for i, name in enumerate(order) if name not in names]
        found = weights.permute(*axes, len(order)).reshape(-1, weights.shape[-1])
    return found if labels.query_place is None else found[:, list(labels.query_place.index)]


def on_axis(array: Tensor, axis: int, place: Place, fill: float) -> Tensor:
    """A call's tokens, along ``axis`` of ``array``, at their places on the common axis; ``fill`` elsewhere."""
    shape = list(array.shape)
    shape[axis] = len(place.axis)
    whole = array.new_full(shape, fill)
    index = torch.tensor(place.index, dtype=torch.long, device=array.device)
    return whole.index_copy_(axis, index, array)
