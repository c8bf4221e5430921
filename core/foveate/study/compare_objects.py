"""Which object of one detector's run is which of another's, so that the two explanations are of the same thing.

Two detectors have queries of their own, so objects correspond by what was said of them: the same label, boxes that
overlap by half or more. Of an image's pairs the one that both are surest of is compared; an image where the two
found no object in common has no score.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.detection.boxes import iou

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

SAME_OBJECT = 0.5
"""Smallest IoU of the boxes of one object (COCO's loosest threshold)."""
SIDES = ("top", "left", "bottom", "right")


def of_objects(dataset: xr.Dataset) -> bool:
    """Whether a stored attribution explains objects of a detector."""
    return "target_object" in dataset


def common_objects(a: xr.Dataset, b: xr.Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The target of each image to compare, in ``a`` and in ``b``, ``(sample,)``; -1 where none is in both.

    ``a`` and ``b`` are stored attributions on the same images in the same order.
    """
    pairs = [_pair(a.isel(sample=i), b.isel(sample=i)) for i in range(a.sizes["sample"])]
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def of_queries(predictions: xr.Dataset) -> bool:
    """Whether the stored answers of a run are objects of a detector."""
    return "object" in predictions and bool((np.asarray(predictions["object"].values) >= 0).any())


def surest_objects(a: xr.Dataset, b: xr.Dataset) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of each image the surest answer of ``a`` and of ``b`` (stored answers, rank 0), as words.

    The words of an image are equal where the two are one object: the same label and, where both have boxes, boxes
    that overlap by half or more. Readout rows of other images are rows of different objects.
    """
    labels = [np.asarray(one["label"].values, str)[:, 0] for one in (a, b)]
    boxes = [_boxes(one.isel(rank=0)) for one in (a, b)]
    overlap = iou(*(torch.as_tensor(one) for one in boxes)).numpy()
    known = np.isfinite(boxes[0] + boxes[1]).all(axis=-1)
    apart = (labels[0] == labels[1]) & known & (overlap < SAME_OBJECT)
    second = [
        f"{label}, elsewhere" if other else str(label) for label, other in zip(labels[1], apart, strict=True)
    ]
    return tuple(str(label) for label in labels[0]), tuple(second)


def _boxes(answers: xr.Dataset) -> NDArray[np.float64]:
    """``(sample, 4)``; NaN where an answer has no box."""
    sides = [np.asarray(answers[f"box_{side}"].values, np.float64) for side in SIDES]
    return np.stack(sides, axis=-1)


def _pair(a: xr.Dataset, b: xr.Dataset) -> tuple[int, int]:
    boxes = [torch.as_tensor(np.asarray(one["target_box"].values, np.float64)) for one in (a, b)]
    overlap = iou(boxes[0][:, None], boxes[1][None]).numpy()
    known = [np.asarray(one["target_object"].values) >= 0 for one in (a, b)]
    labels = [np.asarray(one["target_label"].values, str) for one in (a, b)]
    same = (labels[0][:, None] == labels[1][None]) & np.outer(*known) & (overlap >= SAME_OBJECT)
    if not same.any():
        return -1, -1
    ranks = [np.argsort(np.argsort(-np.nan_to_num(one["score"].values, nan=-np.inf))) for one in (a, b)]
    worth = np.where(same, -(ranks[0][:, None] + ranks[1][None]) + overlap / 2, -np.inf)
    i, j = np.unravel_index(int(worth.argmax()), worth.shape)
    return int(i), int(j)
