"""Targets of detectors: one number for each object, frozen to a query or followed by best match.

Kinds (``@match`` variants exist of each):

- ``class``: probability or logit of the object's class at its query.
- ``box_top``, ``box_left``, ``box_bottom``, ``box_right``: an edge of the box, in original pixels.
- ``iou_score``: IoU of the query's box with the frozen box, times the class probability (D-RISE, Petsiuk et
  al. 2021, eq. 4, without its objectness term).
- ``mask``: mean mask logit over the frozen mask.

By query, the object is what query ``q`` says, whatever it says after a perturbation. By match (``class@match``),
it is the query with the largest IoU x class probability among those whose box (or mask, for models without
boxes) overlaps the frozen one by :data:`MATCH_IOU` or more; where there is none the object has vanished:
probabilities and IoU scores are 0, a logit is the smallest that any query gives the class, a box edge or a
mask's mean is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import torch

from foveate.detection.boxes import iou
from foveate.errors import UsageError
from foveate.interfaces import BoundTarget, Scale, Target, TargetRow
from foveate_detr.detections import Detections

if TYPE_CHECKING:
    from torch import Tensor

EDGES = ("box_top", "box_left", "box_bottom", "box_right")
MATCH = "@match"
MATCH_IOU = 0.5
"""Boxes that overlap less are of another object: COCO's loosest threshold (Lin et al. 2014, sec. 5)."""


def kinds_of(*, boxes: bool, masks: bool) -> tuple[str, ...]:
    """Kinds of target that a model with or without boxes and masks has; ``class`` is the default."""
    plain = ("class", *((*EDGES, "iou_score") if boxes else ()), *(("mask",) if masks else ()))
    return plain + tuple(f"{kind}{MATCH}" for kind in plain)


# ------------------------------------------------------------------------------- binding


def bind(
    found: Detections, labels: Sequence[str], target: Target, kind: str, *, threshold: float, at_most: int
) -> BoundTarget:
    """Freeze a target: rows in order of samples, then of scores.

    Without ``target.object`` every object whose probability is above ``threshold`` has a row, at most
    ``at_most`` a sample; a sample without such objects has none. With an object (a query) and a label the
    row is that query's and that label's, whatever its score. Raises UsageError for an unknown query or label.
    """
    table = found.probabilities.detach()
    wanted = None if target.label is None else index_of(target.label, labels)
    scores, classes = (table[..., wanted], None) if wanted is not None else table.max(-1)
    rows = []
    for sample in range(len(table)):
        for query in _queries(scores[sample], target.object, threshold, at_most):
            chosen = wanted if classes is None else int(classes[sample, query])
            if kind.startswith("mask") and not _has_mask(found, sample, query):
                continue
            rows.append(TargetRow(sample, kind, chosen, labels[int(chosen or 0)], query))
    scale: Scale = "value" if kind.startswith(("box_", "mask")) else target.scale
    return BoundTarget(tuple(rows), scale, _frozen(found, rows))


def index_of(label: str | int, labels: Sequence[str]) -> int:
    """Class index of a name or index. Raises UsageError with the close matches."""
    if isinstance(label, int) and not isinstance(label, bool):
        if 0 <= label < len(labels):
            return label
        raise UsageError(f"no class {label}: there are {len(labels)}", remedy=f"0 to {len(labels) - 1}")
    same = [i for i, name in enumerate(labels) if name.casefold() == str(label).casefold()]
    if len(same) == 1:
        return same[0]
    close = get_close_matches(str(label), labels, n=3) or list(labels[:3])
    problem = "is ambiguous" if same else "is not one of the model's classes"
    raise UsageError(f"label {label!r} {problem}", remedy=f"perhaps {', '.join(map(repr, close))}, or an index")


def _queries(scores: Tensor, query: int | None, threshold: float, at_most: int) -> list[int]:
    if query is None:
        order = scores.argsort(descending=True, stable=True).tolist()
        return [q for q in order if float(scores[q]) > threshold][:at_most]
    if not 0 <= query < len(scores):
        raise UsageError(f"no object query {query}: there are {len(scores)}", remedy=f"0 to {len(scores) - 1}")
    return [query]


def _has_mask(found: Detections, sample: int, query: int) -> bool:
    return found.masks is not None and bool((found.masks[sample, query] > 0).any())


def _frozen(found: Detections, rows: Sequence[TargetRow]) -> Mapping[str, Tensor]:
    """Boxes ``(target, 4)`` and masks ``(target, y, x)`` at the time of binding."""
    at = [row.sample for row in rows], [row.object for row in rows]
    context = {}
    if found.boxes is not None:
        context["box"] = found.boxes.detach()[at]
    if found.masks is not None:
        context["mask"] = found.masks.detach()[at] > 0
    return context


# ------------------------------------------------------------------------------- scoring


def score(found: Detections, bound: BoundTarget) -> Tensor:
    """One differentiable number a row, float32 ``(target,)``."""
    if not bound.rows:
        return found.logits.new_zeros(0, dtype=torch.float32)
    kinds = {row.kind for row in bound.rows}
    if len(kinds) > 1:
        raise UsageError(f"rows of one target mix kinds {sorted(kinds)}", remedy="bind one kind at a time")
    kind = kinds.pop()
    base = kind.removesuffix(MATCH)
    if kind.endswith(MATCH):
        query, seen = match(found, bound)
    else:
        query = torch.tensor([int(row.object or 0) for row in bound.rows], device=found.logits.device)
        seen = torch.ones_like(query, dtype=torch.bool)
    return _Rows(found, bound, query, seen).score(base)


def match(found: Detections, bound: BoundTarget) -> tuple[Tensor, Tensor]:
    """Per row the query of largest IoU x class probability, and whether one overlaps by :data:`MATCH_IOU`."""
    sample = [row.sample for row in bound.rows]
    classes = [int(row.class_index or 0) for row in bound.rows]
    overlap = _overlap(found, bound, sample)
    near = overlap >= MATCH_IOU
    agreement = overlap * found.probabilities.detach()[sample, :, classes]
    query = torch.where(near, agreement, -1.0).argmax(-1)
    return query, near.any(-1)


def _overlap(found: Detections, bound: BoundTarget, sample: list[int]) -> Tensor:
    """IoU of every query's box (or mask, where there are no boxes) with each row's frozen one, (target, query)."""
    if found.boxes is not None:
        return iou(found.boxes.detach()[sample], bound.context["box"].to(found.boxes)[:, None])
    assert found.masks is not None  # every model of the family gives boxes or masks
    own = found.masks.detach()[sample].flatten(2) > 0
    frozen = bound.context["mask"].to(own.device).flatten(1)[:, None]
    shared, union = (own & frozen).sum(-1).float(), (own | frozen).sum(-1).float()
    return shared / union.clamp_min(1)


class _Rows:
    """Rows of one bound target, each with the query that answers for it now."""

    def __init__(self, found: Detections, bound: BoundTarget, query: Tensor, seen: Tensor) -> None:
        self.found, self.bound, self.query, self.seen = found, bound, query, seen
        self.sample = torch.tensor([row.sample for row in bound.rows], device=query.device)
        self.classes = torch.tensor([int(row.class_index or 0) for row in bound.rows], device=query.device)

    def score(self, kind: str) -> Tensor:
        methods: Mapping[str, Callable[[], Tensor]] = {
            "class": self._class,
            "iou_score": self._iou_score,
            "mask": self._mask,
        }
        return self._edge(EDGES.index(kind)) if kind in EDGES else methods[kind]()

    def _class(self) -> Tensor:
        if self.bound.scale == "value":
            raise UsageError("a class has no 'value'", remedy="scale='probability' or 'logit'")
        if self.bound.scale == "probability":
            return self._probability() * self.seen
        logits = self.found.answers.float()
        own = logits[self.sample, self.query, self.classes]
        floor = logits[self.sample, :, self.classes].amin(-1)
        return torch.where(self.seen, own, floor)

    def _probability(self) -> Tensor:
        return self.found.probabilities[self.sample, self.query, self.classes]

    def _box(self) -> Tensor:
        assert self.found.boxes is not None  # kinds_of offers no box kinds without
        return self.found.boxes[self.sample, self.query]

    def _edge(self, number: int) -> Tensor:
        return torch.where(self.seen, self._box()[:, number], torch.nan)

    def _iou_score(self) -> Tensor:
        box = self._box()
        return iou(box, self.bound.context["box"].to(box)) * self._probability() * self.seen

    def _mask(self) -> Tensor:
        assert self.found.masks is not None
        own = self.found.masks[self.sample, self.query].float()
        frozen = self.bound.context["mask"].to(own)
        mean = (own * frozen).sum((-2, -1)) / frozen.sum((-2, -1)).clamp_min(1)
        return torch.where(self.seen, mean, torch.nan)
