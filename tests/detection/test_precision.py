"""Average precision against a slow count from COCO's definition, and what must hold whatever the answers are."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.detection.precision import ImageDetections, average_precision, mean_average_precision


def slow_precision(images: list[ImageDetections], name: int, threshold: float) -> float:
    """One class, answer by answer in plain Python: rank, match greedily within images, take the envelope."""
    answers = []
    for number, image in enumerate(images):
        for answer in range(len(image.scores)):
            if image.classes[answer] == name:
                answers.append((image.scores[answer], number, answer))
    answers.sort(key=lambda entry: -entry[0])
    objects = sum(int(label == name) for image in images for label in image.truth)
    taken, curve, hits = set(), [], 0
    for rank, (_, number, answer) in enumerate(answers, 1):
        best, where = threshold, None
        for thing, label in enumerate(images[number].truth):
            overlap = images[number].overlap[answer, thing]
            if label == name and (number, thing) not in taken and overlap >= best:
                best, where = overlap, thing
        if where is not None:
            taken.add((number, where))
            hits += 1
        curve.append((hits / objects, hits / rank))
    total = 0.0
    for step in range(101):
        reached = [precision for recall, precision in curve if recall >= step / 100 - 1e-12]
        total += max(reached, default=0.0)
    return total / 101


def random_images(rng: np.random.Generator, count: int = 12) -> list[ImageDetections]:
    made = []
    for _ in range(count):
        answers, objects = int(rng.integers(0, 9)), int(rng.integers(0, 5))
        truth = rng.integers(3, size=objects)
        overlap = rng.random((answers, objects)) ** 0.7
        made.append(ImageDetections(rng.random(answers), rng.integers(3, size=answers), truth, overlap))
    return made


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("threshold", [0.5, 0.75])
def test_precision_is_that_of_the_slow_count(seed: int, threshold: float) -> None:
    images = random_images(np.random.default_rng(seed))
    fast = average_precision(images, threshold=threshold)
    assert set(fast) == {int(label) for image in images for label in image.truth}
    for name, value in fast.items():
        assert value == pytest.approx(slow_precision(images, name, threshold), abs=1e-12)


def test_perfect_answers_score_one_and_wrong_boxes_zero() -> None:
    truth = np.array([0, 0, 1])
    right = ImageDetections(np.array([0.9, 0.8, 0.7]), truth, truth, np.eye(3))
    assert average_precision([right, right]) == {0: 1.0, 1: 1.0}
    wrong = ImageDetections(right.scores, truth, truth, np.eye(3) * 0.49)
    assert average_precision([wrong]) == {0: 0.0, 1: 0.0}


def test_a_second_answer_to_the_same_object_is_a_false_alarm() -> None:
    overlap = np.array([[0.9], [0.8]])
    double = ImageDetections(np.array([0.9, 0.8]), np.zeros(2, int), np.zeros(1, int), overlap)
    behind = ImageDetections(np.array([0.7]), np.zeros(1, int), np.zeros(1, int), np.array([[0.6]]))
    assert average_precision([double, behind])[0] == pytest.approx((51 * 1.0 + 50 * 2 / 3) / 101)


def test_the_order_of_images_does_not_matter() -> None:
    images = random_images(np.random.default_rng(3))
    assert average_precision(images) == pytest.approx(average_precision(images[::-1]))


def test_nothing_there_and_nothing_answered() -> None:
    empty = ImageDetections(np.empty(0), np.empty(0, int), np.empty(0, int), np.empty((0, 0)))
    assert average_precision([]) == {}
    assert average_precision([empty]) == {}
    assert np.isnan(mean_average_precision([empty]))
    silent = ImageDetections(np.empty(0), np.empty(0, int), np.array([2]), np.empty((0, 1)))
    assert average_precision([silent]) == {2: 0.0}


def test_a_box_that_is_not_a_number_finds_nothing() -> None:
    image = ImageDetections(np.array([0.9]), np.zeros(1, int), np.zeros(1, int), np.array([[np.nan]]))
    assert mean_average_precision([image]) == 0.0


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        ImageDetections(np.ones(2), np.ones(2, int), np.ones(3, int), np.ones((3, 2)))
