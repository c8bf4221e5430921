"""Targets of a tracker: one number for each instance, whose identity is that of the intact clip.

Kinds:

- ``class``: probability or logit of a class of the instance, as the model answers it for the whole clip.
- ``mask``: mean mask logit over the instance's frozen mask, all frames together.

Which rows are tracks is decided by thresholds, so a changed picture may change what "track 3" is. Scores of a held
run (:meth:`AttentionSource.hold`) keep the decisions of the intact clip. Where a run decided otherwise by itself,
the instance is looked for by its frozen mask: the one of largest IoU x class probability among those of IoU
:data:`MATCH_IOU` or more. Where there is none the identity is lost: the probability is 0, a logit is the smallest
that any instance gives the class, a mask's mean is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from foveate.errors import UsageError
from foveate.interfaces import BoundTarget, Scale, Target, TargetRow
from foveate.pretrained.choices import index_of
from foveate_dvis.daq_clips import DaqClips

if TYPE_CHECKING:
    from torch import Tensor

KINDS = ("class", "mask")
MATCH_IOU = 0.5
"""Masks that overlap less are of another object."""


class Identity(NamedTuple):
    """What became of a bound instance in another run.

    ``kept``: it is still there; ``overlap``: IoU of its mask with the frozen one over all frames; ``instance``:
    its number in this run, -1 where it is lost; ``held``: the decisions were the intact clip's, by holding or by
    themselves.
    """

    kept: bool
    overlap: float
    instance: int
    held: bool


def bind(
    clips: DaqClips, labels: Sequence[str], target: Target, kind: str, *, threshold: float, at_most: int
) -> BoundTarget:
    """Freeze a target: rows in order of samples, then of scores.

    Without ``target.object`` every instance whose probability is above ``threshold`` has a row, at most
    ``at_most`` a sample, and in any case the best one; a clip without instances has none. An object is the number
    of an instance (``Prediction.object``). Raises UsageError for an unknown instance or label.
    """
    wanted = None if target.label is None else index_of(target.label, labels)
    rows: list[TargetRow] = []
    for sample, clip in enumerate(clips.clips):
        table = clip.final_logits.detach().float().softmax(-1)[:, :-1]
        for instance in _chosen(table, wanted, target.object, threshold, at_most):
            best = int(table[instance].argmax()) if wanted is None else wanted
            if kind == "class" or bool((clip.final_masks[instance] > 0).any()):
                rows.append(TargetRow(sample, kind, best, labels[best], instance))
    scale: Scale = "value" if kind == "mask" else target.scale
    return BoundTarget(tuple(rows), scale, _frozen(clips, rows))


def _chosen(table: Tensor, wanted: int | None, instance: int | None, threshold: float, at_most: int) -> list[int]:
    if instance is not None:
        if not 0 <= instance < len(table):
            raise UsageError(f"no instance {instance}: the clip has {len(table)}")
        return [instance]
    scores = table.amax(-1) if wanted is None else table[:, wanted]
    order: list[int] = scores.argsort(descending=True, stable=True).tolist()
    above = [i for i in order if float(scores[i]) > threshold][:at_most]
    return above or order[:1]


def _frozen(clips: DaqClips, rows: Sequence[TargetRow]) -> Mapping[str, Tensor]:
    """``mask`` bool (target, frame, y/4, x/4) and ``decisions`` int64 (target,), when binding."""
    if not rows:
        return {}
    whole = [clips.clips[row.sample].final_masks[int(row.object or 0)].detach() > 0 for row in rows]
    longest = max(len(mask) for mask in whole)
    masks = torch.zeros(len(rows), longest, *whole[0].shape[1:], dtype=torch.bool, device=whole[0].device)
    for i, mask in enumerate(whole):
        masks[i, : len(mask)] = mask
    decisions = torch.tensor([clips.decisions(row.sample) for row in rows])
    return {"mask": masks, "decisions": decisions}


def score(clips: DaqClips, bound: BoundTarget) -> Tensor:
    """One differentiable number a row, float32 ``(target,)``."""
    if not bound.rows:
        return torch.zeros(0)
    kinds = {row.kind for row in bound.rows}
    if len(kinds) > 1:
        raise UsageError(f"rows of one target mix kinds {sorted(kinds)}", remedy="bind one kind at a time")
    found = identities(clips, bound)
    one = _mask if kinds == {"mask"} else _class
    return torch.stack([one(clips, bound, i, found[i]) for i in range(len(bound))]).float()


def identities(clips: DaqClips, bound: BoundTarget) -> list[Identity]:
    """What became of every bound instance."""
    return [_identity(clips, bound, i) for i in range(len(bound))]


def _identity(clips: DaqClips, bound: BoundTarget, i: int) -> Identity:
    row = bound.rows[i]
    clip, number = clips.clips[row.sample], int(row.object or 0)
    overlap = _overlap(clip.final_masks.detach() > 0, bound.context["mask"][i])
    if clips.held[row.sample] or clips.decisions(row.sample) == int(bound.context["decisions"][i]):
        return Identity(True, float(overlap[number]), number, True)
    near = overlap >= MATCH_IOU
    if not bool(near.any()):
        return Identity(False, float(overlap.max()) if len(overlap) else 0.0, -1, False)
    table = clip.final_logits.detach().float().softmax(-1)[:, int(row.class_index or 0)]
    best = int(torch.where(near, overlap * table, -1.0).argmax())
    return Identity(True, float(overlap[best]), best, False)


def _overlap(masks: Tensor, frozen: Tensor) -> Tensor:
    """IoU of every instance's mask ``(instance, frame, y, x)`` with the frozen one, over all frames."""
    frozen = frozen[: masks.shape[1]].to(masks.device)
    shared = (masks & frozen).sum((1, 2, 3)).float()
    return shared / (masks | frozen).sum((1, 2, 3)).clamp_min(1).float()


def _class(clips: DaqClips, bound: BoundTarget, i: int, found: Identity) -> Tensor:
    if bound.scale == "value":
        raise UsageError("a class has no 'value'", remedy="scale='probability' or 'logit'")
    row = bound.rows[i]
    logits, index = clips.clips[row.sample].final_logits, int(row.class_index or 0)
    if found.kept:
        answer: Tensor = logits[found.instance]
        return answer[index] if bound.scale == "logit" else answer.float().softmax(-1)[index]
    if bound.scale == "logit" and len(logits):
        return logits[:, index].amin()
    return logits.new_zeros(()) if bound.scale == "probability" else logits.new_full((), torch.nan)


def _mask(clips: DaqClips, bound: BoundTarget, i: int, found: Identity) -> Tensor:
    masks = clips.clips[bound.rows[i].sample].final_masks
    if not found.kept:
        return masks.new_full((), torch.nan)
    own = masks[found.instance].float()
    frozen = bound.context["mask"][i, : len(own)].to(own)
    return (own * frozen).sum() / frozen.sum().clamp_min(1)
