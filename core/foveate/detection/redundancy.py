"""Are there more queries than needed: objects found twice, and objects that survive when queries are dropped.

Detectors without non-maximum suppression must not answer twice for one object; a set loss teaches that (Carion
et al. 2020). An answer is a duplicate if a surer answer of the same class overlaps it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.detection.boxes import iou

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

OVERLAP = 0.5


def overlaps(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """IoU of every box ``(box, 4)`` with every other ``(other, 4)``: ``(box, other)``."""
    first, second = (torch.as_tensor(np.asarray(boxes, np.float64).reshape(-1, 4)) for boxes in (a, b))
    return np.asarray(iou(first[:, None], second[None]))


def duplicates(
    scores: ArrayLike, classes: ArrayLike, boxes: ArrayLike, *, overlap: float = OVERLAP
) -> NDArray[np.bool_]:
    """Which answers ``(answer,)`` repeat a surer one of the same class by IoU of at least ``overlap``.

    Equal scores: the one given first is the surer.
    """
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    rank = np.empty(order.size, np.intp)
    rank[order] = np.arange(order.size)
    labels = np.asarray(classes)
    surer = rank[None] < rank[:, None]
    return np.asarray((surer & (labels[:, None] == labels[None]) & (overlaps(boxes, boxes) >= overlap)).any(1))


def duplicate_curve(
    scores: ArrayLike,
    classes: ArrayLike,
    boxes: ArrayLike,
    *,
    thresholds: Sequence[float],
    overlap: float = OVERLAP,
) -> NDArray[np.float64]:
    """Share of duplicates among answers above each score threshold, ``(threshold,)``; NaN where none is above."""
    values, labels = np.asarray(scores, np.float64), np.asarray(classes)
    places = np.asarray(boxes, np.float64).reshape(-1, 4)
    kept = [values > threshold for threshold in thresholds]
    return np.array(
        [
            float(duplicates(values[k], labels[k], places[k], overlap=overlap).mean()) if k.any() else np.nan
            for k in kept
        ]
    )


def found_by(
    classes: ArrayLike,
    boxes: ArrayLike,
    true_classes: ArrayLike,
    true_boxes: ArrayLike,
    *,
    overlap: float = OVERLAP,
) -> NDArray[np.bool_]:
    """Which answer finds which object, ``(answer, object)``: same class and IoU of at least ``overlap``."""
    same = np.asarray(classes)[:, None] == np.asarray(true_classes)[None]
    return np.asarray(same & (overlaps(boxes, true_boxes) >= overlap))


def drop_curve(finds: ArrayLike, keep: Sequence[int]) -> NDArray[np.float64]:
    """Expected share of objects found by ``k`` of all queries drawn at random, for each ``k`` in ``keep``.

    ``finds`` is bool ``(query, object)``. Exact, no draws: an object that m of n queries find is missed by k of
    them with probability C(n - m, k) / C(n, k). Answers are dropped after the decoder ran; to drop queries
    from its self-attention, knock them out (:mod:`foveate.capture.interventions`). NaN without objects.
    """
    from scipy.special import gammaln

    table = np.asarray(finds, np.bool_)
    queries, objects = table.shape
    if not objects:
        return np.full(len(keep), np.nan)
    left = queries - table.sum(0)[None]
    k = np.asarray(keep, np.int64)[:, None]
    possible = left >= k
    spare = np.where(possible, left - k, 0)
    missed = np.exp(gammaln(left + 1) - gammaln(spare + 1) - gammaln(queries + 1) + gammaln(queries - k + 1))
    return np.asarray(1.0 - np.where(possible, missed, 0.0).mean(1))
