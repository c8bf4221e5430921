"""Targets of objects, against plain arithmetic on made-up detections."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from foveate.errors import CaptureError, UsageError
from foveate.geometry import Geometry
from foveate.interfaces import BoundTarget, Target
from foveate_detr.detections import Detections, boxes_to_original
from foveate_detr.targets import bind, kinds_of, score

LABELS = ["red", "green", "blue"]


def made(seed: int = 0, *, activation: str = "sigmoid", queries: int = 6, masks: bool = True) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    classes = 3 if activation == "sigmoid" else 4
    start = torch.rand(2, queries, 2, generator=generator) * 30
    boxes = torch.cat([start, start + 4 + torch.rand(2, queries, 2, generator=generator) * 20], -1)
    logits = torch.randn(2, queries, classes, generator=generator) * 2
    planes = torch.randn(2, queries, 5, 7, generator=generator) if masks else None
    return Detections(logits.requires_grad_(), activation, boxes.requires_grad_(), planes)  # type: ignore[arg-type]


def bound(found: Detections, kind: str = "class", **target: object) -> BoundTarget:
    return bind(found, LABELS, Target(kind, **target), kind, threshold=0.5, at_most=20)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_without_an_object_every_object_above_the_threshold_has_a_row(activation: str) -> None:
    found = made(1, activation=activation)
    expected = []
    for sample in range(2):
        best = []
        for query, logits in enumerate(found.logits[sample].tolist()):
            if activation == "sigmoid":
                p = [1 / (1 + math.exp(-v)) for v in logits]
            else:
                p = [math.exp(v) / sum(map(math.exp, logits)) for v in logits][:-1]
            if max(p) > 0.5:
                best.append((-max(p), query, p.index(max(p))))
        expected += [(sample, query, label) for _, query, label in sorted(best)]
    rows = bound(found).rows
    assert [(row.sample, row.object, row.class_index) for row in rows] == expected
    assert [row.label for row in rows] == [LABELS[label] for *_, label in expected]


def test_a_class_is_probability_or_logit_of_its_query() -> None:
    found = made(2)
    target = bound(found, object=4, label="blue")
    assert [(row.sample, row.object, row.class_index) for row in target.rows] == [(0, 4, 2), (1, 4, 2)]
    torch.testing.assert_close(score(found, target), found.logits[:, 4, 2].sigmoid())
    torch.testing.assert_close(score(found, target.at("logit")), found.logits[:, 4, 2])


def test_the_cap_keeps_the_surest_and_no_object_gives_no_row() -> None:
    found = made(3)
    all_rows = bind(found, LABELS, Target(), "class", threshold=0.0, at_most=20).rows
    capped = bind(found, LABELS, Target(), "class", threshold=0.0, at_most=2).rows
    assert capped == tuple(row for s in (0, 1) for row in [r for r in all_rows if r.sample == s][:2])
    none = bind(found, LABELS, Target(), "class", threshold=0.999999, at_most=20)
    assert len(none) == 0
    assert score(found, none).shape == (0,)


@pytest.mark.parametrize("edge", range(4))
def test_box_edges_are_pixels_of_the_original(edge: int) -> None:
    found = made(4)
    target = bound(found, ("box_top", "box_left", "box_bottom", "box_right")[edge], object=1)
    assert target.scale == "value"
    assert found.boxes is not None
    torch.testing.assert_close(score(found, target), found.boxes[:, 1, edge])


def slow_iou(a: list[float], b: list[float]) -> float:
    shared = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def test_iou_score_falls_as_the_box_moves_away() -> None:
    found = made(5)
    target = bound(found, "iou_score", object=2)
    probability = found.logits.sigmoid()[:, 2].amax(-1)
    torch.testing.assert_close(score(found, target), probability)
    moved = Detections(found.logits, "sigmoid", found.boxes + 3.0)
    for row, value in zip(target.rows, score(moved, target).tolist(), strict=True):
        before, after = found.boxes[row.sample, 2].tolist(), moved.boxes[row.sample, 2].tolist()
        assert value == pytest.approx(slow_iou(before, after) * float(probability[row.sample]), rel=1e-5)


def test_mask_is_the_mean_logit_over_the_frozen_mask() -> None:
    found = made(6)
    target = bound(found, "mask", object=3)
    other = Detections(found.logits, "sigmoid", found.boxes, found.masks * -2 + 1)
    for row, value in zip(target.rows, score(other, target).tolist(), strict=True):
        frozen = found.masks[row.sample, 3].numpy() > 0
        assert value == pytest.approx(float(np.mean(other.masks[row.sample, 3].numpy()[frozen])), rel=1e-5)


def test_an_object_without_a_mask_has_no_mask_row() -> None:
    found = made(7)
    masks = found.masks.clone()
    masks[0, 2] = -1.0
    empty = Detections(found.logits, "sigmoid", found.boxes, masks)
    assert [row.sample for row in bound(empty, "mask", object=2).rows] == [1]


# ------------------------------------------------------------------------------- following by best match


@pytest.mark.parametrize("kind", ["class@match", "iou_score@match", "box_left@match", "mask@match"])
def test_a_match_follows_the_object_to_another_query(kind: str) -> None:
    found = made(8)
    target = bound(found, kind, object=2)
    order = torch.tensor([3, 5, 0, 2, 1, 4])  # query 2 is found at place 3
    shuffled = Detections(found.logits[:, order], "sigmoid", found.boxes[:, order], found.masks[:, order])
    torch.testing.assert_close(score(shuffled, target), score(found, target))
    by_query = bound(found, kind.removesuffix("@match"), object=2)
    assert not torch.allclose(score(shuffled, by_query), score(found, by_query))


def test_a_match_is_the_best_of_overlap_times_probability() -> None:
    found, later = made(9), made(10)
    target = bound(found, "class@match", object=0)
    near = Detections(later.logits, "sigmoid", found.boxes[:, :1] + torch.randn(2, 6, 4).mul(0.5))
    for row, value in zip(target.rows, score(near, target).tolist(), strict=True):
        frozen = found.boxes[row.sample, 0].tolist()
        p = near.logits.sigmoid()[row.sample, :, row.class_index].tolist()
        overlaps = [slow_iou(box, frozen) for box in near.boxes[row.sample].tolist()]
        best = max((o * q, q) for o, q in zip(overlaps, p, strict=True) if o >= 0.5)
        assert value == pytest.approx(best[1], rel=1e-5)


def test_a_vanished_object_is_zero_the_smallest_logit_or_nan() -> None:
    found = made(11)
    far = Detections(found.logits, "sigmoid", found.boxes + 500, found.masks)
    assert score(far, bound(found, "class@match", object=1)).tolist() == [0.0, 0.0]
    assert score(far, bound(found, "iou_score@match", object=1)).tolist() == [0.0, 0.0]
    assert score(far, bound(found, "box_top@match", object=1)).isnan().all()
    assert score(far, bound(found, "mask@match", object=1)).isnan().all()
    target = bound(found, "class@match", object=1).at("logit")
    expected = [float(found.logits[row.sample, :, row.class_index].min()) for row in target.rows]
    assert score(far, target).tolist() == pytest.approx(expected)


def test_models_without_boxes_match_by_mask() -> None:
    found = made(12)
    plain = Detections(found.logits, "sigmoid", None, found.masks)
    target = bound(plain, "class@match", object=2)
    order = torch.tensor([3, 5, 0, 2, 1, 4])
    moved = Detections(found.logits[:, order], "sigmoid", None, found.masks[:, order])
    torch.testing.assert_close(score(moved, target), score(plain, target))


# ------------------------------------------------------------------------------- rows, gradients, errors


def test_taking_rows_takes_their_frozen_boxes() -> None:
    found = made(13)
    target = bind(found, LABELS, Target(), "iou_score", threshold=0.0, at_most=20)
    index = [7, 2, 2]
    chosen = target.take(index)
    rows = [target.rows[i] for i in index]
    expanded = Detections(
        found.logits[[r.sample for r in rows]], "sigmoid", found.boxes[[r.sample for r in rows]] + 1.5
    )
    moved = Detections(found.logits, "sigmoid", found.boxes + 1.5)
    torch.testing.assert_close(score(expanded, chosen), score(moved, target)[index])


@pytest.mark.parametrize("kind", list(kinds_of(boxes=True, masks=False)))
def test_every_kind_has_a_finite_gradient(kind: str) -> None:
    found = made(14, masks=False)
    score(found, bound(found, kind, object=0)).sum().backward()
    grads = [t.grad for t in (found.logits, found.boxes) if t.grad is not None]
    assert grads
    assert all(bool(g.isfinite().all()) for g in grads)
    assert any(float(g.abs().sum()) > 0 for g in grads)


def test_wrong_targets_are_named() -> None:
    found = made(15)
    with pytest.raises(UsageError, match="no object query 6"):
        bound(found, object=6)
    with pytest.raises(UsageError, match="'gren' is not one of"):
        bound(found, label="gren")
    with pytest.raises(UsageError, match="no class 3"):
        bound(found, label=3)
    with pytest.raises(UsageError, match="has no 'value'"):
        score(found, bound(found, object=0).at("value"))


def test_nan_boxes_and_logits_are_named() -> None:
    for what in ("logits", "boxes"):
        parts = {"logits": made(16).logits.detach().clone(), "boxes": made(16).boxes.detach().clone()}
        parts[what][1, 3, 0] = math.nan
        with pytest.raises(CaptureError, match="sample 'b', object query 3"):
            Detections(parts["logits"], "sigmoid", parts["boxes"]).check(["a", "b"])


# ------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("frame", ["image", "input"])
def test_boxes_come_back_to_the_original(frame: str) -> None:
    geometry = [Geometry(60, 90, 128, 160, 1.5, 1.5), Geometry(100, 50, 128, 160, 1.2, 2.0)]
    boxes = torch.tensor([[[0.5, 0.25, 0.2, 0.1]], [[0.9, 0.5, 0.4, 1.0]]])
    found = boxes_to_original(boxes, geometry, frame)  # type: ignore[arg-type]
    for i, g in enumerate(geometry):
        x, y, w, h = boxes[i, 0].tolist()
        height, width = (60, 90) if i == 0 else (100, 50)
        if frame == "input":
            height, width = 128 / g.scale_y, 160 / g.scale_x
        expected = [(y - h / 2) * height, (x - w / 2) * width, (y + h / 2) * height, (x + w / 2) * width]
        assert found[i, 0].tolist() == pytest.approx(expected, rel=1e-5)
