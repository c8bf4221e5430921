"""Attention flow: how much could pass from an output to each input, if weights were the capacities of pipes.

Abnar and Zuidema 2020 (arXiv:2005.00928, section 3.3): layers of nodes, an edge for each weight of
a I + (1 - a) mean_h A_l, and for each input the maximum flow from the output to it. One flow problem an
input over tokens^2 edges a layer is out of reach for images, so patches are first pooled: contracting nodes
adds the capacities between them. The contracted flow is an upper bound of the flow on tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import maximum_flow
from torch import Tensor

from foveate.capture.streams import start_of_reading
from foveate.capture.tap import quiet
from foveate.capture.trace import Trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionStep, BoundTarget, TokenAxis

UNIT = 1 << 20
"""Capacities are integers to the solver: one is this many, so flows are exact to 1e-6."""


def attention_flow(
    trace: Trace, bound: BoundTarget | None = None, *, pool: int = 2, residual: float = 0.5
) -> Tensor:
    """Maximum flow from the readout to every token, rows summing to 1: ``(sample | target, token)``.

    ``pool`` x ``pool`` patches make one node (other tokens are nodes of their own); the flow to a node is
    spread evenly over its tokens. For flows of self-attention over one stream only; CaptureError otherwise.
    Measured with 12 layers: 0.1 s an image for 49 nodes, 10 s for 196.
    """
    if pool < 1 or not 0.0 <= residual < 1.0:
        raise UsageError(f"attention flow: pool must be at least 1 and residual in [0, 1), not {pool}, {residual}")
    steps = _steps(trace)
    _, weights = start_of_reading(trace, bound)
    tokens = trace.labels(steps[0].call).key
    member = torch.from_numpy(pooled(tokens, pool)).to(weights)
    with quiet():
        layers = [_capacities(trace, step, member, residual) for step in reversed(steps)]
    samples = range(len(trace.batch)) if bound is None else [row.sample for row in bound.rows]
    starts = (weights @ member.T).double().cpu().numpy()
    flows = [max_flows(start, [layer[i] for layer in layers]) for start, i in zip(starts, samples, strict=True)]
    found = torch.from_numpy(np.array(flows).reshape(len(starts), len(member))).to(weights)
    spread = (found / member.sum(1)) @ member
    return spread / spread.sum(-1, keepdim=True)


def pooled(tokens: TokenAxis, pool: int) -> NDArray[np.float32]:
    """Which token belongs to which node, 0 or 1, ``(node, token)``: patches in squares, all others alone."""
    patches = tokens.where("patch")
    keys: list[tuple[int, int, int]] = [(-1, i, 0) for i in range(len(tokens))]
    rows = np.unique(tokens.y[patches], return_inverse=True)[1] // pool
    columns = np.unique(tokens.x[patches], return_inverse=True)[1] // pool
    for position, row, column in zip(patches, rows, columns, strict=True):
        keys[int(position)] = (int(tokens.level[position]), int(row), int(column))
    nodes = list(dict.fromkeys(keys))
    member = np.zeros((len(nodes), len(tokens)), np.float32)
    member[[nodes.index(key) for key in keys], range(len(tokens))] = 1.0
    return member


def max_flows(start: NDArray[np.float64], layers: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Maximum flow from the top to each bottom node, ``(node,)``.

    ``start`` ``(node,)`` limits what enters each top node; ``layers`` are capacities ``(from, to)`` of each
    layer, the last layer of the model first.
    """
    nodes = len(start)
    source, sink = 0, 1 + (len(layers) + 1) * nodes
    rows, columns, capacity = [np.zeros(nodes, int)], [1 + np.arange(nodes)], [start]
    for depth, layer in enumerate(layers):
        above = 1 + depth * nodes + np.arange(nodes)
        rows.append(np.repeat(above, nodes))
        columns.append(np.tile(above + nodes, nodes))
        capacity.append(layer.ravel())
    bottom = 1 + len(layers) * nodes
    found = np.empty(nodes)
    for node in range(nodes):
        r, c = np.concatenate([*rows, [bottom + node]]), np.concatenate([*columns, [sink]])
        limits = np.concatenate([*capacity, [start.sum() + 1.0]])
        whole = np.rint(limits * UNIT).astype(np.int32)
        graph = coo_array((whole, (r, c)), shape=(sink + 1, sink + 1)).tocsr()
        found[node] = maximum_flow(graph, source, sink).flow_value / UNIT
    return found


def _capacities(trace: Trace, step: AttentionStep, member: Tensor, residual: float) -> NDArray[np.float64]:
    """a I + (1 - a) mean_h A between nodes, ``(sample, node, node)``."""
    record = trace.record(step.call)
    keep = residual if step.residual else 0.0
    between = record.left(member.expand(record.shape.batch, -1, -1)) @ member.T
    identity = torch.diag(member.sum(1))
    return (keep * identity + (1 - keep) * between).double().cpu().numpy()


def _steps(trace: Trace) -> list[AttentionStep]:
    steps = [step for step in trace.flow if isinstance(step, AttentionStep)]
    plain = len(steps) == len(trace.flow) and all(s.query == s.key == trace.stream for s in steps)
    labels = [trace.labels(step.call) for step in steps]
    if not steps or not plain or any(len(said.leading) > 1 or said.partial for said in labels):
        raise CaptureError(
            "attention flow is defined for self-attention over one stream of tokens", remedy="use rollout"
        )
    return steps
