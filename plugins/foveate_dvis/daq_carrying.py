"""What DVIS-DAQ offers to the analyses of trackers: which query a track became, and how far back it reaches.

See :mod:`foveate.temporal.trackers`. The untrained twin keeps the decisions of the trained model (which rows are
tracks), because random weights make no tracks of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.capture.tap import quiet
from foveate.capture.trace import trace
from foveate.interfaces import CallKey
from foveate.temporal.trackers import Carried, Reach
from foveate_dvis.daq.loading import random_daq
from foveate_dvis.daq_lags import frame_contributions, half_residual
from foveate_dvis.daq_opening import OpenedDaq
from foveate_dvis.daq_sites import ROW_CROSS, runs

if TYPE_CHECKING:
    from foveate.capture.trace import Trace
    from foveate.interfaces import Batch
    from foveate_dvis.daq_source import DaqSource

TWIN_SEED = 7919


def carried(source: DaqSource, batch: Batch) -> list[list[Carried]]:
    """For every sample the frames into which tracks were carried; last layer, mean over heads."""
    with torch.no_grad():
        traced = trace(source, batch, sites=[ROW_CROSS])
    with quiet():
        return [_carried(source, traced, sample) for sample in range(len(batch))]


def reach(source: DaqSource, batch: Batch, *, untrained: bool = False) -> list[list[Reach]]:
    """For every sample its tracks with exact shares and rollout's. Raises UsageError for an offline model."""
    if untrained:
        with torch.no_grad():
            batch = source.hold(batch, source.forward(batch))
        source = twin_of(source)
    exact, halved = frame_contributions(source, batch), half_residual(source, batch)
    return [
        [Reach(str(a.track), a.shares, b.shares, a.error) for a, b in zip(*pair, strict=True)]
        for pair in zip(exact, halved, strict=True)
    ]


def twin_of(source: DaqSource) -> DaqSource:
    """The same network, rules and preprocessing with weights drawn at random."""
    weight = next(source.module.parameters())
    model = random_daq(source.config, seed=TWIN_SEED).to(weight.device, weight.dtype).eval().requires_grad_(False)
    twin = type(source)(OpenedDaq(model, source.card), threshold=source.threshold, max_objects=source.max_objects)
    twin.recipe = source.recipe
    return twin


def _carried(source: DaqSource, traced: Trace, sample: int) -> list[Carried]:
    clip, layer = traced.outputs.clips[sample], source.config.tracker.layers - 1
    found = []
    for place, rows in enumerate(clip.rows):
        if not rows.track_rows or rows.frame == 0:
            continue
        number = runs(ROW_CROSS, traced.outputs).index((sample, (place,)))
        weights = traced.records[CallKey(ROW_CROSS, layer, number)].rows(slice(None))[0].double().mean(0)
        known = [row for row, track in enumerate(rows.ids) if track >= 0 and track in clip.ids]
        if not known:
            continue
        tracks = [clip.ids.index(rows.ids[row]) for row in known]
        found.append(
            Carried(
                rows.frame,
                tuple(str(rows.ids[row]) for row in known),
                np.asarray(weights[known].cpu().numpy(), np.float64),
                (clip.pred_masks[tracks, place] > 0).cpu().numpy(),
                (clip.segmenter.masks[place] > 0).cpu().numpy(),
            )
        )
    return found
