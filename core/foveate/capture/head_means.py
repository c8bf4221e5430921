"""What every head puts out on average over reference data, for mean ablation.

Replacing a head's output by its mean removes what it says about *this* input and keeps what the next layer
is used to; zero is an output that the model may never have seen.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from foveate.capture.forward import tapped_forward
from foveate.capture.records import Record
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionSource, Batch, CallKey


def head_means(
    source: AttentionSource, batches: Iterable[Batch], *, sites: Iterable[str] | None = None
) -> dict[CallKey, Tensor]:
    """Mean head output over all samples and queries of ``batches``, by call: float64 ``(head, channel)``.

    ``AblateHeads`` takes it as ``to``. ``sites`` limits which (default: all).
    Raises CaptureError where the tap cannot see a head's output (deformable attention, an einsum).
    """
    wanted = None if sites is None else set(sites)
    sums: dict[CallKey, Tensor] = {}
    counts: dict[CallKey, int] = {}

    def take(call: CallKey, record: Record) -> None:
        if wanted is None or call.site in wanted:
            out: Tensor | None = getattr(record, "out", None)
            if out is None or out.dim() != 4:
                raise CaptureError(f"head_means: the output of {call.site} layer {call.layer} was not seen")
            sums[call] = sums.get(call, 0) + out.double().sum((0, 2))
            counts[call] = counts.get(call, 0) + out.shape[0] * out.shape[2]

    for batch in batches:
        with torch.no_grad():
            tapped_forward(source, batch, take, needed=())
    if not sums:
        raise UsageError(
            "head_means: no batch, or no site among those named", remedy="give batches and known sites"
        )
    return {call: total / counts[call] for call, total in sums.items()}
