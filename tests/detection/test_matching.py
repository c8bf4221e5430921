from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from foveate.detection.matching import CostWeights, match_objects
from foveate.errors import UsageError

SIZE = (60.0, 80.0)


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    start = rng.uniform(0, 40, (count, 2))
    return np.concatenate([start, start + rng.uniform(2, 20, (count, 2))], -1)


def slow_cost(p: float, a: np.ndarray, b: np.ndarray, focal: bool) -> float:
    """Cost of one pair from the papers, box by box."""

    def centred(box: np.ndarray) -> np.ndarray:
        y0, x0, y1, x1 = box
        return np.array(
            [(x0 + x1) / 2 / SIZE[1], (y0 + y1) / 2 / SIZE[0], (x1 - x0) / SIZE[1], (y1 - y0) / SIZE[0]]
        )

    h, w = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(h, 0) * max(w, 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    generalised = shared / union - (hull - union) / hull
    label = -p
    if focal:
        label = 0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8)
    return float(label + 5 * np.abs(centred(a) - centred(b)).sum() - 2 * generalised)


@pytest.mark.parametrize("class_cost", ["probability", "focal"])
@pytest.mark.parametrize("seed", range(4))
def test_the_assignment_is_the_best_of_all(seed: int, class_cost: str) -> None:
    rng = np.random.default_rng(seed)
    queries, objects = 6, 3
    p = rng.dirichlet(np.ones(5), queries)[:, :4]
    boxes, truth = random_boxes(rng, queries), random_boxes(rng, objects)
    classes = rng.integers(0, 4, objects)
    found = match_objects(p, boxes, classes, truth, size=SIZE, weights=CostWeights(class_cost=class_cost))
    for q in range(queries):
        for o in range(objects):
            expected = slow_cost(p[q, classes[o]], boxes[q], truth[o], class_cost == "focal")
            assert found.cost[q, o] == pytest.approx(expected, abs=1e-12)
    best = min(sum(found.cost[q, o] for o, q in enumerate(qs)) for qs in permutations(range(queries), objects))
    assert found.total == pytest.approx(best, abs=1e-12)
    for o, q in enumerate(found.query):
        assert found.truth[q] == o
    assert (found.truth >= 0).sum() == objects


def test_permuting_queries_permutes_the_matching() -> None:
    rng = np.random.default_rng(5)
    p, boxes, truth = rng.uniform(size=(8, 3)), random_boxes(rng, 8), random_boxes(rng, 4)
    order = rng.permutation(8)
    one = match_objects(p, boxes, [0, 1, 2, 0], truth, size=SIZE)
    other = match_objects(p[order], boxes[order], [0, 1, 2, 0], truth, size=SIZE)
    np.testing.assert_array_equal(other.truth, one.truth[order])


def test_no_object_and_more_objects_than_queries() -> None:
    rng = np.random.default_rng(6)
    none = match_objects(rng.uniform(size=(5, 2)), random_boxes(rng, 5), [], [], size=SIZE)
    assert none.truth.tolist() == [-1] * 5
    assert none.query.size == 0
    assert none.total == 0.0
    many = match_objects(rng.uniform(size=(2, 2)), random_boxes(rng, 2), [0] * 4, random_boxes(rng, 4), size=SIZE)
    assert (many.query >= 0).sum() == 2
    assert (many.truth >= 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": [[0, 0, np.nan, 2]] * 3}, "predicted boxes: box 0 is not finite"),
        ({"true_boxes": [[4, 4, 1, 9]]}, "inside out"),
        ({"true_classes": [7]}, "the model has 2"),
        ({"true_classes": [0, 1]}, "2 true classes but 1 true boxes"),
        ({"probabilities": np.full((3, 2), np.nan)}, "NaN"),
        ({"probabilities": np.ones((4, 2))}, "do not fit 3 boxes"),
        ({"size": (0.0, 4.0)}, "positive"),
        ({"boxes": np.ones((3, 5))}, "expected"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    rng = np.random.default_rng(7)
    given = {
        "probabilities": rng.uniform(size=(3, 2)),
        "boxes": random_boxes(rng, 3),
        "true_classes": [0],
        "true_boxes": random_boxes(rng, 1),
        "size": SIZE,
    }
    with pytest.raises(UsageError, match=message):
        match_objects(**{**given, **change})
