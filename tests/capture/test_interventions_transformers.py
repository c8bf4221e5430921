"""Interventions on transformers' models: its SDPA and its eager code, changed alike, give the same answer."""

import pytest
import torch

from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout, Replace, ScaleAttention
from foveate.capture.tap import Tap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CHANGES = [
    lambda site: Knockout(site, [0, 2], query="at:0", key="!at:0"),
    lambda site: AblateHeads(site, 1, 2),
    lambda site: AblateHeads(site, 2, 0, to="mean"),
    lambda site: Replace(site, 1, 3, by="shuffled"),
    lambda site: Replace(site, 0, by="uniform"),
    lambda site: ScaleAttention(site, key="at:3-8", factor=0.2),
]


def opened(name, implementation):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**VISION, attn_implementation=implementation)
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            if path.endswith(".weight") and path.split(".")[-2] in {"q_proj", "k_proj", "query", "key"}:
                value.copy_(1.2 * torch.randn(value.shape))
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("name", "site"), [("CLIPVision", "encoder.layers.*.self_attn"), ("ViT", "layers.*.attention")]
)
def test_sdpa_and_eager_agree_under_every_change(name, site, change):
    outputs, rows = [], []
    for implementation in ("sdpa", "eager"):
        model = opened(name, implementation)
        with torch.no_grad():
            plain = model(PIXELS).last_hidden_state
            with intervene(model, [change(site)]), Tap(model) as tap:
                outputs.append(model(PIXELS).last_hidden_state)
        rows.append([record.rows(slice(None)) for record in tap.records])
        assert all(record.certificate(slice(None)).value_error < 1e-5 for record in tap.records)
        assert (outputs[-1] - plain).abs().max() > 1e-3
    torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)
    for one, other in zip(*rows, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_shifted_windows():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = transformers.SwinModel(config).eval()
    change = Knockout("encoder.layers.0.blocks.*.attention", key="at:0-2")
    with torch.no_grad(), intervene(model, [change]), Tap(model) as tap:
        model(PIXELS)
    for record in tap.records:
        rows = record.rows(slice(None))
        assert (rows[..., :3] == 0).all()
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:-1]))
        assert record.certificate(slice(None)).value_error < 1e-5


def test_a_compiled_model_runs_eagerly_while_it_is_changed():
    model = opened("CLIPVision", "sdpa")
    change = Knockout("encoder.layers.*.self_attn", query="at:0", key="!at:0")
    with torch.no_grad(), intervene(model, [change]):
        expected = model(PIXELS).last_hidden_state
    model.compile(backend="eager")
    with torch.no_grad():
        model(PIXELS)
        with intervene(model, [change]):
            changed = model(PIXELS).last_hidden_state
    assert torch.equal(changed, expected)
