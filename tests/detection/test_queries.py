from __future__ import annotations

import numpy as np
import pytest

from foveate.detection.queries import Truth, query_table
from foveate.errors import UsageError
from foveate.interfaces import Prediction

SIZE = (50.0, 60.0)


def answers(rng: np.random.Generator, queries: int = 6) -> list[Prediction]:
    made = []
    for query in range(queries):
        top, left = rng.uniform(0, 30, 2)
        box = (top, left, top + rng.uniform(3, 15), left + rng.uniform(3, 15))
        label = int(rng.integers(0, 3))
        made.append(Prediction("abc"[label], float(rng.uniform()), label, query, box=box))
    return sorted(made, key=lambda p: -p.score)


def test_queries_come_back_in_their_own_order() -> None:
    rng = np.random.default_rng(0)
    given = [answers(rng), answers(rng)]
    table = query_table(given, ["x", "y"], threshold=0.6)
    assert table.sizes == {"sample": 2, "query": 6, "edge": 4}
    for sample, row in zip(("x", "y"), given, strict=True):
        for p in row:
            one = table.sel(sample=sample, query=p.object)
            assert (str(one.label.item()), int(one.class_index), float(one.score)) == (
                p.label,
                p.class_index,
                p.score,
            )
            assert tuple(one.box.values) == p.box
            assert bool(one.is_object) == (p.score > 0.6)
    assert (table.matched_gt == -2).all()


def test_true_objects_are_found_again_and_only_once() -> None:
    rng = np.random.default_rng(1)
    given = answers(rng)
    chosen = [p for p in given if p.object in (4, 1)]
    truth = Truth(SIZE, [p.class_index for p in chosen], np.array([p.box for p in chosen]) + 0.2)
    table = query_table([given, given, given], ["x", "none", "unknown"], truth={"x": truth, "none": Truth(SIZE)})
    matched = table.matched_gt.sel(sample="x").values
    for number, p in enumerate(chosen):
        assert matched[p.object] == number
    assert (matched >= 0).sum() == 2
    assert (table.matched_gt.sel(sample="none") == -1).all()
    assert (table.matched_gt.sel(sample="unknown") == -2).all()


def test_a_class_that_the_model_never_says_can_still_be_matched_by_place() -> None:
    given = answers(np.random.default_rng(2))
    truth = Truth(SIZE, [7], np.array([given[2].box]))
    matched = query_table([given], ["x"], truth={"x": truth}).matched_gt.values[0]
    assert (matched >= 0).sum() == 1


def test_predictions_without_queries_or_boxes_are_refused() -> None:
    given = answers(np.random.default_rng(3))
    with pytest.raises(UsageError, match="sample 'x'"):
        query_table([given[:-1]], ["x"])
    with pytest.raises(UsageError, match="one box for each object query"):
        query_table([[Prediction("cat", 0.9, 0)]], ["x"])
    with pytest.raises(UsageError, match="different numbers"):
        query_table([given, answers(np.random.default_rng(4), 4)], ["x", "y"])
