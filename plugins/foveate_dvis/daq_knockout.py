"""What a track's answer depends on: its carried state taken away in one frame, and the model run on.

A track enters a frame as a vector that it carried over (its temporal reference). Put another in its place, keep
the decisions of the intact run, and see how far its class in later frames changes: that is a cause, which
attention weights and contributions are not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import Batch
    from foveate_dvis.daq.outputs import DaqOutputs, FrameRows
    from foveate_dvis.daq.state import TrackerState
    from foveate_dvis.daq_source import DaqSource

Replacement = Literal["new", "mean", "same"]
"""``new``: the embedding of a row that is not yet a track; ``mean``: of the states of all live tracks; ``same``:
the state itself, which must change nothing.
"""


@dataclass(frozen=True, eq=False)
class StateKnockout:
    """One clip; arrays are float64 ``(track, cut, frame)``, NaN where the track was not carried or is not alive.

    ``change``: total variation between the track's class probabilities with and without its state, in frame
    ``frame``, after the state was taken away on entering frame ``cut``; 0 no effect, 1 another class for sure.
    ``probability``: how much the probability of its own class fell.
    """

    replacement: Replacement
    change: NDArray[np.float64]
    probability: NDArray[np.float64]


def knock_out_states(source: DaqSource, batch: Batch, *, replacement: Replacement = "new") -> list[StateKnockout]:
    """For every clip of the batch: each frame's carried states taken away, one frame and one track at a time.

    Costs about ``tracks x frames^2 / 2`` tracker steps. Raises UsageError for an offline model, or a replacement
    that does not exist.
    """
    if source.config.mode == "offline":
        raise UsageError("a carried state is the online model's", remedy="open it with mode='online'")
    if replacement not in ("new", "mean", "same"):
        raise UsageError(f"no replacement {replacement!r}", remedy="new, mean or same")
    read = batch.per_sample["frame_index"] >= 0
    with torch.no_grad():
        clips = [batch.inputs[i, : int(read[i].sum())] for i in range(len(batch))]
        return [_of_clip(source, frames, replacement) for frames in clips]


def _of_clip(source: DaqSource, frames: torch.Tensor, replacement: Replacement) -> StateKnockout:
    intact = source.model(frames)
    tracks, count = len(intact.tracks), len(frames)
    change, fell = (np.full((tracks, count, count), np.nan) for _ in range(2))
    state = None
    for cut in range(1, count):
        state = source.model(frames[cut - 1 : cut], state=state, held=_part(intact, cut - 1, cut)).state
        for track in (track.id for track in state.live):
            changed = source.model(
                frames[cut:], state=_without(source, state, track, replacement), held=_part(intact, cut, count)
            )
            for frame in range(cut, count):
                pair = [_probabilities(run.rows[frame - run.first_frame], track) for run in (intact, changed)]
                if pair[0] is None or pair[1] is None:
                    break
                change[track, cut, frame] = float((pair[0] - pair[1]).abs().sum() / 2)
                own = int(pair[0][:-1].argmax())
                fell[track, cut, frame] = float(pair[0][own] - pair[1][own])
    return StateKnockout(replacement, change, fell)


def _part(held: DaqOutputs, start: int, stop: int) -> DaqOutputs:
    """The decisions of some frames."""
    return replace(held, rows=held.rows[start:stop], first_frame=start)


def _without(source: DaqSource, state: TrackerState, track: int, replacement: Replacement) -> TrackerState:
    memory = next(one for one in state.live if one.id == track)
    other = {
        "new": source.model.tracker.new_ins_embeds.weight[0],
        "mean": torch.stack([one.state for one in state.live]).mean(0),
        "same": memory.state,
    }[replacement]
    return replace(state, tracks=state.replaced({track: replace(memory, state=other)}))


def _probabilities(rows: FrameRows, track: int) -> torch.Tensor | None:
    """Class probabilities of a track's row in a frame, float64; None where the frame is no part of the track."""
    if track not in rows.born or track in rows.deaths:
        return None
    return rows.class_logits[rows.born.index(track)].double().softmax(-1)
