"""Interventions on the deformable attention of real detectors: the changed rows, and nothing else left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout, Replace, ScaleAttention
from foveate.capture.trace import trace
from foveate.interfaces import CallKey

FAMILIES = (
    "Deformable DETR",
    "Deformable DETR, two stages",
    "RT-DETR",
    "RT-DETRv2",
    "RT-DETRv2, discrete",
    "D-FINE",
    "D-FINE, discrete",
    "RF-DETR",
    "Grounding DINO",
    "Mask2Former",
    "OneFormer",
)


def opened(name: str) -> tuple[Any, Any, str]:
    """A source, a batch and its (first) deformable site, in float64."""
    source: Any = tiny(name, dtype="float64")
    batch = source.encode(photos((64, 96), (80, 70)))
    sites = [site.id for site in source.sites if site.form == "deformable"]
    return source, batch, "decoder.cross" if "decoder.cross" in sites else sites[0]


def answers(outputs: Any) -> torch.Tensor:
    found: torch.Tensor = outputs.logits if "logits" in outputs else outputs.masks_queries_logits
    return found.nan_to_num(neginf=0.0)  # Grounding DINO has -inf beyond its words


@pytest.mark.parametrize("name", FAMILIES)
def test_a_region_knocked_out_of_every_family(name: str) -> None:
    source, batch, site = opened(name)
    call = CallKey(site, 0)
    with torch.no_grad():
        intact = trace(source, batch)
        read = intact.records[call].rows([0, 1, 2, 3]).sum((0, 1, 2))
        region = sorted(read.topk(9).indices.tolist())
        change = Knockout(site, layers=0, query="at:0-3", key="at:" + ",".join(map(str, region)))
        with intervene(source, [change]) as done:
            changed = trace(source, batch)
        after = source.forward(batch)
    before, rows = (found.records[call].rows(slice(None)) for found in (intact, changed))
    expected = before.clone()
    expected[:, :, :4, region] = 0
    assert (before - expected).abs().max() > 1e-2, "the region was read"
    torch.testing.assert_close(rows, expected, atol=1e-12, rtol=0)
    assert changed.certificate.passed
    assert done.applied[0][1:4] == (site, 0, 1)
    assert (answers(changed.outputs) - answers(intact.outputs)).abs().max() > 1e-6
    assert torch.equal(answers(after), answers(intact.outputs)), "nothing is left behind"


@pytest.mark.parametrize("name", ["Deformable DETR", "D-FINE, discrete", "Mask2Former"])
@pytest.mark.parametrize("kind", ["scale", "uniform", "shuffled", "zero", "mean", "patch"])
def test_every_intervention_runs_and_is_what_was_recorded(name: str, kind: str) -> None:
    source, batch, site = opened(name)
    call = CallKey(site, 1)
    with torch.no_grad():
        intact = trace(source, batch)
        change: Any = {
            "scale": ScaleAttention(site, layers=1, key="level:0", factor=0.25),
            "uniform": Replace(site, layers=1, key="level:1"),
            "shuffled": Replace(site, layers=1, by="shuffled"),
            "zero": AblateHeads(site, layers=1, heads=2),
            "mean": AblateHeads(site, layers=1, heads=2, to="mean"),
            "patch": Replace(site, layers=1, by=intact.records),
        }[kind]
        with intervene(source, [change], on=intact):
            changed = trace(source, batch)
    assert changed.certificate.passed
    rows, own = (found.records[call].rows(slice(None)) for found in (changed, intact))
    level = torch.from_numpy(intact.labels(call).key.level)
    if kind == "scale":
        own[..., level == 0] *= 0.25
    elif kind == "uniform":
        own[..., level == 1] = own[..., level == 1].mean(-1, keepdim=True)
    elif kind == "shuffled":
        own, rows = own.sort(-1).values, rows.sort(-1).values
    elif kind == "mean":
        own[:, 2] = own[:, 2].mean(-2, keepdim=True)
    torch.testing.assert_close(rows, own, atol=1e-12, rtol=0)
    moved = (answers(changed.outputs) - answers(intact.outputs)).abs().max()
    assert moved < 1e-9 if kind == "patch" else moved > 1e-6


def test_a_label_chooses_a_pyramid_level() -> None:
    source, batch, site = opened("Deformable DETR")
    with torch.no_grad(), intervene(source, [Knockout(site, key="level:0")], on=batch):
        changed = trace(source, batch)
    for call, record in changed.records.items():
        if call.site == site:
            level = changed.labels(call).key.level
            rows = record.rows(slice(None))
            assert float(rows[..., level == 0].abs().max()) == 0
            assert float(rows[..., level > 0].sum()) > 0


def test_the_model_is_as_it_was_after_an_error_in_it() -> None:
    source, batch, site = opened("RT-DETR")
    with torch.no_grad():
        plain = source.forward(batch).logits

        def stop(*_: Any) -> None:
            raise RuntimeError("stop")

        hook = source.module.model.decoder.layers[1].register_forward_pre_hook(stop)
        state = {name: dict(module.__dict__) for name, module in source.module.named_modules()}
        with pytest.raises(RuntimeError, match="stop"), intervene(source, [Knockout(site, key="at:0-40")]):
            source.forward(batch)
        for name, module in source.module.named_modules():
            assert module.__dict__.keys() == state[name].keys()
        hook.remove()
        assert torch.equal(source.forward(batch).logits, plain)
