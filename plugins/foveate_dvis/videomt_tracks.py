"""What VidEoMT says of its tracks: a class over the whole clip and a mask in every frame.

A query answers in each frame. Its class over the clip is read from the mean of its class logits over frames, as in
MinVIS (Huang, Yu and Anandkumar 2022, arXiv:2208.02245); the last class is "no object".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F

from foveate.errors import UsageError
from foveate.interfaces import Batch, BoundTarget, Prediction, Target, TargetRow
from foveate.pretrained.choices import index_of, one_kind

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Tracks:
    """Class logits ``by_frame (sample, frame, query, class + 1)`` and ``masks (sample, frame, query, y, x)``."""

    by_frame: Tensor
    masks: Tensor

    @cached_property
    def logits(self) -> Tensor:
        """Mean over frames, ``(sample, query, class + 1)``, float32."""
        return self.by_frame.float().mean(1)

    @property
    def probabilities(self) -> Tensor:
        """Of the true classes, ``(sample, query, class)``."""
        return self.logits.softmax(-1)[..., :-1]


def predictions(
    found: Tracks, batch: Batch, labels: Sequence[str], *, threshold: float, at_most: int
) -> list[list[Prediction]]:
    """Tracks surer than ``threshold``, surest first, at most ``at_most`` a sample."""
    scores, classes = found.probabilities.detach().max(-1)
    answers = []
    for sample, geometry in enumerate(batch.geometry):
        frames = batch.per_sample["frame_index"][sample].tolist()
        size = (geometry.original_height, geometry.original_width)
        listed = []
        for query in _sure(scores[sample], threshold, at_most):
            mask = _original(found.masks[sample, :, query], size)
            label = int(classes[sample, query])
            shown = [frames[i] for i in np.flatnonzero(mask.any((1, 2)))]
            extra = {"first_frame": float(shown[0]), "last_frame": float(shown[-1])} if shown else {}
            score = float(scores[sample, query])
            listed.append(
                Prediction(labels[label], score, label, object=query, mask=mask, track=str(query), extra=extra)
            )
        answers.append(listed)
    return answers


def _sure(scores: Tensor, threshold: float, at_most: int) -> list[int]:
    order = scores.argsort(descending=True, stable=True).tolist()
    return [query for query in order if float(scores[query]) > threshold][:at_most]


def _original(logits: Tensor, size: tuple[int, int]) -> NDArray[np.bool_]:
    """One track's mask in pixels of the original, bool ``(frame, y, x)``: bilinear, then above 0."""
    resized = F.interpolate(logits.detach().float()[:, None], size=size, mode="bilinear", align_corners=False)
    return np.asarray((resized[:, 0] > 0).cpu().numpy(), dtype=np.bool_)


def bind(found: Tracks, labels: Sequence[str], target: Target, *, threshold: float, at_most: int) -> BoundTarget:
    """Rows of one kind, ``class`` or ``mask``, with their masks frozen.

    With ``target.object`` that query's, whatever its score; else those of all tracks surer than ``threshold``. A
    track without any mask has no row of kind ``mask``. Raises UsageError for an unknown query or label.
    """
    table = found.probabilities.detach()
    wanted = None if target.label is None else index_of(target.label, labels)
    scores, classes = table.max(-1) if wanted is None else (table[..., wanted], None)
    rows = []
    for sample in range(len(table)):
        for query in _chosen(scores[sample], target.object, threshold, at_most):
            label = wanted if classes is None else int(classes[sample, query])
            if target.kind == "mask" and not bool((found.masks[sample, :, query] > 0).any()):
                continue
            rows.append(TargetRow(sample, target.kind, label, labels[int(label or 0)], query))
    frozen = found.masks.detach()[[row.sample for row in rows], :, [int(row.object or 0) for row in rows]] > 0
    return BoundTarget(tuple(rows), "value" if target.kind == "mask" else target.scale, {"mask": frozen})


def _chosen(scores: Tensor, query: int | None, threshold: float, at_most: int) -> list[int]:
    if query is None:
        return _sure(scores, threshold, at_most)
    if not 0 <= query < len(scores):
        raise UsageError(f"no object query {query}: there are {len(scores)}", remedy=f"0 to {len(scores) - 1}")
    return [query]


def score(found: Tracks, bound: BoundTarget) -> Tensor:
    """One differentiable number a row, float32 ``(target,)``."""
    sample, query = [row.sample for row in bound.rows], [int(row.object or 0) for row in bound.rows]
    classes = [int(row.class_index or 0) for row in bound.rows]
    if one_kind(bound) == "mask":
        masks = found.masks[sample, :, query].float()
        frozen = bound.context["mask"].to(masks)
        return (masks * frozen).sum((1, 2, 3)) / frozen.sum((1, 2, 3))
    if bound.scale == "value":
        raise UsageError("a class has no 'value'", remedy="scale='probability' or 'logit'")
    table = found.logits.softmax(-1) if bound.scale == "probability" else found.logits
    return table[sample, query, classes]


def shares(bound: BoundTarget) -> Tensor:
    """How much each frame counts for a mask's score, ``(target, frame)``, summing to 1: its share of pixels."""
    area = bound.context["mask"].flatten(2).sum(-1).float()
    return area / area.sum(-1, keepdim=True)
