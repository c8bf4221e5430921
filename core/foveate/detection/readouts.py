"""When does a decoder decide: the answers of each of its layers, held against those of its last one.

Detectors of the DETR family are trained with the same heads after every decoder layer (auxiliary losses;
Carion et al. 2020, ECCV, arXiv:2005.12872), so each layer can be read as an answer. Matching every layer to the
same objects shows which queries change their object on the way; Li et al. 2022 (DN-DETR, CVPR)
count such changes between epochs as instability, here they are counted between layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from foveate.detection.boxes import iou
from foveate.detection.matching import CostWeights, match_objects
from foveate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from foveate.interfaces import Batch


class LayerAnswers(NamedTuple):
    """One layer's answers on a batch: ``probabilities (sample, query, class)`` and ``boxes (sample, query, 4)``.

    Boxes are (top, left, bottom, right) in original pixels; "no object" is none of the classes.
    """

    layer: int
    probabilities: NDArray[np.float64]
    boxes: NDArray[np.float64]


@runtime_checkable
class LayeredDetector(Protocol):
    """A source whose decoder layers can each be read by the model's own heads. Optional for detectors."""

    def layer_answers(self, batch: Batch) -> list[LayerAnswers]:
        """Answers of every decoder layer, first to last. Raises UsageError for models without heads for each."""


class Stability(NamedTuple):
    """Means over the objects of one image, each ``(layer,)``; NaN without objects.

    ``same_query``: share of objects matched to the query that the last layer matches them to. ``overlap`` (IoU)
    and ``same_class``: what that last query said at this layer, against what it says at the last. ``score``: its
    probability of the object's class.
    """

    same_query: NDArray[np.float64]
    overlap: NDArray[np.float64]
    same_class: NDArray[np.float64]
    score: NDArray[np.float64]


def layer_stability(
    probabilities: ArrayLike,
    boxes: ArrayLike,
    classes: Sequence[int],
    objects: ArrayLike,
    *,
    size: tuple[float, float],
    weights: CostWeights | None = None,
) -> Stability:
    """How near each layer of one image is to the last.

    ``probabilities (layer, query, class)``, ``boxes (layer, query, 4)``; ``classes (object,)`` and ``objects
    (object, 4)`` are what all layers are matched to (true objects, or those of the last layer). A matching drawn
    at random keeps a query with probability 1 / queries. Raises UsageError where shapes do not fit.
    """
    p, b = np.asarray(probabilities, np.float64), np.asarray(boxes, np.float64)
    if p.ndim != 3 or b.shape != (*p.shape[:2], 4):
        raise UsageError(f"layer_stability: probabilities {p.shape} do not fit boxes {b.shape}")
    matches = [
        match_objects(p[layer], b[layer], classes, objects, size=size, weights=weights or CostWeights()).query
        for layer in range(len(p))
    ]
    last = matches[-1]
    kept = last >= 0  # more objects than queries: some have none
    query, label = last[kept], np.asarray(classes, np.int64).reshape(-1)[kept]
    return Stability(
        _means([match[kept] == query for match in matches]),
        _means([_iou(b[layer][query], b[-1][query]) for layer in range(len(p))]),
        _means([p[layer][query].argmax(-1) == p[-1][query].argmax(-1) for layer in range(len(p))]),
        _means([p[layer][query, label] for layer in range(len(p))]),
    )


def _iou(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(iou(torch.from_numpy(a), torch.from_numpy(b)))


def _means(by_layer: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    return np.array([np.mean(values, dtype=np.float64) if values.size else np.nan for values in by_layer])
