"""Which predicted object is which true one: the bipartite matching that DETR is trained with.

Carion et al. 2020 (ECCV, arXiv:2005.12872), section 3.1: the assignment of queries to true objects of least
total cost, with cost -p(c) + lambda_L1 |b - b'|_1 + lambda_GIoU (-GIoU). Boxes enter the L1 term as (centre
x, centre y, width, height) relative to the image. Conditional, Deformable and RT-DETR are trained with a focal
class cost instead of -p(c) (``class_cost="focal"``; Lin et al. 2017, alpha 0.25, gamma 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from foveate.detection.boxes import giou
from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ClassCost = Literal["probability", "focal"]
_ALPHA, _GAMMA, _TINY = 0.25, 2.0, 1e-8


@dataclass(frozen=True)
class CostWeights:
    """Weights of the three terms; the defaults are DETR's (1, 5, 2)."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    class_cost: ClassCost = "probability"


DETR = CostWeights()
"""The weights of Carion et al. 2020."""


@dataclass(frozen=True, eq=False)
class Matching:
    """``truth`` int64 (query,): the true object of each query, -1 for none. ``query`` int64 (object,): the
    query of each true object, -1 for none (more objects than queries). ``cost`` float64 (query, object).
    """

    truth: NDArray[np.int64]
    query: NDArray[np.int64]
    cost: NDArray[np.float64]

    @property
    def total(self) -> float:
        """Cost of the assignment."""
        matched = np.flatnonzero(self.truth >= 0)
        return float(self.cost[matched, self.truth[matched]].sum())


def match_objects(
    probabilities: ArrayLike,
    boxes: ArrayLike,
    true_classes: Sequence[int],
    true_boxes: ArrayLike,
    *,
    size: tuple[float, float],
    weights: CostWeights = DETR,
) -> Matching:
    """Match the queries of one image to its true objects (Hungarian algorithm, scipy).

    ``probabilities`` (query, class) without "no object"; ``boxes`` (query, 4) and ``true_boxes`` (object, 4)
    as (top, left, bottom, right) in pixels; ``size`` (height, width) of the image. An image without objects
    matches nothing. Raises UsageError for shapes that do not fit, unknown classes, and boxes that are NaN
    or inside out.
    """
    from scipy.optimize import linear_sum_assignment

    p = np.asarray(probabilities, np.float64)
    predicted = _boxes(boxes, "predicted")
    truth = _boxes(true_boxes, "true")
    classes = np.asarray(true_classes, np.int64).reshape(-1)
    _check(p, predicted, classes, truth, size)
    cost = _cost(p, predicted, classes, truth, size, weights)
    rows, columns = linear_sum_assignment(cost)
    of_query, of_truth = np.full(len(predicted), -1, np.int64), np.full(len(truth), -1, np.int64)
    of_query[rows], of_truth[columns] = columns, rows
    return Matching(of_query, of_truth, cost)


def _cost(
    p: NDArray[np.float64],
    predicted: NDArray[np.float64],
    classes: NDArray[np.int64],
    truth: NDArray[np.float64],
    size: tuple[float, float],
    weights: CostWeights,
) -> NDArray[np.float64]:
    """(query, object)."""
    label = _focal(p[:, classes]) if weights.class_cost == "focal" else -p[:, classes]
    relative = [_centred(boxes, size) for boxes in (predicted, truth)]
    l1 = np.abs(relative[0][:, None] - relative[1][None]).sum(-1)
    overlap = giou(torch.from_numpy(predicted)[:, None], torch.from_numpy(truth)[None]).numpy()
    return np.asarray(weights.label * label + weights.l1 * l1 - weights.giou * overlap)


def _focal(p: NDArray[np.float64]) -> NDArray[np.float64]:
    """Focal loss of saying the class minus that of not saying it, (query, object)."""
    yes = _ALPHA * (1 - p) ** _GAMMA * -np.log(p + _TINY)
    no = (1 - _ALPHA) * p**_GAMMA * -np.log(1 - p + _TINY)
    return np.asarray(yes - no)


def _centred(boxes: NDArray[np.float64], size: tuple[float, float]) -> NDArray[np.float64]:
    top, left, bottom, right = boxes.T
    height, width = size
    centred = (
        (left + right) / 2 / width,
        (top + bottom) / 2 / height,
        (right - left) / width,
        (bottom - top) / height,
    )
    return np.stack(centred, -1)


def _boxes(boxes: Any, whose: str) -> NDArray[np.float64]:
    array = np.asarray(boxes, np.float64).reshape(-1, 4) if np.size(boxes) == 0 else np.asarray(boxes, np.float64)
    if array.ndim != 2 or array.shape[1] != 4:
        raise UsageError(f"{whose} boxes: expected (object, 4), got {array.shape}")
    bad = np.flatnonzero(~np.isfinite(array).all(-1))
    if bad.size:
        raise UsageError(
            f"{whose} boxes: box {int(bad[0])} is not finite: {array[bad[0]].tolist()}",
            remedy="a model that puts out NaN boxes has broken weights or overflows in its dtype",
        )
    return array


def _check(
    p: NDArray[np.float64],
    predicted: NDArray[np.float64],
    classes: NDArray[np.int64],
    truth: NDArray[np.float64],
    size: tuple[float, float],
) -> None:
    if p.ndim != 2 or len(p) != len(predicted):
        raise UsageError(f"probabilities {p.shape} do not fit {len(predicted)} boxes: expected (query, class)")
    if not np.isfinite(p).all():
        raise UsageError("probabilities contain NaN or infinity")
    if len(classes) != len(truth):
        raise UsageError(f"{len(classes)} true classes but {len(truth)} true boxes")
    if classes.size and not (classes.min() >= 0 and classes.max() < p.shape[1]):
        raise UsageError(
            f"true classes reach from {classes.min()} to {classes.max()}, the model has {p.shape[1]}",
            remedy="give indices of the model's own classes",
        )
    inside_out = np.flatnonzero((truth[:, 2:] < truth[:, :2]).any(-1))
    if inside_out.size:
        raise UsageError(
            f"true box {int(inside_out[0])} is inside out: {truth[inside_out[0]].tolist()}",
            remedy="boxes are (top, left, bottom, right)",
        )
    if min(size) <= 0:
        raise UsageError(f"image size {size}: expected a positive (height, width)")
