"""Attention inside backbones: windows are where the labels say, and rows are the blocks' own, by definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.capture.intervening import intervene
from foveate.capture.interventions import Knockout
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey, CapturePlan, SitePlan, TokenAxis
from foveate_detr.windows import window_cells

SWINS = ("Mask2Former", "MaskFormer", "OneFormer", "Grounding DINO")
SWIN: dict[str, Any] = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [2, 2, 2, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}


def opened(name: str, **options: Any) -> tuple[Any, Any]:
    source: Any = _with_swin() if name == "Mask2Former" else tiny(name, backbone=True, **options)
    return source, source.encode(photos((64, 96), (80, 70)))


def _with_swin() -> Any:
    """Mask2Former over a Swin with shifted windows whose grid (of a 160 x 160 canvas) is no multiple of the
    window."""
    from detr_models import MASKED, sharpen
    from foveate.plugins.opening import open_source

    config = MASKED | {"backbone_config": SWIN}
    source = open_source("mask2former", weights="random", config=config, image_size=(160, 96), backbone=True)
    sharpen(source.module, 4.0)
    return source


def blocks(source: Any) -> dict[int, Any]:
    """Swin's blocks by their number through all stages."""
    found = [m for m in source.module.modules() if type(m).__name__.endswith("SwinLayer")]
    return dict(enumerate(found))


def heard(source: Any, batch: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Of each block: the grid it was given, after its norm, and the windows and the mask that its attention
    got."""
    grids: dict[int, Any] = {}
    windows: dict[int, Any] = {}
    hooks = []
    for number, block in blocks(source).items():
        hooks.append(block.layernorm_before.register_forward_hook(
            lambda _m, _a, out, n=number: grids.__setitem__(n, out)))  # fmt: skip
        hooks.append(block.attention.register_forward_pre_hook(
            lambda _m, args, n=number: windows.__setitem__(n, args)))  # fmt: skip
    try:
        with torch.no_grad():
            source.forward(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {n: (grids[n], windows[n][0], windows[n][1] if len(windows[n]) > 1 else None) for n in grids}


def test_tokens_of_swins_windows_are_the_cells_that_are_said() -> None:
    source, batch = opened("Mask2Former")
    height, width = batch.inputs.shape[-2:]
    sites = {layer: site for site in source.sites if site.id.startswith("backbone") for layer in site.layers}
    padded = shifted = 0
    for number, (grid, windows, _) in heard(source, batch).items():
        stage = int(sites[number].id[-1]) - 1
        rows, columns = height // 4 // 2**stage, width // 4 // 2**stage
        assert rows * columns == grid.shape[1]
        cells = window_cells(rows, columns, 4, blocks(source)[number].shift_size)
        shifted += blocks(source)[number].shift_size > 0
        padded += int((cells < 0).sum())
        by_cell = torch.cat([grid, torch.zeros_like(grid[:, :1])], 1)  # -1, the last, is padding
        expected = by_cell[:, torch.from_numpy(cells)].flatten(0, 1)
        assert torch.equal(windows, expected)
    assert padded > 0
    assert shifted == 3


def test_rows_of_swin_are_softmax_of_scores_bias_and_shift_mask() -> None:
    """Liu et al. 2021, eq. 4, in float64, from the windows that each block's attention was given."""
    source, batch = opened("Mask2Former")
    with torch.no_grad():
        found = trace(source, batch)
        given = heard(source, batch)
        for site in source.sites:
            for layer in site.layers if site.id.startswith("backbone") else ():
                attention = blocks(source)[layer].attention
                _, windows, mask = given[layer]
                heads = attention.num_attention_heads
                q, k = (
                    p(windows).double().unflatten(-1, (heads, -1)).transpose(1, 2)
                    for p in (attention.q_proj, attention.k_proj)
                )
                scores = torch.einsum("whid,whjd->whij", q, k) / q.shape[-1] ** 0.5
                scores = scores + attention.relative_position_bias().double()
                if mask is not None:
                    scores = scores + mask.double().repeat(len(batch), 1, 1)[:, None]
                rows = found.records[CallKey(site.id, layer)].rows(slice(None))
                assert float((rows - scores.softmax(-1)).abs().max()) < 2e-5
    assert found.certificate.passed


@pytest.mark.parametrize("name", [*SWINS, "RF-DETR"])
def test_everything_in_the_backbone_is_claimed_and_outputs_are_the_same(name: str) -> None:
    source, batch = opened(name)
    result = certify(source, batch)
    assert result.passed, result.failures
    inside = [site for site in source.sites if site.id.startswith("backbone")]
    assert inside
    assert not [row for row in result.census if row.claim.startswith("ignored") and "backbone" in row.owner]
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in inside), dtype="float32")
    kept = capture_batch(source, batch, plan).sites
    for site in inside:
        attention = kept[site.id].arrays["attention"]
        assert attention.shape[0] == len(batch)
        assert attention.ndim == 5 + len(site.group)
        np.testing.assert_allclose(attention.sum(-1), 1.0, atol=1e-5)
        assert (kept[site.id].arrays["entropy"] < np.log(attention.shape[-1])).all()


def test_rf_detrs_windows_are_tiles_of_the_picture() -> None:
    source, batch = opened("RF-DETR")
    embeddings = next(m for m in source.module.modules() if hasattr(m, "window_partition"))
    tokens = torch.arange(1 + 36).float()[None, :, None].repeat(2, 1, 1)  # 0 is the class token
    tokens[1] += 100
    cut = embeddings.window_partition(tokens, 96, 96)[..., 0]
    cells = torch.from_numpy(window_cells(6, 6, 3))
    for sample in range(2):
        ours = torch.cat([torch.zeros(4, 1), cells + 1], 1) + 100 * sample
        assert torch.equal(cut[4 * sample : 4 * sample + 4, 1:], ours[:, 1:])
    with torch.no_grad():
        found = trace(source, batch)
    window = found.labels(CallKey("backbone.window", 0))
    whole = found.labels(CallKey("backbone.self", 3)).key
    assert window.leading == (("sample", 2), ("window", 4))
    expected = TokenAxis.patches(6, 6, height=96.0, width=96.0)
    patches = whole.where("patch")
    np.testing.assert_array_equal(whole.y[patches], expected.y[cells.flatten().numpy()])
    np.testing.assert_array_equal(whole.x[patches], expected.x[cells.flatten().numpy()])
    np.testing.assert_array_equal(window.key.y[1:], whole.y[1:10])
    assert whole.where("cls").tolist() == [0, 10, 20, 30]


def test_windows_are_changed_like_other_sites() -> None:
    source, batch = opened("RF-DETR")
    with torch.no_grad():
        plain = source.forward(batch).logits
        with intervene(source, [Knockout("backbone.window", layers=1, key="cls", query="patch")], on=batch):
            changed = trace(source, batch)
    rows = changed.records[CallKey("backbone.window", 1)].rows(slice(None))
    assert float(rows[:, :, 1:, 0].abs().max()) == 0
    assert (changed.outputs.logits - plain).abs().max() > 1e-5
    assert changed.certificate.passed


def test_only_where_it_is_asked_for_and_known() -> None:
    plain: Any = tiny("RF-DETR")
    assert not [site for site in plain.sites if site.id.startswith("backbone")]
    with pytest.raises(UsageError, match="no attention that is known"):
        tiny("DETR", backbone=True)
    source, batch = opened("RF-DETR")
    from dataclasses import replace

    wide = replace(batch, inputs=batch.inputs[..., :64])
    with pytest.raises(CaptureError, match="not tiles of the picture"):
        source.label(CallKey("backbone.window", 0), wide, None)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (5, 7), (3, 9)])
def test_window_cells_cell_by_cell(rows: int, columns: int, shift: int) -> None:
    window = 4
    tall, wide = -(-rows // window), -(-columns // window)
    found = window_cells(rows, columns, window, shift)
    assert found.shape == (tall * wide, window * window)
    for index, tile in enumerate(found):
        for token, cell in enumerate(tile):
            y = (index // wide * window + token // window + shift) % (tall * window)
            x = (index % wide * window + token % window + shift) % (wide * window)
            assert cell == (y * columns + x if y < rows and x < columns else -1)
    assert sorted(found[found >= 0].tolist()) == list(range(rows * columns))
