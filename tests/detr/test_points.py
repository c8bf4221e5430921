"""Sampling points kept by a capture: splatted by hand they make the captured rows, and they lie where the model
sampled."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.engine import SiteCapture, capture_batch
from foveate.errors import UsageError
from foveate.interfaces import CapturePlan, SitePlan

FAMILIES = ("Deformable DETR", "RT-DETR", "RT-DETRv2, discrete", "D-FINE", "RF-DETR", "Grounding DINO")


def captured(name: str, rows: Any, site: str = "decoder.cross", **plan: Any) -> tuple[Any, Any, SiteCapture]:
    source: Any = tiny(name)
    batch = source.encode(photos((64, 96), (80, 70), (60, 60)))
    wanted = {"reductions": ("points",), **plan}
    kept = capture_batch(source, batch, CapturePlan((SitePlan(site, rows=rows, **wanted),), dtype="float32"))
    return source, batch, kept.sites[site]


def splat(kept: SiteCapture, at: tuple[int, ...]) -> np.ndarray:
    """Weights of one row's points on the four cells around each, in plain Python, from the stored arrays alone."""
    keys = kept.key
    place: dict[int, dict[tuple[int, int], int]] = defaultdict(dict)
    extent = {}
    for number in range(len(keys)):
        size = float(keys.height[number]), float(keys.width[number])
        cell = round(float(keys.y[number]) / size[0] - 0.5), round(float(keys.x[number]) / size[1] - 0.5)
        place[int(keys.level[number])][cell] = number
        extent[int(keys.level[number])] = size
    row = np.zeros(len(keys))
    location, weight, level = (
        kept.arrays[name][at].astype(np.float64) for name in ("location", "weight", "level")
    )
    for (y, x), share, of in zip(location, weight, level, strict=True):
        height, width = extent[int(of)]
        down, across = y / height - 0.5, x / width - 0.5
        for i in (math.floor(down), math.floor(down) + 1):
            for j in (math.floor(across), math.floor(across) + 1):
                if (i, j) in place[int(of)]:
                    row[place[int(of)][i, j]] += share * (1 - abs(down - i)) * (1 - abs(across - j))
    return row


@pytest.mark.parametrize("rows", ["all", (0, 3), "readout"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_points_kept_make_the_rows_kept(name: str, rows: Any) -> None:
    _, batch, kept = captured(name, rows)
    attention = kept.arrays["attention"]
    samples, layers, heads, queries, _ = attention.shape
    count = kept.arrays["weight"].shape[-1]
    assert kept.arrays["location"].shape == (samples, layers, heads, queries, count, 2)
    assert kept.arrays["inside"].shape == kept.arrays["level"].shape == (samples, layers, heads, queries, count)
    assert kept.arrays["inside"].dtype == bool
    assert kept.arrays["level"].dtype == np.int32
    np.testing.assert_allclose(kept.arrays["weight"].sum(-1), 1.0, atol=1e-5)
    chosen = np.random.default_rng(0).integers(0, attention.shape[:-1], (6, 4))
    for at in map(tuple, chosen):
        np.testing.assert_allclose(splat(kept, at), attention[at], atol=3e-5)
    height, width = batch.inputs.shape[-2:]
    y, x = kept.arrays["location"][..., 0], kept.arrays["location"][..., 1]
    on = (y >= 0) & (y <= height) & (x >= 0) & (x <= width)
    borderline = np.minimum.reduce([abs(y), abs(y - height), abs(x), abs(x - width)]) < 1e-3
    assert (kept.arrays["inside"] == on)[~borderline].all()


def test_points_are_those_that_the_module_computed() -> None:
    """Against ``sampling_locations`` and weights as they entered the model's own sampling function."""
    source: Any = tiny("Deformable DETR")
    batch = source.encode(photos((64, 96), (80, 70)))
    heard: list[Any] = []

    def listen(_: Any, args: Any) -> None:
        heard.append(args)

    layers = source.module.model.decoder.layers
    hooks = [layer.encoder_attn.attn.register_forward_pre_hook(listen) for layer in layers]
    plan = CapturePlan((SitePlan("decoder.cross", rows="all", reductions=("points",)),), dtype="float32")
    kept = capture_batch(source, batch, plan).sites["decoder.cross"]
    for hook in hooks:
        hook.remove()
    height, width = batch.inputs.shape[-2:]
    for layer, args in enumerate(heard):
        locations, weights = (t.numpy() for t in args[4:6])  # (sample, query, head, level, point, 2), (x, y)
        turned = locations.transpose(0, 2, 1, 3, 4, 5)
        shape = (*turned.shape[:3], -1)
        found = kept.arrays["location"][:, layer]
        np.testing.assert_allclose(found[..., 1], (turned[..., 0] * width).reshape(shape), rtol=1e-5, atol=1e-3)
        np.testing.assert_allclose(found[..., 0], (turned[..., 1] * height).reshape(shape), rtol=1e-5, atol=1e-3)
        own = weights.transpose(0, 2, 1, 3, 4).reshape(shape)
        np.testing.assert_allclose(kept.arrays["weight"][:, layer], own, atol=1e-6)
        points = locations.shape[4]
        assert (kept.arrays["level"][:, layer] == np.arange(own.shape[-1]) // points).all()


def test_a_readout_row_is_that_samples_own_query() -> None:
    source, batch, kept = captured("RT-DETR", "readout")
    every = captured("RT-DETR", "all")[2]
    with torch.no_grad():
        outputs = source.forward(batch)
    query = source.readout(batch, outputs)["decoder.cross"].weights.argmax(-1).tolist()
    assert len(set(query)) > 1
    for sample, chosen in enumerate(query):
        for name in ("location", "weight", "level", "inside"):
            expected = every.arrays[name][sample, :, :, chosen]
            np.testing.assert_allclose(kept.arrays[name][sample, :, :, 0], expected, atol=1e-2, rtol=1e-4)


def test_batches_do_not_change_a_samples_points() -> None:
    source: Any = tiny("RT-DETRv2")
    samples = photos((64, 96), (80, 70))
    plan = CapturePlan((SitePlan("decoder.cross", rows=(1, 4), reductions=("points",)),), dtype="float32")
    together = capture_batch(source, source.encode(samples), plan).sites["decoder.cross"].arrays
    for number, sample in enumerate(samples):
        alone = capture_batch(source, source.encode([sample]), plan).sites["decoder.cross"].arrays
        np.testing.assert_allclose(together["weight"][number], alone["weight"][0], atol=1e-3)
        np.testing.assert_allclose(together["location"][number], alone["location"][0], atol=0.5)


def test_what_has_no_points_is_refused() -> None:
    with pytest.raises(UsageError, match="attends densely"):
        captured("RT-DETR", "all", "decoder.self")
    with pytest.raises(UsageError, match="no mean over heads"):
        captured("RT-DETR", "all", heads="mean")
    kept = captured("RT-DETR", "none", reductions=("points", "entropy"))[2]
    assert set(kept.arrays) == {"entropy"}
