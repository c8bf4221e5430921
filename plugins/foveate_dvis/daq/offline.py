"""From tracks to the refiner's instances: which tracks enter, what fills their gaps and the places left over.

The ``top_tracks`` best tracks enter. Before a track's birth and after its end its state is its position memory.
Where they are fewer than the new-instance rows, MinVIS chains fill up to that number, best mean class score first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from foveate_dvis.daq.config import DaqConfig, RefinerConfig
from foveate_dvis.daq.linking import chained, link_queries
from foveate_dvis.daq.outputs import Refined
from foveate_dvis.daq.refiner import Refiner, masks_of
from foveate_dvis.daq.state import TrackerState, TrackMemory
from foveate_dvis.daq.tracker import best_score

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Instances:
    """What enters the refiner: ``states`` (instance, frame, channel), ``padding`` bool (instance, frame),
    ``logits`` (instance, class + 1); the rest as in :class:`~foveate_dvis.daq.outputs.Refined`.
    """

    ids: tuple[int, ...]
    linked: tuple[bool, ...]
    states: Tensor
    padding: Tensor
    logits: Tensor
    chains: Tensor | None


def gather(
    state: TrackerState,
    tracks: Sequence[TrackMemory],
    config: DaqConfig,
    refiner: RefinerConfig,
    *,
    exact: bool = False,
    held: Refined | None = None,
) -> Instances:
    """The instances over all frames of ``state``; ``tracks``: the kept ones.

    ``exact``: in the order that upstream's unsorted top-k leaves them in; otherwise best first, equals by age.
    ``held``: the instances of another run over the same frames.
    """
    chosen = best_tracks(tracks, refiner.top_tracks, exact=exact) if held is None else _tracks_of(held, tracks)
    length = state.next_frame
    states = [over_clip(track, length) for track in chosen]
    padding = [[not track.start <= frame < track.end for frame in range(length)] for track in chosen]
    logits = [track.logits for track in chosen]
    chains, more = _chains(state, config.num_new_ins - len(chosen), held)
    if chains is not None and more:
        index = torch.tensor(more, device=chains.device)
        linked_states = chained([frame.embeds for frame in state.frames], chains)[index]
        linked_logits = chained([frame.logits for frame in state.frames], chains).mean(dim=1)[index]
        states += list(linked_states)
        logits += list(linked_logits)
        padding += [[False] * length] * len(more)
    return Instances(
        ids=tuple(track.id for track in chosen) + tuple(more),
        linked=(False,) * len(chosen) + (True,) * len(more),
        states=torch.stack(states),
        padding=torch.tensor(padding, dtype=torch.bool, device=states[0].device),
        logits=torch.stack(logits),
        chains=chains,
    )


def refine(refiner: Refiner, state: TrackerState, instances: Instances, features: Tensor) -> Refined:
    """The refiner's answer; masks for the clip's last frames, those of ``features`` (frame, channel, y, x)."""
    embeds = torch.stack([frame.embeds for frame in state.frames])
    answer = refiner(instances.states, embeds)
    return Refined(
        ids=instances.ids,
        linked=instances.linked,
        logits=answer.logits,
        masks=masks_of(answer.mask_embeds[:, -len(features) :], features),
        mask_embeds=answer.mask_embeds,
        embeds=answer.embeds,
        importance=answer.importance,
        padding=instances.padding,
        unrefined_logits=instances.logits,
        chains=instances.chains,
    )


def nothing_refined(like: Refined) -> Refined:
    """No instance at all, in the shapes of ``like``: what upstream answers to exactly one."""
    return Refined(
        ids=(),
        linked=(),
        logits=like.logits[:0],
        masks=like.masks[:0],
        mask_embeds=like.mask_embeds[:0],
        embeds=like.embeds[:0],
        importance=like.importance[:0],
        padding=like.padding[:0],
        unrefined_logits=like.unrefined_logits[:0],
        chains=like.chains,
    )


def best_tracks(tracks: Sequence[TrackMemory], count: int, *, exact: bool = False) -> list[TrackMemory]:
    """The ``count`` tracks of the best class scores (softmax of the mean logits)."""
    if not tracks:
        return []
    scores = best_score(torch.stack([track.logits.detach() for track in tracks]))
    count = min(count, len(tracks))
    if exact:
        order = torch.topk(scores, count, sorted=False).indices
    else:
        order = torch.sort(scores, descending=True, stable=True).indices[:count]
    return [tracks[i] for i in order.tolist()]


def over_clip(track: TrackMemory, length: int) -> Tensor:
    """Its states over the clip's ``length`` frames (frame, channel), its position memory outside its life."""
    position = track.position
    before, after = track.start, length - track.end
    return torch.stack([position] * before + list(track.states) + [position] * after)


def _chains(state: TrackerState, missing: int, held: Refined | None) -> tuple[Tensor | None, list[int]]:
    """The clip's chains of queries, and which of them fill the ``missing`` places."""
    if held is not None:
        return held.chains, [i for i, made in zip(held.ids, held.linked, strict=True) if made]
    if missing <= 0:
        return None, []
    chains = link_queries([frame.embeds for frame in state.frames])
    logits = chained([frame.logits.detach() for frame in state.frames], chains).mean(dim=1)
    order = torch.sort(best_score(logits), descending=True, stable=True).indices
    return chains, order[:missing].tolist()


def _tracks_of(held: Refined, tracks: Sequence[TrackMemory]) -> list[TrackMemory]:
    by_id = {track.id: track for track in tracks}
    return [by_id[i] for i, made in zip(held.ids, held.linked, strict=True) if not made]
