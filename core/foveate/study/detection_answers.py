"""Analyses of what the queries answer: specialisation, duplicates, and what is lost when queries are dropped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from foveate.detection.redundancy import OVERLAP, drop_curve, duplicates, found_by
from foveate.detection.specialisation import centre_dispersion, query_information
from foveate.errors import UsageError
from foveate.study.detection import Finding
from foveate.study.detection_subject import Subject

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveate.interfaces import Prediction
    from foveate.render.detection import DetectedObject

KEPT = (0.25, 0.5, 0.75)
"""Shares of the queries that are kept."""


def queries(subject: Subject) -> Iterator[Finding]:
    """Mutual information of query and class over all objects found, and dispersion of each query's box centres.

    Null: classes (or boxes) permuted over all objects. Objects of one image are treated as independent.
    """
    found = [(place, one) for place, objects in enumerate(subject.objects) for one in objects]
    images = len({place for place, _ in found})
    query = [one.query for _, one in found]
    about = query_information(query, [one.label for _, one in found], seed=subject.seed)
    yield Finding(
        f"mutual information of query and class ({about.n} objects, at most {about.largest:.2f})",
        "nat",
        np.array([about.value]),
        about.null,
        "classes permuted",
        whole=True,
        p=about.p,
        n=images,
    )
    spread = centre_dispersion(query, [_centre(subject, *pair) for pair in found], seed=subject.seed)
    yield Finding(
        f"dispersion of a query's box centres ({len(spread.by_query)} queries)",
        "share of the side",
        np.array([spread.within]),
        spread.null,
        "boxes permuted",
        whole=True,
        p=spread.p,
        n=images,
    )


def _centre(subject: Subject, place: int, one: DetectedObject) -> tuple[float, float]:
    """(y, x) of a box's centre as shares of the image's sides; NaN without a box."""
    height, width = subject.size(place)
    top, left, bottom, right = one.box or (np.nan,) * 4
    return (top + bottom) / 2 / height, (left + right) / 2 / width


def redundancy(subject: Subject) -> Iterator[Finding]:
    """Share of duplicates among answers at falling thresholds, and objects found by a part of the queries.

    Runs the model, since all its answers are needed; queries are dropped from the answers, after the decoder ran.
    Without redundancy (each object found by one query only) k of n queries find k / n of what all find. To be
    found are true objects where they are known, else the answers above the threshold that repeat no other.
    """
    every = _all_answers(subject)
    threshold = float(getattr(subject.source, "threshold", 0.5))
    for cut in (threshold, threshold / 2, threshold / 4):
        values = [_duplicate_share([one for one in answers if one.score > cut]) for answers in every]
        yield Finding(f"share of duplicates among answers above {cut:.3g}", "share", np.array(values))
    finds = [_finds(subject, place, answers, threshold) for place, answers in enumerate(every)]
    count = max(len(answers) for answers in every)
    keep = sorted({max(1, round(share * count)) for share in KEPT})
    full = np.array([drop_curve(table, [len(table)])[0] for table in finds])
    for number in keep:
        values = [drop_curve(table, [min(number, len(table))])[0] for table in finds]
        yield Finding(
            f"objects found by {number} of {count} queries",
            "share",
            np.array(values),
            full * number / count,
            "no redundancy",
        )


def _all_answers(subject: Subject) -> list[list[Prediction]]:
    answers: list[list[Prediction]] = []
    for _, batch in subject.batches():
        answers += subject.source.predictions(subject.source.forward(batch), batch)
    if any(one.box is None for listed in answers for one in listed):
        raise UsageError(f"{subject.run.model_id}: its answers have no boxes to compare")
    return answers


def _duplicate_share(answers: Sequence[Prediction]) -> float:
    if not answers:
        return float("nan")
    return float(duplicates(*_columns(answers)).mean())


def _columns(answers: Sequence[Prediction]) -> tuple[list[float], list[str], np.ndarray]:
    boxes = np.array([one.box for one in answers], np.float64).reshape(-1, 4)
    return [one.score for one in answers], [one.label for one in answers], boxes


def _finds(subject: Subject, place: int, answers: Sequence[Prediction], threshold: float) -> np.ndarray:
    """Which query's answer above the threshold finds which object, ``(query, object)``."""
    scores, labels, boxes = _columns(answers)
    sure = np.array(scores) > threshold
    truth = subject.true_objects(place)
    if truth is None:
        alone = sure & ~duplicates(scores, labels, boxes, overlap=OVERLAP)
        wanted = [label for label, one in zip(labels, alone, strict=True) if one], boxes[alone]
    else:
        wanted = list(truth.labels), truth.boxes
    return found_by(labels, boxes, *wanted) & sure[:, None]
