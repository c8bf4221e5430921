"""Which part of a call's batch axis is which sample.

A call whose batch is a multiple of the samples holds windows, frames or places of each. Whether the samples lie
block by block or interleaved is found out, not assumed: one sample of the example is changed, and the rows of
attention that change are its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from foveate.capture.certificate import spread
from foveate.capture.records import Record, Shape
from foveate.capture.tap import Tap
from foveate.capture.wrap_run import Heads, Inputs, eager

Order = Literal["slow", "fast", ""]
"""Samples are the slower axis of the batch, the faster one, or this is not known."""


def sample_axis(inputs: Inputs, shapes: Iterable[Shape]) -> tuple[str, int] | None:
    """Which axis of which input counts samples: of the first tensor, axis 0, or 1 if axis 0 can be tokens.

    The one that is the batch of every call, else the one that divides it (windows, frames); None where none does.
    """
    name, tensor = next(inputs.named(), ("", None))
    if tensor is None:
        return None
    shapes = list(shapes)
    batches = {shape.batch for shape in shapes}
    token_first = tensor.dim() in (2, 3) and any(shape.queries == tensor.shape[0] for shape in shapes)
    sizes = [(axis, tensor.shape[axis]) for axis in range(min(1 + token_first, tensor.dim()))]
    exact = [(name, axis) for axis, size in sizes if batches == {size}]
    whole = [(name, axis) for axis, size in sizes if size and all(batch % size == 0 for batch in batches)]
    return next(iter(exact or whole), None)


def samples_of(inputs: Inputs, axis: tuple[str, int] | None) -> int:
    """How many samples these inputs hold; 1 where that is not known."""
    if axis is None:
        return 1
    tensor = dict(inputs.named()).get(axis[0])
    return 1 if tensor is None else int(tensor.shape[axis[1]])


def ratio(batch: int, samples: int) -> int:
    """Calls a sample: windows, frames; 0 where ``samples`` does not divide the call's batch."""
    return batch // samples if samples and batch % samples == 0 else 0


def sample_order(
    module: nn.Module, inputs: Inputs, heads: Heads, axis: tuple[str, int] | None
) -> dict[tuple[str, int], Order]:
    """How samples lie in the batch of each call (path, number); two more forwards."""
    samples = samples_of(inputs, axis)
    if axis is None or samples < 2:
        return {}
    before, after = (_rows(module, given, heads) for given in (inputs, _with_another(inputs, *axis)))
    return {call: _order(rows, after.get(call), samples) for call, rows in before.items()}


def _rows(module: nn.Module, inputs: Inputs, heads: Heads) -> Mapping[tuple[str, int], Tensor]:
    """A few rows of every call, (batch, ...)."""
    found: dict[tuple[str, int], Tensor] = {}

    def take(record: Record) -> None:
        number = sum(path == record.name for path, _ in found)
        found[record.name, number] = record.rows(spread(record.shape.queries)).flatten(1)

    with torch.no_grad(), torch.random.fork_rng(), eager(module), Tap(module, take, heads=heads):
        inputs.run(module)
    return found


def _with_another(inputs: Inputs, name: str, axis: int) -> Inputs:
    """The same inputs with another last sample: noise is added, integers change places."""
    tensor = dict(inputs.named())[name]
    last = tensor.select(axis, -1)
    if tensor.is_floating_point():
        noise = torch.randn(last.shape, generator=torch.Generator().manual_seed(0)).to(last)
        other = last + noise * last.std().clamp_min(1.0)
    else:
        other = last.flip(-1)
    changed = tensor.clone()
    changed.select(axis, -1).copy_(other)
    return inputs.mapped(lambda t: changed if t is tensor else t)


def _order(before: Tensor, after: Tensor | None, samples: int) -> Order:
    """Where the last sample's calls lie, from the calls that changed."""
    if after is None or after.shape != before.shape or len(before) % samples:
        return ""
    changed = (before != after).any(1).cpu()
    index = torch.arange(len(before))
    own: dict[Order, Tensor] = {
        "slow": index // (len(before) // samples) == samples - 1,
        "fast": index % samples == samples - 1,
    }
    fitting: list[Order] = [order for order, mine in own.items() if changed.any() and not (changed & ~mine).any()]
    return fitting[0] if len(fitting) == 1 or (len(before) == samples and fitting) else ""
