"""Life and death of tracks: which rows are valid, which become tracks, and when a track is given up.

Rules (per frame): under the OVIS rule a carried track needs a class score above ``select_threshold`` and a score
of the slot gate above ``keep_threshold``; a new row, and every row under the YouTube-VIS rule, needs the class
score alone. Valid new rows become tracks. A track that is invalid in ``patience`` consecutive frames dies; the
frame in which it dies is not part of it, the invalid frames before are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from foveate.errors import UsageError
from foveate_dvis.daq.config import TrackerConfig
from foveate_dvis.daq.outputs import NEW, FrameRows
from foveate_dvis.daq.state import TrackerState, TrackMemory
from foveate_dvis.daq.tracker import FrameStep

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Lived:
    """One frame's decisions: the new ``state``, ``rows``, and by row the track that took this frame in."""

    state: TrackerState
    rows: FrameRows
    appended: tuple[tuple[int, int], ...]
    """(row, track id) of every track that this frame is part of, carried or new."""


def valid_rows(step: FrameStep, rules: TrackerConfig, *, carried: int, first: bool) -> list[bool]:
    """Whether each row passes the rules; the first ``carried`` rows are tracks."""
    if first:
        return _above(step.scores, rules.first_threshold)
    passed = _above(step.scores, rules.select_threshold)
    if rules.ovis_rule:
        kept = _above(step.slot_scores, rules.keep_threshold)
        passed = [a and b for a, b in zip(passed[:carried], kept, strict=True)] + passed[carried:]
    return passed


def live_on(
    state: TrackerState,
    step: FrameStep,
    rules: TrackerConfig,
    *,
    keep_states: bool,
    held: FrameRows | None = None,
) -> Lived:
    """Apply the rules to one frame's ``step``.

    ``keep_states``: remember each frame's state (for a refiner). ``held``: take the decisions of another run
    (same tracks, perhaps another picture) instead of this one's scores. Raises UsageError where its rows differ.
    """
    frame, live = state.next_frame, state.live
    if held is None:
        valid = valid_rows(step, rules, carried=len(live), first=frame == 0)
    else:
        valid = _held(held, frame, [track.id for track in live], len(step.states))
    changed = {
        track.id: _carry(track, step, row, valid[row], rules, keep_states) for row, track in enumerate(live)
    }
    new = [row for row in range(len(live), len(valid)) if valid[row]]
    born = {row: len(state.tracks) + i for i, row in enumerate(new)}
    tracks = state.replaced(changed) + tuple(_begin(born[r], frame, step, r, keep_states) for r in new)
    deaths = tuple(track.id for track in changed.values() if track.dead)
    queries = len(valid) - len(live)
    rows = FrameRows(
        frame=frame,
        ids=tuple(track.id for track in live) + (NEW,) * queries,
        anchors=(-1,) * len(live) + tuple(range(queries)),
        valid=tuple(valid),
        births=tuple(born.items()),
        deaths=deaths,
        class_logits=step.logits,
        slot_scores=step.slot_scores,
    )
    carried = [(row, track.id) for row, track in enumerate(live) if track.id not in deaths]
    return Lived(replace(state, next_frame=frame + 1, tracks=tracks), rows, (*carried, *born.items()))


def kept_tracks(state: TrackerState, rules: TrackerConfig) -> tuple[TrackMemory, ...]:
    """All but noise: tracks of fewer than ``noise_frames`` frames that ended before the last frame read."""
    return tuple(
        track
        for track in state.tracks
        if len(track.appearance) >= rules.noise_frames or track.end >= state.next_frame
    )


def blended(memory: Tensor, stored: Sequence[Tensor], new: Tensor) -> Tensor:
    """The position memory after a valid frame: ``(1 - b) memory + b new``, all (channel,).

    ``b`` is the mean cosine of ``new`` with the ``stored`` positions, at least 0: a mask that looks unlike the
    track's past changes the memory little.
    """
    likeness = F.cosine_similarity(torch.stack(list(stored)), new[None], dim=-1).mean().clamp(min=0)
    return (1 - likeness) * memory + likeness * new


def _carry(
    track: TrackMemory, step: FrameStep, row: int, valid: bool, rules: TrackerConfig, keep_states: bool
) -> TrackMemory:
    misses = 0 if valid else track.misses + 1
    if misses >= rules.patience:
        return replace(track, misses=misses, dead=True, stored=())
    track = replace(
        track,
        appearance=(*track.appearance, valid),
        misses=misses,
        state=step.states[row],
        logit_sum=track.logit_sum + step.logits[row],
        states=(*track.states, step.states[row]) if keep_states else (),
    )
    if not valid:
        return track
    new = step.positions[row]
    stored = (*track.stored, new)[-(rules.position_cache - 1) :]
    return replace(track, position=blended(track.position, track.stored, new), stored=stored)


def _begin(number: int, frame: int, step: FrameStep, row: int, keep_states: bool) -> TrackMemory:
    position = step.positions[row]
    return TrackMemory(
        id=number,
        start=frame,
        appearance=(True,),
        misses=0,
        dead=False,
        state=step.states[row],
        position=position,
        stored=(position,),
        logit_sum=step.logits[row],
        states=(step.states[row],) if keep_states else (),
    )


def _held(held: FrameRows, frame: int, live: list[int], rows: int) -> list[bool]:
    ids = [track for track in held.ids if track != NEW]
    if held.frame != frame or ids != live or len(held.ids) != rows:
        raise UsageError(
            f"decisions held for frame {held.frame} with tracks {ids} and {len(held.ids)} rows do not fit "
            f"frame {frame} with tracks {live} and {rows} rows",
            remedy="hold the outputs of a run over the same frames of the same clip, from the same state",
        )
    return list(held.valid)


def _above(scores: Tensor, threshold: float) -> list[bool]:
    return [bool(passed) for passed in (scores.detach() > threshold).tolist()]
