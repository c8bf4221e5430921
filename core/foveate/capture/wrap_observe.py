"""What an unknown model does in one forward: its attention calls, seen by the tap and counted by the census.

Two forwards: one plain, under the census of kernels, which knows nothing of the tap; one under tap and data flow.
A kernel that no record answers for is an error, unless it is a softmax that met no values (class probabilities),
which is listed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.capture.census import SAMPLING_KERNELS, Census
from foveate.capture.certify import tensors, without_fast_path
from foveate.capture.guess_kind import Guess, guess_kind
from foveate.capture.guess_sources import DataFlow
from foveate.capture.owners import Owners
from foveate.capture.records import Record, Shape
from foveate.capture.tap import Tap
from foveate.capture.wrap_run import Heads, Inputs, eager, one_thread, refuse_batched
from foveate.errors import CaptureError
from foveate.interfaces import SiteForm


@dataclass(frozen=True)
class Seen:
    """One attention call of the example: the ``number``-th of the module at ``path``."""

    path: str
    number: int
    shape: Shape
    form: SiteForm
    owner: str
    sums_to_one: bool
    guess: Guess


@dataclass(frozen=True)
class Observation:
    """What one forward showed.

    ``elsewhere`` counts softmaxes by module that met no values, so are no attention (or attention that the
    tap could not follow). ``identical``: outputs with and without the tap are equal to the bit.
    """

    calls: tuple[Seen, ...]
    elsewhere: Mapping[str, int]
    kernels: Mapping[str, int]
    identical: bool


def observe(module: nn.Module, inputs: Inputs, heads: Heads) -> Observation:
    """Run the model twice on an example. Raises CaptureError where attention ran that the tap did not see."""
    with torch.no_grad(), eager(module), one_thread(module):
        plain, kernels = _counted(module, inputs)
        calls, elsewhere, outputs = _watched(module, inputs, heads)
    _compare(kernels, calls, elsewhere)
    before, after = list(tensors(plain)), list(tensors(outputs))
    identical = len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(before, after, strict=True)
    )
    return Observation(tuple(calls), elsewhere, kernels, identical)


def _counted(module: nn.Module, inputs: Inputs) -> tuple[Any, Counter[str]]:
    """Outputs of a plain forward, and attention kernels by module."""
    with without_fast_path(), _same_randomness(), Census(Owners(module)) as counter:
        outputs = inputs.run(module)
    kernels: Counter[str] = Counter()
    for (owner, kernel), count in counter.seen.items():
        if kernel not in SAMPLING_KERNELS:
            kernels[owner] += count
    return outputs, kernels


def _watched(module: nn.Module, inputs: Inputs, heads: Heads) -> tuple[list[Seen], Counter[str], Any]:
    calls: list[Seen] = []
    numbers: Counter[str] = Counter()
    flow = DataFlow(module, inputs.named())

    def sink(record: Record) -> None:
        refuse_hidden(record)
        shape, path = record.shape, record.name
        reading = flow.take()
        guess = guess_kind(path, shape, None if record.form == "deformable" else reading)
        owner = type(module.get_submodule(path)).__name__
        calls.append(Seen(path, numbers[path], shape, record.form, owner, record.sums_to_one, guess))
        numbers[path] += 1

    with flow, _same_randomness(), Tap(module, sink, heads=heads) as tap:
        outputs = inputs.run(module)
    return calls, Counter(record.name for record in tap.unlinked), outputs


def _compare(kernels: Mapping[str, int], calls: list[Seen], elsewhere: Mapping[str, int]) -> None:
    """Every kernel must be a record or a softmax that met no values; there must be some record."""
    recorded = Counter(call.path for call in calls)
    lines = [
        f"{path or 'the model itself'}: {count} attention kernels ran, "
        f"{recorded[path] + elsewhere.get(path, 0)} were recorded"
        for path, count in sorted(kernels.items())
        if count != recorded[path] + elsewhere.get(path, 0)
    ]
    if lines:
        raise CaptureError(
            "wrap: attention ran that the tap did not see\n  " + "\n  ".join(lines[:8]),
            remedy="switch to SDPA or plain softmax (no flash-attn, xformers, flex or exported kernels)",
        )
    if not calls:
        softmaxes = f"; softmaxes that met no values: {', '.join(sorted(elsewhere))}" if elsewhere else ""
        raise CaptureError(
            f"wrap: no attention was seen in this forward{softmaxes}",
            remedy="check that the example runs the transformer, on this thread, with torch's SDPA or softmax",
        )


def refuse_hidden(record: Record) -> None:
    """Raise CaptureError for a record whose tensors have the hidden axes of ``vmap``."""
    for name in ("q", "weights"):
        tensor = getattr(record, name, None)
        if isinstance(tensor, Tensor):
            refuse_batched(tensor, f"the attention of {record.name or 'the model'}")


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Leave the random state as it was, so that both forwards draw the same numbers."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        yield
