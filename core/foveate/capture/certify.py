"""The whole proof for one source and batch: nothing missed, nothing changed, everything exact.

Run it once for a model (``foveate plugin test`` and the conformance kit do); each capture then still
checks rows of every call, which costs next to nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.capture.census import CensusRow, census, softmax_calls
from foveate.capture.certificate import Certificate
from foveate.capture.trace import trace
from foveate.errors import CaptureError
from foveate.interfaces import AttentionSource, Batch


@dataclass(frozen=True)
class Certification:
    """What :func:`certify` found.

    ``certificate`` concerns the records; ``unclaimed`` kernels belong to no site and are not ignored;
    ``miscounted`` sites ran more or fewer attention kernels than the tap recorded (site -> (kernels,
    records)); ``identical`` tells whether outputs with the tap equal those without it to the bit;
    ``fast_path_error`` is the largest relative difference to torch's fused MHA path, which the tap turns off.
    """

    certificate: Certificate
    census: tuple[CensusRow, ...]
    miscounted: Mapping[str, tuple[int, int]]
    identical: bool
    fast_path_error: float

    @property
    def unclaimed(self) -> tuple[CensusRow, ...]:
        """Kernels that could be attention and that nobody answers for."""
        return tuple(row for row in self.census if not row.claim)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each thing that is not as it must be."""
        lines = list(self.certificate.failures)
        lines += [
            f"{row.owner}: {row.count} x {row.kernel} is neither a site nor ignored" for row in self.unclaimed
        ]
        lines += [
            f"{site}: {kernels} attention kernels ran, {records} calls were recorded"
            for site, (kernels, records) in self.miscounted.items()
        ]
        if not self.identical:
            lines.append("outputs differ with and without capture")
        if not self.fast_path_error <= FAST_PATH_TOLERANCE:
            lines.append(f"outputs differ from torch's fast path by {self.fast_path_error:.1e}")
        return tuple(lines)

    @property
    def passed(self) -> bool:
        """Whether everything is proved."""
        return not self.failures

    def require(self) -> None:
        """Raise CaptureError where something is not."""
        if self.failures:
            raise CaptureError(
                "certify: failed\n  " + "\n  ".join(self.failures[:10]),
                remedy="declare the site, or name the module in AttentionSource.ignored with the reason",
            )


FAST_PATH_TOLERANCE = 1e-4
"""Of the output's maximum; measured below 1e-6 in float32, more after deep bf16 models."""


def certify(source: AttentionSource, batch: Batch) -> Certification:
    """Run the model plainly, under a census and under the tap, and compare.

    Raises CaptureError where a layer of a declared site is missed; everything else is in the result.
    """
    with torch.no_grad():
        fast = list(tensors(source.forward(batch)))
        with without_fast_path():
            plain = list(tensors(source.forward(batch)))
            counted = census(source, batch)
        traced = trace(source, batch)
    captured = list(tensors(traced.outputs))
    kernels = softmax_calls(counted)
    records = Counter(call.site for call in traced.records)
    miscounted = {
        site: (kernels[site], records[site])
        for site in sorted({*kernels, *records})
        if kernels[site] != records[site]
    }
    identical = len(plain) == len(captured) and all(map(_same, plain, captured))
    return Certification(traced.certify(), counted, miscounted, identical, _difference(fast, captured))


def tensors(outputs: Any) -> Iterator[Tensor]:
    """Every tensor in nested outputs (mappings, sequences, dataclasses), in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping):
        for value in outputs.values():
            yield from tensors(value)
    elif isinstance(outputs, list | tuple):
        for value in outputs:
            yield from tensors(value)
    elif is_dataclass(outputs):
        for part in fields(outputs):
            yield from tensors(getattr(outputs, part.name))


@contextmanager
def without_fast_path() -> Iterator[None]:
    """``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` in Python, as they run under the tap."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))


def _difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest |a - b| / max |b| over floating tensors; infinite where they do not correspond."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        if one.is_floating_point() and one.numel():
            size = float(other.abs().amax())
            worst = max(worst, float((one - other).abs().amax()) / (size or 1.0))
    return worst
