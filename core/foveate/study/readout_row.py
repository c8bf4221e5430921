"""The one attention row that an answer is read from, in one layer of a traced forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.trace import Trace
    from foveate.interfaces import BoundTarget

Head = int | Literal["mean"]


@dataclass(frozen=True, eq=False)
class ReadoutRow:
    """``weights`` float64 ``(key,)`` over ``tokens``; ``words`` say site, layer and heads."""

    call: CallKey
    weights: NDArray[np.float64]
    tokens: TokenAxis
    words: str


def readout_row(
    traced: Trace, layer: int = -1, head: Head = "mean", bound: BoundTarget | None = None
) -> ReadoutRow:
    """The readout row of a single picture. ``layer`` is a true number, negative ones count from the last.

    With ``bound`` it is the row of its first target: of a detector, that object's query.
    Raises UsageError for a layer or head that does not exist and for a site that attends within groups,
    CaptureError where the source names no readout.
    """
    readouts = traced.readout(bound)
    if not readouts:
        raise CaptureError(
            f"{traced.source.card.id} names no row that its answer is read from",
            remedy="foveate capture --rows all keeps every row",
        )
    site, readout = next(iter(readouts.items()))
    call = _call(traced, site, layer)
    record, labels = traced.record(call), traced.labels(call)
    if labels.leading != (("sample", 1),):
        groups = " and ".join(name for name, _ in labels.leading if name != "sample")
        raise UsageError(
            f"{site} attends within {groups or 'several samples'}, not over one picture",
            remedy="foveate capture keeps it; foveate plot draws one place of it",
        )
    queries = readout.weights[:1].detach().to(record.device, torch.float32)
    with torch.no_grad():
        rows = record.weighted(queries)[0, :, 0].double().cpu().numpy()
    layers = _layers(traced, site)
    which = f" {bound.rows[0].object}" if bound is not None and bound.rows[0].object is not None else ""
    words = (
        f"attention of the readout row ({readout.rule}{which}), {site}, "
        f"layer {call.layer} of {layers[0]}–{layers[-1]}"
    )
    weights, heads = one_head(rows, head, site)
    return ReadoutRow(call, weights, labels.key, f"{words}, {heads}")


def one_head(rows: NDArray[np.float64], head: Head, site: str) -> tuple[NDArray[np.float64], str]:
    """Rows ``(head, key)`` as one, a head's or the mean, and the words for it."""
    if head == "mean":
        return np.asarray(rows.mean(axis=0)), f"mean of {len(rows)} heads"
    if not 0 <= head < len(rows):
        raise UsageError(f"{site} has no head {head}", remedy=f"0 to {len(rows) - 1}, or mean")
    return np.asarray(rows[head]), f"head {head} of {len(rows)}"


def _call(traced: Trace, site: str, layer: int) -> CallKey:
    """The last call of a layer of a site."""
    layers = _layers(traced, site)
    chosen = layers[layer] if layer < 0 and -layer <= len(layers) else layer
    calls = [key for key in traced.records if key.site == site and key.layer == chosen]
    if not calls:
        raise UsageError(f"{site} has no layer {layer}", remedy=f"one of {', '.join(map(str, layers))}")
    return max(calls)


def _layers(traced: Trace, site: str) -> list[int]:
    return sorted({key.layer for key in traced.records if key.site == site})
