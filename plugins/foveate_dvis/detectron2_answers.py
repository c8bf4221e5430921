"""What detectron2's models answer: queries with class logits and masks (Mask2Former), or instances (R-CNN).

Queries keep their number, so a target is query j and class c, whatever the picture. Instances have no identity:
one is found again by its class and the box that overlaps it most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from foveate.errors import UsageError
from foveate.interfaces import BoundTarget, Prediction, Target, TargetRow
from foveate.pretrained.choices import index_of

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.geometry import Geometry

MATCH_IOU = 0.5
"""Boxes that overlap less are of another object."""


@dataclass(frozen=True, eq=False)
class Answers:
    """``queries``: class logits (sample, query, class + 1) and mask logits (sample, query, y, x), or None;
    ``instances``: detectron2's own, one a sample, in pixels of the padded input.
    """

    queries: tuple[Tensor, Tensor] | None
    instances: tuple[Any, ...]


def predictions(
    answers: Answers, sample: int, geometry: Geometry, labels: Sequence[str], top: int
) -> list[Prediction]:
    """Best first, boxes and masks in original pixels."""
    if answers.queries is None:
        return _of_instances(answers.instances[sample], geometry, labels, top)
    logits, masks = (part[sample].detach().float() for part in answers.queries)
    size = (geometry.input_height, geometry.input_width)
    full = F.interpolate(masks[None], size, mode="bilinear", align_corners=False)[0]
    inside = (full > 0).flatten(1)
    # Class probability times mean foreground probability in the mask (Cheng et al. 2022, arXiv:2112.01527).
    quality = (full.sigmoid().flatten(1) * inside).sum(1) / (inside.sum(1) + 1e-6)
    pairs = logits.softmax(-1)[:, :-1]
    best, index = pairs.flatten().sort(descending=True, stable=True)
    chosen = index[:top]
    scores = best[:top] * quality[chosen // pairs.shape[1]]
    found = []
    for place in scores.argsort(descending=True, stable=True).tolist():
        query, label = divmod(int(chosen[place]), pairs.shape[1])
        mask = original_mask(full[query] > 0, geometry)
        found.append(Prediction(labels[label], float(scores[place]), label, query, box_of(mask), mask.numpy()))
    return found


def _of_instances(instances: Any, geometry: Geometry, labels: Sequence[str], top: int) -> list[Prediction]:
    found = []
    order = instances.scores.detach().argsort(descending=True, stable=True).tolist()[:top]
    for i in order:
        left, above, right, below = instances.pred_boxes.tensor[i].detach().tolist()
        top_, left_ = geometry.to_original(above, left)
        bottom, right_ = geometry.to_original(below, right)
        mask = (
            original_mask(instances.pred_masks[i].detach() > 0.5, geometry)
            if instances.has("pred_masks")
            else None
        )
        label, score = int(instances.pred_classes[i]), float(instances.scores[i].detach())
        box = (top_, left_, bottom, right_)
        found.append(Prediction(labels[label], score, label, i, box, None if mask is None else mask.numpy()))
    return found


def original_mask(mask: Tensor, geometry: Geometry) -> Tensor:
    """A bool mask of the padded input as bool over original pixels: the input pixel under each pixel's centre."""
    rows = (torch.arange(geometry.original_height) + 0.5) * geometry.scale_y + geometry.offset_y
    columns = (torch.arange(geometry.original_width) + 0.5) * geometry.scale_x + geometry.offset_x
    rows = rows.long().clamp(0, mask.shape[0] - 1)
    columns = columns.long().clamp(0, mask.shape[1] - 1)
    return mask.cpu()[rows][:, columns]


def box_of(mask: Tensor) -> tuple[float, float, float, float] | None:
    """(top, left, bottom, right) around a mask, None where it is empty."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    return (float(rows[0]), float(columns[0]), rows[-1] + 1.0, columns[-1] + 1.0) if rows else None


# ------------------------------------------------------------------------------- targets


def bind(answers: Answers, samples: int, labels: Sequence[str], target: Target) -> BoundTarget:
    """One row a sample: the query or instance that is named, or the best one (of a class). Raises UsageError."""
    wanted = None if target.label is None else index_of(target.label, labels)
    rows = []
    for sample in range(samples):
        table, queries = _table(answers, sample), answers.queries is not None
        found = _best(table, wanted, target.object, everything=queries)
        if found is not None:
            rows.append(TargetRow(sample, "class", found[1], labels[found[1]], found[0]))
    boxes = [_boxes(answers, row.sample)[int(row.object or 0)] for row in rows]
    context = {"box": torch.stack(boxes)} if boxes else {}
    return BoundTarget(tuple(rows), target.scale, context)


def _table(answers: Answers, sample: int) -> Tensor:
    """Probabilities (object, class); of instances zero but for their own class."""
    if answers.queries is not None:
        return answers.queries[0][sample].detach().float().softmax(-1)[:, :-1]
    one = answers.instances[sample]
    classes = one.pred_classes
    table = torch.zeros(len(one), int(classes.max()) + 1 if len(one) else 1)
    table[torch.arange(len(one)), classes.cpu()] = one.scores.detach().float().cpu()
    return table


def _best(table: Tensor, wanted: int | None, number: int | None, *, everything: bool) -> tuple[int, int] | None:
    """(object, class), None where no object is of the class; ``everything``: every object has every class."""
    if number is not None and not 0 <= number < len(table):
        raise UsageError(f"no object {number}: there are {len(table)}")
    rows = [number] if number is not None else list(range(len(table)))
    classes = list(range(table.shape[1])) if wanted is None else [wanted] if wanted < table.shape[1] else []
    if not rows or not classes:
        return None
    part = table[rows][:, classes]
    at, label = divmod(int(part.argmax()), len(classes))
    return (rows[at], classes[label]) if everything or float(part[at, label]) > 0 else None


def _boxes(answers: Answers, sample: int) -> Tensor:
    """Boxes (object, 4) of instances; queries need none."""
    if answers.queries is not None:
        return torch.zeros(answers.queries[0].shape[1], 4)
    boxes: Tensor = answers.instances[sample].pred_boxes.tensor.detach().cpu()
    return boxes


def score(answers: Answers, bound: BoundTarget) -> Tensor:
    """One differentiable number a row; 0 where an instance is not found again."""
    if bound.scale == "value" or (bound.scale == "logit" and answers.queries is None):
        raise UsageError(f"scale {bound.scale!r} is not known here", remedy="probability (of queries: or logit)")
    return (
        torch.stack([_score(answers, bound, i) for i in range(len(bound))]).float()
        if len(bound)
        else torch.zeros(0)
    )


def _score(answers: Answers, bound: BoundTarget, i: int) -> Tensor:
    row = bound.rows[i]
    label = int(row.class_index or 0)
    if answers.queries is not None:
        logits = answers.queries[0][row.sample, int(row.object or 0)].float()
        return logits[label] if bound.scale == "logit" else logits.softmax(-1)[label]
    one = answers.instances[row.sample]
    near = _overlap(_boxes(answers, row.sample), bound.context["box"][i].cpu()) * (one.pred_classes.cpu() == label)
    if not len(near) or float(near.max()) < MATCH_IOU:
        nothing: Tensor = one.scores.sum() * 0.0  # its gradient is zero, and it has one
        return nothing
    chosen: Tensor = one.scores[int(near.argmax())]
    return chosen


def _overlap(boxes: Tensor, box: Tensor) -> Tensor:
    """IoU of boxes (left, top, right, bottom) with one."""
    low, high = torch.maximum(boxes[:, :2], box[:2]), torch.minimum(boxes[:, 2:], box[2:])
    shared = (high - low).clamp_min(0).prod(-1)
    total = (boxes[:, 2:] - boxes[:, :2]).prod(-1) + (box[2:] - box[:2]).prod() - shared
    return shared / total.clamp_min(1e-9)
