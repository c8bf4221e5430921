"""Every method on every family of detectors: what it gives, or by name why it gives nothing.

The table in docs/detection.md says the same. A method that starts to work (or stops) without a change here fails.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import CASES, photos, tiny
from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.intervening import intervene
from foveate.capture.interventions import Knockout
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.sampling import sampling_points
from foveate.capture.trace import Trace, trace
from foveate.errors import FoveateError
from foveate.interfaces import AttentionStep, BoundTarget, CallKey, Target
from foveate.metrics.entropy import EntropyNormalised

FAMILIES = tuple(CASES)
DEFORMABLE = frozenset(
    {"Mask2Former", "OneFormer", "Grounding DINO", "RF-DETR"}
    | {name for name in CASES if name.startswith(("Deformable", "RT-DETR", "D-FINE"))}
)
SWEEPS = {"rollout": rollout, "relevance": relevance, "grad x attention": grad_attention, "legrad": legrad}
METHODS = ("rows", "metrics", "points", "knockout", "left and right", *SWEEPS)
UNSUPPORTED = {("points", name): "attends densely" for name in FAMILIES if name not in DEFORMABLE}
"""(method, family) -> words of the error that names the reason."""


@functools.cache
def opened(name: str) -> tuple[Trace, BoundTarget]:
    """A trace (in float64 where the model can) with gradients, bound to the two surest objects of each of two
    pictures."""
    torch.manual_seed(0)
    dtype = "float32" if name == "DAB-DETR" else "float64"  # its positions are float32 whatever the model is
    source: Any = tiny(name, dtype=dtype, threshold=0.0, max_objects=2)
    samples = photos((64, 96), (80, 70)) if name != "YOLOS" else photos((64, 96), (64, 96))
    found = trace(source, source.encode(samples), grad=True)
    return found, source.bind(found.outputs, found.batch, Target(scale="logit"))


def reading_call(found: Trace) -> CallKey:
    """The last layer of the site where the answer is read."""
    site = next(iter(found.readout()))
    return [s.call for s in found.flow if isinstance(s, AttentionStep) and s.call.site == site][-1]


def run(method: str, found: Trace, bound: BoundTarget) -> torch.Tensor:
    """What the method gives; any tensor, of which something is checked below."""
    call = reading_call(found)
    record = found.record(call)
    if method in SWEEPS:
        return SWEEPS[method](found, bound)
    if method == "rows":
        return record.rows([0, 1])
    if method == "metrics":
        return torch.as_tensor(EntropyNormalised().kernel(record.rows([0, 1])))
    if method == "points":
        deformable = [c for c, r in found.records.items() if r.form == "deformable"]
        points = sampling_points(found, deformable[-1] if deformable else call, 1)
        return torch.from_numpy(points.weight)
    if method == "left and right":
        sizes = record.shape
        left = record.left(torch.ones(sizes.batch, 1, sizes.queries))
        return left + record.right(torch.ones(sizes.batch, sizes.keys, 1)).mean()
    return knocked_out(found, bound)


def knocked_out(found: Trace, bound: BoundTarget) -> torch.Tensor:
    """What the scores lose when the keys that the objects' own queries read most are cut off."""
    call = reading_call(found)
    (read,) = found.readout(bound).values()
    rows = found.record(call).rows(read.weights.argmax(-1).tolist())
    top = rows.mean((0, 1, 2)).topk(max(1, rows.shape[-1] // 8)).indices.tolist()
    change = Knockout(call.site, key="at:" + ",".join(map(str, sorted(top))))
    source: Any = found.source
    with torch.no_grad(), intervene(source, [change]) as done:
        outputs = source.forward(found.batch)
    assert all(one.calls == 1 for one in done.applied)
    return (source.score(outputs, found.batch, bound) - source.score(found.outputs, found.batch, bound)).detach()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", FAMILIES)
def test_method_on_family(name: str, method: str) -> None:
    found, bound = opened(name)
    reason = UNSUPPORTED.get((method, name))
    if reason is not None:
        with pytest.raises(FoveateError, match=reason):
            run(method, found, bound)
        return
    result = run(method, found, bound).detach()
    assert torch.isfinite(result).all()
    assert result.abs().max() > 0
    if method in SWEEPS:
        assert result.shape == (len(bound), len(found.labels(stream_call(found)).key))
        assert (result >= 0).all()
        varied = result.std(-1) / result.mean(-1)
        assert (varied > 0.05).all(), "a flat map"
    if method == "rollout":
        assert (result.sum(-1) <= 1 + 1e-5).all()
    if method == "metrics":
        assert (result <= 1 + 1e-9).all()
    if method == "points":
        assert float(result.sum()) == pytest.approx(1.0, abs=1e-5)


def stream_call(found: Trace) -> CallKey:
    """A call whose keys are the bottom stream."""
    sites = {s.id: s for s in found.source.sites}
    for call in found.records:
        if sites[call.site].key == found.stream:
            return call
    merged = {s.target for s in found.flow if getattr(s, "source", None) == found.stream}
    raise AssertionError(f"no site reads {found.stream!r}, only {merged}")


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "detection.md").read_text(encoding="utf-8")
    table = [line for line in text.splitlines() if line.startswith("| ") and line.count("|") == len(METHODS) + 2]
    header = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert header[1:] == list(METHODS)
    rows = {
        cells[0]: cells[1:] for line in table[1:] if (cells := [c.strip() for c in line.strip("|").split("|")])
    }
    assert set(rows) == set(FAMILIES)
    for name, cells in rows.items():
        said = np.array([cell == "yes" for cell in cells])
        true = np.array([(method, name) not in UNSUPPORTED for method in METHODS])
        assert (said == true).all(), name
