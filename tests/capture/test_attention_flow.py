"""Attention flow against linear programming, on graphs small enough for it."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from foveate.capture.attention_flow import attention_flow, max_flows, pooled
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import TokenAxis
from foveate.testing.tiny import TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import TinyDetector


def by_linear_program(start, layers, sink):
    """Maximise what enters, subject to conservation at every node: variables are edges."""
    nodes, depth = len(start), len(layers)
    edges = [("in", 0, j, start[j]) for j in range(nodes)]
    for level, layer in enumerate(layers):
        edges += [(level, i, j, layer[i, j]) for i in range(nodes) for j in range(nodes)]
    balance = np.zeros(((depth + 1) * nodes, len(edges)))
    for e, (level, i, j, _) in enumerate(edges):
        if level == "in":
            balance[j, e] += 1
        else:
            balance[level * nodes + i, e] -= 1
            balance[(level + 1) * nodes + j, e] += 1
    kept = [n for n in range((depth + 1) * nodes) if n != depth * nodes + sink]
    objective = [-1.0 if level == "in" else 0.0 for level, *_ in edges]
    bounds = [(0, capacity) for *_, capacity in edges]
    return -linprog(objective, A_eq=balance[kept], b_eq=np.zeros(len(kept)), bounds=bounds).fun


@pytest.mark.parametrize("seed", range(3))
def test_flows_are_maximal(seed):
    random = np.random.default_rng(seed)
    layers = [random.dirichlet(np.full(4, 0.4), 4) for _ in range(3)]
    start = random.dirichlet(np.ones(4))
    found = max_flows(start, layers)
    assert found == pytest.approx([by_linear_program(start, layers, sink) for sink in range(4)], abs=1e-5)


def test_tokens_without_pooling_equal_the_linear_program():
    source = TinySource(TinyConfig(image=16, layers=3))
    t = trace(source, source.encode(tiny_samples(2)))
    found = attention_flow(t, pool=1)
    for i in range(2):
        layers = [(r.rows(slice(None))[i].mean(0).double() + torch.eye(5)) / 2 for r in t.records.values()]
        start = np.eye(5)[0]
        truth = np.array([by_linear_program(start, [a.numpy() for a in layers[::-1]], j) for j in range(5)])
        assert found[i].numpy() == pytest.approx(truth / truth.sum(), abs=1e-5)


def test_pooling_contracts_the_graph():
    axis = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(4, 4, height=32, width=32))
    member = pooled(axis, 2)
    assert member.shape == (5, 17)
    assert member.sum(0).tolist() == [1] * 17
    assert sorted(member.sum(1).tolist()) == [1, 4, 4, 4, 4]
    assert np.flatnonzero(member[1]).tolist() == [1, 2, 5, 6]
    source = TinySource()
    t = trace(source, source.encode(tiny_samples(2)))
    coarse, fine = attention_flow(t, pool=2), attention_flow(t, pool=1)
    assert torch.allclose(coarse.sum(-1), torch.ones(2))
    assert torch.equal(coarse[:, 1], coarse[:, 6])
    assert not torch.allclose(coarse, fine, atol=1e-3)


def test_what_it_is_not_defined_for():
    detector = TinyDetector()
    with pytest.raises(CaptureError, match="over one stream"):
        attention_flow(trace(detector, detector.encode(tiny_samples(1))))
    source = TinySource()
    t = trace(source, source.encode(tiny_samples(1)))
    with pytest.raises(UsageError, match="pool"):
        attention_flow(t, pool=0)
