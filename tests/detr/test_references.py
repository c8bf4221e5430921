"""Reference points of sampling points: those that the modules were told, on the input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.engine import capture_batch
from foveate.capture.references import ReferencePoints
from foveate.capture.sampling import reference_point
from foveate.interfaces import CallKey, CapturePlan, SitePlan


def captured(source: Any, batch: Any, site: str, rows: Any) -> Any:
    plan = CapturePlan((SitePlan(site, rows=rows, reductions=("points",)),), dtype="float32")
    return capture_batch(source, batch, plan).sites[site]


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETR", "D-FINE", "RF-DETR", "Grounding DINO"])
def test_references_are_what_each_layer_was_told(name: str) -> None:
    source: Any = tiny(name)
    batch = source.encode(photos((64, 96), (80, 70)))
    every, some = (captured(source, batch, "decoder.cross", rows) for rows in ("all", (4, 1)))
    found = every.arrays["reference"]
    assert found.shape == (*every.arrays["attention"].shape[:2], every.arrays["attention"].shape[3], 4)
    np.testing.assert_array_equal(some.arrays["reference"], found[:, :, [4, 1]])
    for layer, query, sample in ((0, 0, 0), (1, 3, 1), (1, 5, 0)):
        expected = reference_point(source, batch, CallKey("decoder.cross", layer), query, sample=sample)
        np.testing.assert_allclose(found[sample, layer, query, :2], expected, rtol=1e-5, atol=1e-3)


def test_offsets_of_the_last_layer_from_the_modules_own_formula() -> None:
    """RT-DETR: location = reference + offset / points * extent / 2 (Zhu et al. 2021, section A.4)."""
    source: Any = tiny("RT-DETR")
    batch = source.encode(photos((64, 64)))
    kept = captured(source, batch, "decoder.cross", "all")
    module = source.module.get_submodule("model.decoder.layers.1.encoder_attn")
    heard: list[torch.Tensor] = []
    hook = module.sampling_offsets.register_forward_hook(lambda _m, _a, out: heard.append(out.detach()))
    source.forward(batch)
    hook.remove()
    heads, count = kept.arrays["weight"].shape[2], kept.arrays["weight"].shape[-1]
    queries = kept.arrays["weight"].shape[3]
    offset = heard[-1].reshape(queries, heads, count, 2).numpy().transpose(1, 0, 2, 3)[..., ::-1]
    reference = kept.arrays["reference"][0, 1][None, :, None]
    points = module.n_points
    expected = reference[..., :2] + offset / points * reference[..., 2:] / 2
    np.testing.assert_allclose(kept.arrays["location"][0, 1], expected, rtol=1e-4, atol=1e-3)


def test_a_readout_keeps_its_querys_reference() -> None:
    source: Any = tiny("RT-DETR")
    batch = source.encode(photos((64, 96), (80, 70), (60, 60)))
    every, one = (captured(source, batch, "decoder.cross", rows) for rows in ("all", "readout"))
    with torch.no_grad():
        chosen = source.readout(batch, source.forward(batch))["decoder.cross"].weights.argmax(-1).tolist()
    for sample, query in enumerate(chosen):
        expected = every.arrays["reference"][sample, :, query]
        np.testing.assert_allclose(one.arrays["reference"][sample, :, 0], expected, rtol=1e-4, atol=1e-2)


def test_hooks_are_gone_after_an_exception() -> None:
    source: Any = tiny("Deformable DETR")
    path = next(iter(next(site for site in source.sites if site.id == "decoder.cross").modules))
    module = source.module.get_submodule(path.partition("#")[0])
    before = len(module._forward_pre_hooks)
    counted: list[int] = []

    def cut_off() -> None:
        with ReferencePoints(source.module, [path]):
            counted.append(len(module._forward_pre_hooks))
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        cut_off()
    assert counted == [before + 1]
    assert len(module._forward_pre_hooks) == before


def test_points_without_extent_say_so() -> None:
    told = torch.rand(2, 5, 3, 2)
    module = torch.nn.Module()

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any, reference_points: Any) -> Any:
            return hidden

    module.layer = Layer()
    with ReferencePoints(module, ["layer"]) as heard:
        module.layer(torch.zeros(1), told)
        found = heard.at("layer", 2, (40, 60))
    assert found is not None
    expected = told.mean(2)[..., [1, 0]] * torch.tensor([40.0, 60.0])
    torch.testing.assert_close(found[..., :2], expected)
    assert (found[..., 2:] == 0).all()
    assert ReferencePoints(module, []).at("layer", 2, (40, 60)) is None
