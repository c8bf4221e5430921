"""The rows that an answer is read from, put together from the calls that hold them.

A layer of an image model runs once, and its readout is one row over the whole picture. A video model may attend
within frames, in one call for all of them or in several for some, and its tokens may come and go (tracks): then
the answer is read from one row a frame, and the map of the clip is these rows frame after frame.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.errors import UsageError
from foveate.interfaces import TokenAxis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveate.capture.trace import Trace
    from foveate.interfaces import CallKey, CallLabels

KNOWN = {"sample", "frame"}


def readout_rows(
    trace: Trace, calls: Sequence[CallKey], weights: torch.Tensor, *, method: str
) -> tuple[torch.Tensor, TokenAxis]:
    """Weighted rows of one layer, ``(target, head, key)``, and the tokens that they are over.

    ``calls`` are all calls of the layer, ``weights`` its readout: ``(target, query)``, or ``(target, frame,
    query)`` where rows differ from frame to frame. Target ``j`` is sample ``j`` of the trace. Of a layer that sees
    whole samples and runs more than once, the last call counts. Raises UsageError where rows lie within windows or
    tracks.
    """
    labels = {call: trace.labels(call) for call in calls}
    for call in calls:
        _refuse_parts(call, labels[call], method)
    weights = weights.to(trace.record(calls[-1]).device, torch.float32)
    if not any("frame" in _axes(one) or one.partial for one in labels.values()):
        return trace.record(calls[-1]).weighted(weights)[:, :, 0], labels[calls[-1]].key
    found: dict[int, dict[int, torch.Tensor]] = {}
    tokens: dict[int, TokenAxis] = {}
    for call in calls:
        places, queries = places_of(labels[call]), _queries(labels[call])
        record, key = trace.record(call), labels[call].key
        rows = record.weighted(torch.stack([_weights(weights, *at, queries) for at in places]))[:, :, 0]
        for row, (sample, frame) in zip(rows, places, strict=True):
            found.setdefault(frame, {})[sample] = row
            tokens[frame] = key if frame < 0 else replace(key, frame=np.full(len(key), frame, np.int32))
    return _joined(found, len(weights), method), TokenAxis.concat(*(tokens[frame] for frame in sorted(tokens)))


def _joined(found: dict[int, dict[int, torch.Tensor]], targets: int, method: str) -> torch.Tensor:
    """Rows by frame and sample, ``(target, head, key)`` with the keys of one frame after the other."""
    for frame, rows in found.items():
        if len(rows) != targets:
            raise UsageError(f"{method}: no attention was seen for {targets - len(rows)} samples in frame {frame}")
    frames = [torch.stack([found[frame][sample] for sample in range(targets)]) for frame in sorted(found)]
    return torch.cat(frames, dim=-1)


def _weights(weights: torch.Tensor, sample: int, frame: int, queries: Sequence[int] | None) -> torch.Tensor:
    """Weights over one call's own queries."""
    row = weights[sample] if weights.dim() == 2 else weights[sample, frame]
    return row if queries is None else row[list(queries)]


def places_of(labels: CallLabels) -> list[tuple[int, int]]:
    """The (sample, frame) of every batch entry of a call; frame -1 where it sees all frames."""
    sizes = dict(labels.leading)
    index: dict[str, Sequence[int]] = {}
    for name, nowhere in (("sample", 0), ("frame", -1)):
        part = labels.at.get(name)
        index[name] = part.index if part is not None else range(sizes[name]) if name in sizes else (nowhere,)
    order = [name for name, _ in labels.leading] + [name for name in ("sample", "frame") if name not in sizes]
    entries = (dict(zip(order, entry, strict=True)) for entry in product(*(index[name] for name in order)))
    return [(entry["sample"], entry["frame"]) for entry in entries]


def _queries(labels: CallLabels) -> Sequence[int] | None:
    """Where the call's queries lie on the site's axis; None where they are the axis."""
    return None if labels.query_place is None else labels.query_place.index


def _axes(labels: CallLabels) -> set[str]:
    return {name for name, _ in labels.leading} | set(labels.at)


def _refuse_parts(call: CallKey, labels: CallLabels, method: str) -> None:
    if not _axes(labels) <= KNOWN:
        raise UsageError(
            f"{method}: {call.site} attends within {', '.join(name for name, _ in labels.leading)}; a row is not "
            "a map of the whole image",
            remedy="use 'rollout', which follows the windows, or look at the captured site itself",
        )
