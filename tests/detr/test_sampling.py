"""Sampling points are where the module read: splatted one by one they make the captured row."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.sampling import reference_point, sampling_points
from foveate.capture.trace import Trace, trace
from foveate.errors import UsageError
from foveate.interfaces import AttentionSource, Batch, CallKey

CASES = {
    "Deformable DETR": {},
    "RT-DETR": {},
    "RT-DETRv2": {},
    "D-FINE": {},
}


def traced(name: str) -> tuple[AttentionSource, Batch, Trace]:
    source = tiny(name)
    batch = source.encode(photos((64, 96), (80, 70)))
    with torch.no_grad():
        return source, batch, trace(source, batch)


def deformable_calls(found: Trace) -> list[CallKey]:
    return [call for call, record in found.records.items() if record.form == "deformable"]


def slow_row(points: object, tokens: object) -> np.ndarray:
    """Each point's weight on the four cells around it, in plain Python; what falls outside is lost."""
    row = np.zeros(len(tokens))
    place = defaultdict(dict)
    for number in range(len(tokens)):
        size = tokens.height[number], tokens.width[number]
        cell = round(float(tokens.y[number] / size[0] - 0.5)), round(float(tokens.x[number] / size[1] - 0.5))
        place[int(tokens.level[number])][cell] = (number, size)
    for y, x, weight, level in zip(points.y, points.x, points.weight, points.level, strict=True):
        cells = place[int(level)]
        height, width = next(iter(cells.values()))[1]
        down, across = y / height - 0.5, x / width - 0.5
        for i in (math.floor(down), math.floor(down) + 1):
            for j in (math.floor(across), math.floor(across) + 1):
                if (i, j) in cells:
                    row[cells[i, j][0]] += weight * (1 - abs(down - i)) * (1 - abs(across - j))
    return row


@pytest.mark.parametrize("name", list(CASES))
def test_points_splatted_one_by_one_make_the_row(name: str) -> None:
    _, _, found = traced(name)
    calls = deformable_calls(found)
    assert calls
    for call in (calls[0], calls[-1]):
        tokens = found.labels(call).key
        for sample, query in ((0, 0), (1, 5)):
            rows = found.record(call).rows([query])[sample, :, 0].double().numpy()
            for head in ("mean", 2):
                points = sampling_points(found, call, query, sample=sample, head=head)  # type: ignore[arg-type]
                assert points.weight.sum() == pytest.approx(1.0, abs=1e-5)
                expected = rows.mean(0) if head == "mean" else rows[head]
                np.testing.assert_allclose(slow_row(points, tokens), expected, atol=2e-5)


def test_whole_cells_are_at_their_centres() -> None:
    source = tiny("RT-DETRv2")
    for module in source.module.modules():
        if hasattr(module, "method"):
            module.method = "discrete"
    batch = source.encode(photos((64, 96)))
    with torch.no_grad():
        found = trace(source, batch)
    call = deformable_calls(found)[-1]
    points = sampling_points(found, call, 3)
    tokens = found.labels(call).key
    centres = {
        (float(y), float(x), int(level)) for y, x, level in zip(tokens.y, tokens.x, tokens.level, strict=True)
    }
    assert set(zip(points.y.tolist(), points.x.tolist(), points.level.tolist(), strict=True)) <= centres
    rows = found.record(call).rows([3])[0, :, 0].double().numpy().mean(0)
    np.testing.assert_allclose(slow_row(points, tokens), rows, atol=2e-5)


def test_the_reference_of_an_encoder_cell_is_its_own_centre() -> None:
    source = tiny("Deformable DETR", canvas="batch")
    batch = source.encode(photos((64, 96)))  # one image without padding
    with torch.no_grad():
        found = trace(source, batch)
    call = next(call for call in deformable_calls(found) if call.site.startswith("encoder"))
    tokens = found.labels(call).query
    for query in (0, 7, len(tokens) - 1):
        y, x = reference_point(source, batch, call, query)
        assert y == pytest.approx(float(tokens.y[query]), abs=1e-3)
        assert x == pytest.approx(float(tokens.x[query]), abs=1e-3)


def test_a_decoder_reference_lies_on_the_input_and_the_model_is_left_as_it_was() -> None:
    source, batch, found = traced("RT-DETR")
    call = deformable_calls(found)[-1]
    before = source.forward(batch).logits
    y, x = reference_point(source, batch, call, 1, sample=1)
    height, width = batch.inputs.shape[-2:]
    assert 0 <= y <= height
    assert 0 <= x <= width
    assert not any(module._forward_pre_hooks for module in source.module.modules())
    torch.testing.assert_close(source.forward(batch).logits, before)


def test_what_is_not_there_is_refused() -> None:
    _, _, found = traced("RT-DETR")
    call = deformable_calls(found)[-1]
    dense = next(call for call, record in found.records.items() if record.form == "dense")
    with pytest.raises(UsageError, match="densely"):
        sampling_points(found, dense, 0)
    with pytest.raises(UsageError, match="no query 99"):
        sampling_points(found, call, 99)
    with pytest.raises(UsageError, match="no head 9"):
        sampling_points(found, call, 0, head=9)
