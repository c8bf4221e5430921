"""Relevance where the decoder reads a pyramid, or one level of it a layer: the paper's matrices, in float64.

Chefer, Gur and Wolf 2021 (arXiv:2103.15679), equations 5 to 10, with every R held. A level's tokens are some of
the pyramid's, so their rows of R̄ are those of the pyramid: ``R_qi += R̄_qqᵀ Ā R̄_ii[level]``. A and dL/dA are
the records' own, which other tests hold against the modules' outputs and against autograd; here it is the
propagation that is checked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.gradient_maps import grad_attention
from foveate.capture.gradients import gradient_rounds
from foveate.capture.relevance import relevance
from foveate.capture.trace import Trace, trace
from foveate.interfaces import AttentionStep, BoundTarget, MergeStep, Target

SHAPES = ((60, 90), (90, 50))


def opened(name: str) -> tuple[Trace, BoundTarget]:
    source: Any = tiny(name, dtype="float64", threshold=0.0, max_objects=2)
    samples = photos(*SHAPES) if name != "YOLOS" else photos((64, 96), (64, 96))
    batch = source.encode(samples)
    found = trace(source, batch, grad=True)
    return found, source.bind(found.outputs, found.batch, Target(scale="logit"))


def normalised(joined: Tensor) -> Tensor:
    """Equations 8 and 9; a row of zeros stays zero."""
    rest = joined - torch.eye(len(joined)).double()
    sums = rest.sum(-1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(rest), rest / sums) + torch.eye(len(joined)).double()


def weighted(found: Trace, gradients: Any, sample: int) -> dict[Any, Tensor]:
    """Equation 5 for every call: mean over heads of relu(A * dL/dA), of one sample."""
    bars = {}
    for call, record in found.records.items():
        if call in gradients:
            slope = record.weight_gradient(slice(None), gradients[call])
            bars[call] = (record.rows(slice(None)) * slope).clamp(min=0).mean(1)[sample].double()
    return bars


def explicit(found: Trace, bars: dict[Any, Tensor], query: int, queries: str) -> Tensor:
    """The query's row of R over the bottom stream, every matrix held."""
    own: dict[str, Tensor] = {}  # R of each stream with itself
    below: dict[str, Tensor] = {}  # R of each stream with the bottom one
    levels: dict[str, Tensor] = {}  # R-bar of streams that were merged
    bottom = found.stream

    def start(stream: str, size: int) -> None:
        if stream not in own:
            own[stream] = torch.eye(size).double()

    for step in found.flow:
        if isinstance(step, MergeStep):
            matrix = step.matrix.to_dense().double()
            start(step.source, matrix.shape[1])
            source = own[step.source] if step.source == bottom else below[step.source]
            below[step.target] = matrix @ source
            own[step.target] = torch.eye(len(matrix)).double()
            # rows of R-bar of tokens that are some of another stream's are theirs
            levels[step.target] = matrix @ normalised(own[step.source])
            continue
        if not isinstance(step, AttentionStep):
            raise AssertionError(step)
        bar = bars.get(step.call)
        rows, keys = found.records[step.call].shape[2:]
        start(step.query, rows)
        start(step.key, keys)
        if bar is None:
            continue
        if step.query == step.key:
            if step.query in below:
                below[step.query] = below[step.query] + bar @ below[step.query]
            own[step.query] = own[step.query] + bar @ own[step.query]
        else:
            reading = levels.get(step.key, normalised(own[step.key]) if step.key == bottom else None)
            assert reading is not None
            arrived = normalised(own[step.query]).T @ bar @ reading
            below[step.query] = below.get(step.query, torch.zeros_like(arrived)) + arrived
    return below[queries][query]


@pytest.mark.parametrize(
    "name", ["Mask2Former", "OneFormer", "MaskFormer", "Deformable DETR", "Deformable DETR, one level", "EoMT"]
)
def test_relevance_is_that_of_the_papers_matrices(name: str) -> None:
    found, bound = opened(name)
    maps, last = relevance(found, bound), grad_attention(found, bound)
    assert len(bound) == 4
    readout = found.readout(bound)
    site, read = next(iter(readout.items()))
    stream = next(s.query for s in found.source.sites if s.id == site)
    reading = [s for s in found.flow if isinstance(s, AttentionStep) and s.call.site == site][-1]
    merged = next((s for s in found.flow if isinstance(s, MergeStep) and s.target == reading.key), None)
    checked = 0
    for backward in gradient_rounds(found, bound):
        for row in backward.rows:
            sample, query = bound.rows[row].sample, int(read.weights[row].argmax())
            bars = weighted(found, backward.gradients, sample)
            truth = explicit(found, bars, query, stream)
            assert truth.abs().max() > 0
            assert float((maps[row] - truth).abs().max() / truth.abs().max()) < 1e-4
            final = bars[reading.call][query]
            final = final if merged is None else final @ merged.matrix.to_dense().double()
            assert final.abs().max() > 0
            assert float((last[row] - final).abs().max() / final.abs().max()) < 1e-4
            checked += 1
    assert checked == len(bound)
    assert (maps[0] - maps[1]).abs().max() > 1e-3 * maps[0].abs().max(), "objects differ"
