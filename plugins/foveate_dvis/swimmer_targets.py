"""What the swimmer says of its tracks, and one number for each of them that can be explained.

A query is a track: its class and its masks are bound to the query (kinds ``class`` and ``mask``), which holds the
identities of the intact clip. ``class@match`` follows the shape instead, for another query may take it over where
the clip is changed: it reads the query whose mask overlaps the frozen one by :data:`MATCH_IOU` or more in its best
frame (a shape that is held still is where it was in one frame only), the one of largest IoU x class probability
where there are several. Where there is none the shape is lost: its probability is 0, a logit the smallest that any
query gives the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from foveate.interfaces import BoundTarget, Target
from foveate.pretrained.choices import one_kind
from foveate_dvis import videomt_tracks
from foveate_dvis.videomt_tracks import Tracks

if TYPE_CHECKING:
    from torch import Tensor

    from foveate_dvis.swimmer_network import SwimmerOutput

MATCH = "class@match"
KINDS = ("class", "mask", MATCH)
MATCH_IOU = 0.5
"""Masks that overlap less in every frame are of another shape."""


class Matched(NamedTuple):
    """Per row: the ``query`` that says the shape now, whether one does (``seen``), ``overlap`` of its mask."""

    query: Tensor
    seen: Tensor
    overlap: Tensor


def tracks_of(outputs: SwimmerOutput) -> Tracks:
    """Classes of the whole clip, which is one frame to VidEoMT's rules, and masks (sample, frame, query, y, x)."""
    return Tracks(outputs.logits[:, None], outputs.masks.transpose(1, 2))


def bind(
    found: Tracks, labels: Sequence[str], target: Target, kind: str, *, threshold: float, at_most: int
) -> BoundTarget:
    """Freeze a target; see :func:`foveate_dvis.videomt_tracks.bind`."""
    plain = replace(target, kind="class" if kind == MATCH else kind)
    bound = videomt_tracks.bind(found, labels, plain, threshold=threshold, at_most=at_most)
    return replace(bound, rows=tuple(replace(row, kind=kind) for row in bound.rows))


def score(found: Tracks, bound: BoundTarget) -> Tensor:
    """One differentiable number a row, float32 ``(target,)``."""
    if not bound.rows:
        return found.masks.new_zeros(0, dtype=torch.float32)
    if one_kind(bound) != MATCH:
        return videomt_tracks.score(found, bound)
    matched = match(found, bound)
    rows = tuple(
        replace(row, kind="class", object=query)
        for row, query in zip(bound.rows, matched.query.tolist(), strict=True)
    )
    own = videomt_tracks.score(found, replace(bound, rows=rows))
    if bound.scale == "probability":
        return own * matched.seen
    sample = [row.sample for row in bound.rows]
    floor = found.logits[sample, :, [int(row.class_index or 0) for row in bound.rows]].amin(-1)
    return torch.where(matched.seen, own, floor)


def match(found: Tracks, bound: BoundTarget) -> Matched:
    """Which query says each row's frozen shape now; ``overlap`` is that of the best frame."""
    sample = [row.sample for row in bound.rows]
    frozen = bound.context["mask"].to(found.masks.device)[:, None]
    own = (found.masks.detach()[sample] > 0).transpose(1, 2)
    shared, union = (both.sum((-2, -1)).float() for both in (own & frozen, own | frozen))
    overlap = (shared / union.clamp_min(1)).amax(-1)
    near = overlap >= MATCH_IOU
    said = found.probabilities.detach()[sample, :, [int(row.class_index or 0) for row in bound.rows]]
    query = torch.where(near, overlap * said, -1.0).argmax(-1)
    return Matched(query, near.any(-1), overlap.gather(1, query[:, None])[:, 0])
