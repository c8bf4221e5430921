"""From a call's batch axis to named axes: samples, frames, windows, tracks."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from foveate.capture.records import Shape
from foveate.errors import CaptureError
from foveate.interfaces import AttentionSource, Batch, CallKey, CallLabels, Outputs


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
    return labels


def split_leading(tensor: Tensor, labels: CallLabels, order: Sequence[str]) -> Tensor:
    """``(batch, ...)`` to one axis for each name in ``order``, which permutes the leading axes."""
    names = [name for name, _ in labels.leading]
    split = tensor.reshape(*(size for _, size in labels.leading), *tensor.shape[1:])
    return split.permute(*(names.index(name) for name in order), *range(len(names), split.dim()))


def join_leading(tensor: Tensor, labels: CallLabels) -> Tensor:
    """The reverse for ``(sample, ...)``: repeated over the other leading axes, ``(batch, ...)``."""
    names = [name for name, _ in labels.leading]
    sizes = [size for _, size in labels.leading]
    shape = [size if name == "sample" else 1 for name, size in labels.leading]
    spread = tensor.reshape(*shape, *tensor.shape[1:]).expand(*sizes, *tensor.shape[1:])
    return spread.reshape(math.prod(sizes), *tensor.shape[1:]) if len(names) > 1 else tensor
