"""Average precision of a detector's boxes or masks: how well ranked answers find the true objects.

The rules are those of COCO (Lin et al., ECCV 2014; evaluation of the COCO detection task): within a class,
answers of all images are ranked by score; in each image the best answer first takes the free true object
with the largest overlap, if that reaches the threshold; average precision is the mean, at recalls 0, 0.01,
..., 1, of the largest precision reached at that recall or beyond.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

RECALLS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class ImageDetections:
    """What a detector answered on one image, and what is there.

    ``scores`` float ``(answer,)`` and ``classes`` int ``(answer,)``; ``truth`` int ``(object,)``: true
    classes; ``overlap`` float ``(answer, object)``: intersection over union in [0, 1].
    """

    scores: NDArray[np.float64]
    classes: NDArray[np.int64]
    truth: NDArray[np.int64]
    overlap: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.overlap.shape != (self.scores.size, self.truth.size) or self.classes.shape != self.scores.shape:
            raise ValueError(
                f"ImageDetections: overlap {self.overlap.shape} and classes {self.classes.shape} do not fit "
                f"{self.scores.size} answers and {self.truth.size} objects"
            )


def average_precision(images: Sequence[ImageDetections], *, threshold: float = 0.5) -> dict[int, float]:
    """Average precision of every class that occurs in the truth, class index -> value in [0, 1].

    Empty where no image has an object. Equal scores keep the order in which they are given.
    """
    present = np.unique(np.concatenate([image.truth for image in images])) if images else np.empty(0, np.int64)
    return {int(name): _of_class(images, int(name), threshold) for name in present}


def mean_average_precision(images: Sequence[ImageDetections], *, threshold: float = 0.5) -> float:
    """Mean of :func:`average_precision` over the classes that occur; NaN where none does."""
    values = average_precision(images, threshold=threshold)
    return float(np.mean(list(values.values()))) if values else float("nan")


def _of_class(images: Sequence[ImageDetections], name: int, threshold: float) -> float:
    scores, hits = [], []
    for image in images:
        answers = np.flatnonzero(image.classes == name)
        answers = answers[np.argsort(-image.scores[answers], kind="stable")]
        overlap = image.overlap[np.ix_(answers, np.flatnonzero(image.truth == name))]
        scores.append(image.scores[answers])
        hits.append(_hits(overlap, threshold))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    found = np.cumsum(np.concatenate(hits)[order])
    objects = sum(int((image.truth == name).sum()) for image in images)
    return _area(found / objects, found / np.arange(1, found.size + 1))


def _hits(overlap: NDArray[np.float64], threshold: float) -> NDArray[np.bool_]:
    """Which answers ``(answer, object)``, best first, take a true object that none before them took."""
    free = np.ones(overlap.shape[1], np.bool_)
    hits = np.zeros(overlap.shape[0], np.bool_)
    for answer, row in enumerate(np.where(np.isfinite(overlap), overlap, 0.0)):
        reach = np.where(free, row, -1.0)
        best = int(reach.argmax()) if reach.size else -1
        if best >= 0 and reach[best] >= threshold:
            hits[answer], free[best] = True, False
    return hits


def _area(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Mean over :data:`RECALLS` of the largest precision at that recall or beyond, 0 where it is never reached."""
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return float(envelope[np.searchsorted(recall, RECALLS - 1e-12)].mean())
