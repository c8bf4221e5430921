"""What each object query answered, beside the true object it matches, as one labelled table.

The coordinates that analyses of detectors group by: the query's class, score and box, whether it is an object at
all, and which true object it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foveate.detection.matching import DETR, CostWeights, match_objects
from foveate.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.interfaces import Prediction

EDGES = ("top", "left", "bottom", "right")


@dataclass(frozen=True, eq=False)
class Truth:
    """True objects of one image: ``classes`` int (object,), ``boxes`` (object, [top, left, bottom, right]) in
    original pixels, and the image's ``size`` (height, width). Empty where nothing is there.
    """

    size: tuple[float, float]
    classes: Sequence[int] = ()
    boxes: Sequence[Sequence[float]] | NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 4)))


def query_table(
    predictions: Sequence[Sequence[Prediction]],
    ids: Sequence[str],
    *,
    threshold: float = 0.5,
    truth: Mapping[str, Truth] | None = None,
    weights: CostWeights = DETR,
) -> xr.Dataset:
    """``predictions`` of a detector (one an object query, in any order) as a dataset over (sample, query).

    Variables: ``label`` (text), ``class_index`` (-1 without), ``score``, ``box`` (sample, query, edge) in original
    pixels, ``is_object`` (score above ``threshold``) and, for samples that ``truth`` knows by id, ``matched_gt``:
    the index of the true object that the set cost assigns to the query, -1 for none, -2 where no truth is known.
    Matching uses each query's own class score; a query's score for other classes is not in its prediction
    and counts as 0. Raises UsageError where queries are missing or have no box.
    """
    import xarray as xr

    rows = [_by_query(answers, sample) for answers, sample in zip(predictions, ids, strict=True)]
    if len({len(row) for row in rows}) > 1:
        raise UsageError(f"samples have different numbers of queries: {sorted({len(row) for row in rows})}")
    known = truth or {}
    matched = [_matched(row, known.get(sample), weights) for row, sample in zip(rows, ids, strict=True)]
    score = np.array([[p.score for p in row] for row in rows])
    dims = ("sample", "query")
    return xr.Dataset(
        {
            "label": (dims, np.array([[p.label for p in row] for row in rows], dtype=object)),
            "class_index": (dims, np.array([[_class(p) for p in row] for row in rows], np.int64)),
            "score": (dims, score),
            "box": ((*dims, "edge"), np.array([[p.box for p in row] for row in rows], np.float64)),
            "is_object": (dims, score > threshold),
            "matched_gt": (dims, np.array(matched, np.int64)),
        },
        coords={"sample": list(ids), "query": np.arange(score.shape[1]), "edge": list(EDGES)},
        attrs={"threshold": threshold, "cost": f"{weights}"},
    )


def _by_query(answers: Sequence[Prediction], sample: str) -> list[Prediction]:
    found = {int(p.object): p for p in answers if p.object is not None and p.box is not None}
    if len(found) != len(answers) or sorted(found) != list(range(len(found))):
        raise UsageError(
            f"sample {sample!r}: predictions do not give one box for each object query",
            remedy="take AttentionSource.predictions of a detector with boxes, all of them",
        )
    return [found[query] for query in range(len(found))]


def _class(prediction: Prediction) -> int:
    return -1 if prediction.class_index is None else int(prediction.class_index)


def _matched(row: Sequence[Prediction], truth: Truth | None, weights: CostWeights) -> NDArray[np.int64]:
    if truth is None:
        return np.full(len(row), -2, np.int64)
    classes = [max(_class(p), 0) for p in row]
    probabilities = np.zeros((len(row), max([*classes, *truth.classes, 0]) + 1))
    probabilities[np.arange(len(row)), classes] = [p.score for p in row]
    boxes = np.array([p.box for p in row], np.float64)
    return match_objects(
        probabilities, boxes, list(truth.classes), truth.boxes, size=truth.size, weights=weights
    ).truth
