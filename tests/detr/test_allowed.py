"""Keys that a mask blocked are marked as blocked, by sample, layer and query; zero attention is something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from PIL import Image

from detr_models import photos, tiny
from foveate.capture.engine import capture_batch
from foveate.interfaces import CallKey, CapturePlan, SitePlan
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan

SHAPES = ((64, 90), (100, 60))


def captured(source: Any, batch: Any, sites: list[str], rows: Any = "all") -> Any:
    plan = CapturePlan(tuple(SitePlan(site, rows=rows, reductions=()) for site in sites), dtype="float32")
    return capture_batch(source, batch, plan)


def test_masked_attention_equals_the_masks_that_the_model_predicted_before() -> None:
    """Cheng et al. 2022, eq. 2 and 3: a key is blocked where the previous mask is below one half there, unless the
    whole mask is; here the masks come from the model's own intermediate predictions.
    """
    source = tiny("Mask2Former")
    batch = source.encode(photos(*SHAPES))
    module: Any = source.module
    with torch.no_grad():
        whole = module.model(batch.inputs, **batch.per_sample, output_hidden_states=True)
    masks = whole.masks_queries_logits  # before the first layer, and after each
    levels = source.levels(batch)
    found = captured(source, batch, ["decoder.cross.p5", "decoder.cross.p4", "decoder.cross.p3"])
    seen = 0
    for site, kept in found.sites.items():
        for number, layer in enumerate(kept.layers):
            small = F.interpolate(masks[layer], size=levels[layer % 3], mode="bilinear", align_corners=False)
            expected = small.sigmoid().flatten(2) >= 0.5
            expected |= ~expected.any(-1, keepdim=True)
            ours = torch.from_numpy(kept.arrays["allowed"][:, number])
            assert (ours != expected).float().mean() < 0.01, site  # a logit within rounding of 0
            attention = torch.from_numpy(kept.arrays["attention"][:, number])
            assert float(attention.amax(1)[~ours].max()) == 0.0
            seen += int((~ours).sum())
    assert seen > 0


@pytest.mark.parametrize("name", ["DETR", "Conditional DETR", "DAB-DETR"])
@pytest.mark.parametrize("rows", ["all", (0, 3), "readout"])
def test_padding_is_marked_for_each_sample(name: str, rows: Any) -> None:
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    grid = source.levels(batch)[0]
    image = F.interpolate(batch.per_sample["pixel_mask"][:, None].float(), size=grid).flatten(1).numpy() > 0
    assert image.any()
    assert not image.all()
    kept = captured(source, batch, ["decoder.cross"], rows).sites["decoder.cross"]
    allowed = kept.arrays["allowed"]  # (sample, layer, query, key)
    assert allowed.dtype == bool
    assert allowed.shape == (2, 2, kept.arrays["attention"].shape[-2], image.shape[1])
    np.testing.assert_array_equal(allowed, np.broadcast_to(image[:, None, None], allowed.shape))


@pytest.mark.parametrize("name", ["Deformable DETR", "Deformable DETR, two stages", "Grounding DINO"])
def test_deformable_attention_hides_padding_by_its_values(name: str) -> None:
    """Where `allowed` is False the values that the model samples are zero in every head, and nowhere else."""
    from foveate.capture.trace import trace

    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    kept = captured(source, batch, ["decoder.cross"]).sites["decoder.cross"]
    allowed = torch.from_numpy(kept.arrays["allowed"])
    record = trace(source, batch).records[next(c for c in _calls(source) if c.site == "decoder.cross")]
    read = record.values().abs().amax((1, 3)) > 0  # (sample, key)
    assert not read.all()
    assert torch.equal(allowed, read[:, None, None].expand_as(allowed))


def _calls(source: Any) -> list[CallKey]:
    return [CallKey(site.id, layer) for site in source.sites for layer in site.layers]


def test_sites_without_a_mask_store_none() -> None:
    source = tiny("DETR")
    kept = captured(source, source.encode(photos(*SHAPES)), ["decoder.self"]).sites["decoder.self"]
    assert "allowed" not in kept.arrays


@pytest.mark.parametrize("name", ["Conditional DETR", "Mask2Former", "RT-DETR"])
def test_a_run_stores_it_beside_the_rows(tmp_path: Path, name: str) -> None:
    for sample in photos((64, 90), (100, 60), (80, 80)):
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.id}.png")
    source = tiny(name)
    report = run_capture(source, [tmp_path], tmp_path / "run.zarr", plan=build_plan(source), batch_size=2)
    assert not report.failed
    tree = xr.open_datatree(tmp_path / "run.zarr", engine="zarr", consolidated=False)
    cross = [site for site in tree["sites"].children if site.startswith("decoder.cross")]
    assert cross
    stored = [tree[f"sites/{site}"].dataset for site in cross]
    rows = [dataset for dataset in stored if "attention" in dataset]
    assert rows, "the readout row of the decoder is kept"
    for dataset in rows:
        assert ("allowed" in dataset) == (name != "RT-DETR")
        if "allowed" in dataset:
            assert dataset["allowed"].dims == ("sample", "layer", "query", "key")
            weights = dataset["attention"].max("head").values
            assert float(weights[~dataset["allowed"].values].max()) == 0.0


MASKED = ("DETR", "Conditional DETR", "Deformable DETR", "Grounding DINO", "Mask2Former", "OneFormer", "EoMT")


@pytest.mark.parametrize("name", MASKED)
def test_reductions_say_how_many_keys_a_row_may_read(name: str) -> None:
    """Against the masks of all rows: K of each row, and the share of the queries that may read a key."""
    source = tiny(name)
    batch = source.encode(photos(*SHAPES))
    sites = [s.id for s in source.sites if set(s.masks) - {"causal"}]
    plan = CapturePlan(tuple(SitePlan(s, rows="all", reductions=("entropy",)) for s in sites), dtype="float32")
    found = capture_batch(source, batch, plan).sites
    blocked = 0
    for site in sites:
        arrays = found[site].arrays
        if "allowed" not in arrays:  # its masks block nothing here
            assert "key_count" not in arrays
            continue
        free = arrays["allowed"]  # (sample, layer, query, key)
        np.testing.assert_array_equal(arrays["key_count"], free.sum(-1))
        np.testing.assert_allclose(arrays["reader_share"], free.mean(-2), atol=1e-6)
        blocked += int((~free).sum())
    assert blocked > 0


ALL_ROWS = [
    ("Conditional DETR", "encoder.self"),
    ("Mask2Former", "decoder.cross.p4"),
    ("Deformable DETR", "encoder.self"),
    ("Deformable DETR", "decoder.cross"),
    ("RT-DETR", "encoder.self"),
    ("RT-DETR", "decoder.cross"),
]


@pytest.mark.parametrize(("name", "site"), ALL_ROWS)
def test_metrics_of_all_rows_do_not_count_blocked_keys(tmp_path: Path, name: str, site: str) -> None:
    """H / ln K and the column means of every row, by hand from the full matrices over the keys that are free."""
    from foveate.data.run import Run
    from foveate.study.measure import measure_run

    for sample in photos((64, 90), (100, 60)):
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.id}.png")
    source = tiny(name)
    plan = build_plan(source, sites=[site], rows="all", reductions=("entropy", "received"), dtype="float32")
    run_capture(source, [tmp_path], tmp_path / "run.zarr", plan=plan, batch_size=2)
    run = Run.open(tmp_path / "run.zarr")
    measure_run(run, metrics=["entropy_normalised", "entropy", "received_mass"], keys="all")
    stored = run.site(site)
    weights = stored["attention"].values.astype(np.float64)  # (sample, layer, head, query, key)
    free = np.ones(weights[:, :, 0].shape, bool)
    if name != "RT-DETR":
        free = stored["allowed"].values
        assert not free.all()
    free = np.broadcast_to(free[:, :, None], weights.shape)
    readable = np.where(free, weights, 0.0)  # deformable points on padding read zeros
    readers = free.sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = np.nan_to_num(readable / readable.sum(-1, keepdims=True))  # nothing read: 0
        entropy = -(p * np.log(np.maximum(p, 1e-300))).sum(-1)
        expected = {
            "entropy_normalised": np.where(free.sum(-1) > 1, entropy / np.log(free.sum(-1)), np.nan),
            "entropy": np.where(free.any(-1), entropy, np.nan),
            "received_mass": np.where(readers > 0, readable.sum(-2) / readers, np.nan),
        }
    for metric, truth in expected.items():
        values = next(iter(run.product(f"metrics/{site}/{metric}").data_vars.values())).values
        assert np.isfinite(values).any()
        np.testing.assert_allclose(values, truth, atol=2e-5, rtol=2e-4, equal_nan=True)


def test_metrics_do_not_count_blocked_keys(tmp_path: Path) -> None:
    """Normalised entropy of the readout row, by hand over the keys that lie on the picture."""
    from foveate.data.run import Run
    from foveate.study.measure import measure_run

    for sample in photos((64, 90), (100, 60), (80, 80)):
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.id}.png")
    source = tiny("Conditional DETR")
    plan = build_plan(source, sites=["decoder.cross"], reductions=(), dtype="float32")
    run_capture(source, [tmp_path], tmp_path / "run.zarr", plan=plan, batch_size=2)
    run = Run.open(tmp_path / "run.zarr")
    measure_run(run, metrics=["entropy_normalised"])
    site = run.site("decoder.cross")
    found = run.product("metrics/decoder.cross/entropy_normalised")
    values = next(iter(found.data_vars.values())).values
    for i in range(3):
        for layer in range(2):
            free = site["allowed"].values[i, layer, 0]
            assert free.sum() < free.size or i == 2
            for head in range(4):
                row = site["attention"].values[i, layer, head, 0, free].astype(np.float64)
                row = row / row.sum()
                expected = -(row * np.log(np.maximum(row, 1e-300))).sum() / np.log(free.sum())
                assert values[i, layer, head, 0] == pytest.approx(expected, abs=1e-4)
