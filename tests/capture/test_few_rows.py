"""A few rows are exact to one rounding of float32, however peaked; gradients are taken only where read."""

from __future__ import annotations

import pytest
import torch

from foveate.capture.dense import FEW, DenseRecord
from foveate.capture.gradients import gradient_rounds
from foveate.capture.trace import trace
from foveate.interfaces import Target
from foveate.testing.tiny import TinySource, tiny_samples


def peaked(batch: int, heads: int, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k with scores of standard deviation 8, as strided views of one projection each."""
    generator = torch.Generator().manual_seed(batch + heads)
    q = torch.randn(batch, 65, heads * 16, generator=generator) * 8**0.5
    k = torch.randn(batch, 65, heads // groups * 16, generator=generator) * 8**0.5
    return q.unflatten(-1, (heads, 16)).transpose(1, 2), k.unflatten(-1, (heads // groups, 16)).transpose(1, 2)


@pytest.mark.parametrize(("batch", "groups"), [(1, 1), (3, 1), (3, 2)])
def test_few_rows_are_float64_rounded_once(batch: int, groups: int) -> None:
    q, k = peaked(batch, 4, groups)
    index = [0, 7, 64]
    scores = q.double()[:, :, index] @ k.double().repeat_interleave(groups, 1).transpose(-1, -2) / 4
    expected = scores.softmax(-1)
    found = DenseRecord("x", q, k).rows(index)
    assert found.dtype == torch.float32
    assert len(index) <= FEW
    assert ((found - expected).abs() / expected.amax(-1, keepdim=True)).max() < 6e-8  # half an ulp of 1
    blocks = DenseRecord("x", q, k).rows(slice(0, 65))[:, :, index]
    assert 1e-7 < (blocks - expected).abs().max() < 1e-5  # float32 all through would not have passed


def test_gradients_of_some_calls_equal_those_of_all() -> None:
    source = TinySource()
    batch = source.encode(tiny_samples(2))
    t = trace(source, batch, grad=True)
    bound = source.bind(t.outputs, batch, Target(scale="logit"))
    last = list(t.records)[-1]
    (everything,) = gradient_rounds(t, bound)
    (some,) = gradient_rounds(t, bound, calls=[last], keep_graph=False)
    assert list(some.gradients) == [last]
    assert torch.equal(some.gradients[last], everything.gradients[last])
