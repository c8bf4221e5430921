from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.detection.boxes import areas, giou, iou

CORNER = st.floats(-50, 50, allow_nan=False, width=32)
SIDE = st.floats(0.125, 40, allow_nan=False, width=32)
BOX = st.tuples(CORNER, CORNER, SIDE, SIDE).map(lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3]))


def slow(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float]:
    """IoU and GIoU of two boxes in plain arithmetic (Rezatofighi et al. 2019, Algorithm 1)."""
    height = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    width = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - height * width
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    overlap = height * width / union
    return overlap, overlap - (hull - union) / hull


@settings(max_examples=100, deadline=None)
@given(BOX, BOX)
def test_iou_and_giou_are_the_papers(a: tuple[float, ...], b: tuple[float, ...]) -> None:
    x, y = (torch.tensor(box, dtype=torch.float64) for box in (a, b))
    expected = slow(tuple(x.tolist()), tuple(y.tolist()))
    assert float(iou(x, y)) == pytest.approx(expected[0], abs=1e-12)
    assert float(giou(x, y)) == pytest.approx(expected[1], abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(BOX, BOX, st.floats(0.5, 20), CORNER)
def test_giou_is_symmetric_bounded_and_does_not_depend_on_scale_or_place(
    a: tuple[float, ...], b: tuple[float, ...], scale: float, shift: float
) -> None:
    x, y = (torch.tensor(box, dtype=torch.float64) for box in (a, b))
    value = giou(x, y)
    assert -1 < float(value) <= float(iou(x, y)) <= 1
    torch.testing.assert_close(value, giou(y, x), rtol=0, atol=1e-12)
    torch.testing.assert_close(value, giou(x * scale + shift, y * scale + shift), rtol=0, atol=1e-8)


def test_equal_boxes_have_one_and_broadcasting_pairs() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 3], [5, 5, 6, 9], [-3, -3, -1, -2]])
    table = giou(boxes[:, None], boxes[None])
    torch.testing.assert_close(table.diagonal(), torch.ones(3))
    torch.testing.assert_close(areas(boxes), torch.tensor([6.0, 4, 2]))
    for i in range(3):
        for j in range(3):
            torch.testing.assert_close(table[i, j], giou(boxes[i], boxes[j]))


def test_empty_boxes_are_zero_and_never_nan() -> None:
    point = torch.tensor([1.0, 1, 1, 1], requires_grad=True)
    assert float(iou(point, point).detach()) == float(giou(point, point).detach()) == 0.0
    giou(point, torch.tensor([0.0, 0, 4, 4])).backward()
    assert point.grad is not None
    assert bool(point.grad.isfinite().all())


def test_giou_pulls_boxes_together_where_iou_has_no_gradient() -> None:
    far = torch.tensor([0.0, 0, 1, 1], requires_grad=True)
    goal = torch.tensor([10.0, 10, 11, 11])
    giou(far, goal).backward()
    assert far.grad is not None
    assert float(far.grad[2]) > 0
    assert float(far.grad[3]) > 0
    far.grad = None
    iou(far, goal).backward()
    assert float(far.grad.abs().max()) == 0.0
