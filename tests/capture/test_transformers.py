"""transformers' own models on their fast attention, against their own eager matrices.

Tiny random configurations with sharpened q and k: random attention is uniform to five digits and would make
every comparison true. Each eager map must be one of the tap's records, in order, and the records must
certify themselves; what eager does not return (SigLIP's pooling head, deformable points) is certified too.
"""

import math

import pytest
import torch

from foveate.capture.certificate import check_record
from foveate.capture.tap import Tap
from foveate.testing.oracles import entropy_rows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION = {**SMALL, "image_size": 32, "patch_size": 8}


def pixels(size=32, channels=3):
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def vision(name, **options):
    config = getattr(transformers, f"{name}Config")(**{**VISION, **options})
    return getattr(transformers, f"{name}Model"), config, {"pixel_values": pixels()}


def text():
    config = transformers.CLIPTextConfig(**SMALL, vocab_size=50, max_position_embeddings=12)
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    padding = torch.ones_like(ids)
    padding[1, 6:] = 0
    return transformers.CLIPTextModel, config, {"input_ids": ids, "attention_mask": padding}


def swin():
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4, num_channels=3
    )
    return transformers.SwinModel, config, {"pixel_values": pixels()}


def detr():
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
    )
    padding = torch.ones(2, 64, 64, dtype=torch.long)
    padding[1, :, 40:] = 0
    return transformers.DetrModel, config, {"pixel_values": pixels(64), "pixel_mask": padding}


MODELS = {
    "clip vision": lambda: vision("CLIPVision"),
    "clip text": text,
    "siglip vision": lambda: vision("SiglipVision"),
    "vit": lambda: vision("ViT"),
    "deit": lambda: vision("DeiT"),
    "beit": lambda: vision("Beit", use_relative_position_bias=True),
    "dinov2": lambda: vision("Dinov2"),
    "dinov2 with registers": lambda: vision("Dinov2WithRegisters"),
    "dinov3": lambda: vision("DINOv3ViT", num_register_tokens=2),
    "swin": swin,
    "detr": detr,
}


def build(kind, config, attention=None):
    torch.manual_seed(0)
    sharpness = 4.5 if "Detr" in kind.__name__ else 2.2  # its backbone's features are small
    model = kind(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() == 2 and any(part in name for part in ("q_proj.", "k_proj.", "query.", "key.")):
                value.normal_(0, sharpness * value.shape[1] ** -0.5)
    if attention:
        model.set_attn_implementation(attention)
    return model


def matrices(outputs):
    names = ("attentions", "encoder_attentions", "decoder_attentions", "cross_attentions")
    return [a for name in names for a in (getattr(outputs, name, None) or ())]


@pytest.mark.parametrize("name", MODELS)
def test_fast_attention_equals_the_eager_matrices(name):
    kind, config, inputs = MODELS[name]()
    model, eager = build(kind, config), build(kind, config, "eager")
    with torch.no_grad():
        plain = model(**inputs)
        with Tap(model) as tap:
            tapped = model(**inputs)
        expected = matrices(eager(**inputs, output_attentions=True))
    assert torch.equal(plain.last_hidden_state, tapped.last_hidden_state)
    assert expected
    rows = [record.rows(slice(None)) for record in tap.records]
    keys = rows[0].shape[-1]
    assert torch.cat([entropy_rows(r[r.sum(-1) > 0]) for r in rows[:1]]).median() < 0.6 * math.log(keys)
    for truth in expected:
        distances = sorted((r - truth).abs().max().item() for r in rows if r.shape == truth.shape)
        assert distances[0] < 1e-5
        assert len(distances) == 1 or distances[1] > 1e-3
    for record in tap.records:
        check = check_record(record)
        assert check.value_error < 1e-5
        assert check.row_error < 1e-5


def test_siglips_pooling_head_is_seen_although_eager_does_not_return_it():
    kind, config, inputs = MODELS["siglip vision"]()
    model = build(kind, config)
    with torch.no_grad(), Tap(model) as tap:
        model(**inputs)
    pool = tap.records[-1]
    assert pool.name.endswith("head.attention")
    assert pool.shape == (2, 4, 1, 16)
    assert check_record(pool).value_error < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_low_precision_models_keep_exact_weights(dtype):
    kind, config, inputs = MODELS["clip vision"]()
    model = build(kind, config).to(dtype)
    with torch.no_grad(), Tap(model) as tap:
        model(pixel_values=inputs["pixel_values"].to(dtype))
    for record in tap.records:
        assert (record.rows(slice(None)).sum(-1) - 1).abs().max() < 1e-5
        assert check_record(record).value_error < 2e-2


def test_deformable_detr_is_a_dense_matrix():
    backbone = transformers.ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage1", "stage2"],
    )
    config = transformers.DeformableDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        num_feature_levels=2,
    )
    model = build(transformers.DeformableDetrModel, config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                value.normal_(0, 0.3)
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, 40:] = 0
    with torch.no_grad():
        plain = model(pixel_values=pixels(64), pixel_mask=mask).last_hidden_state
        with Tap(model) as tap:
            tapped = model(pixel_values=pixels(64), pixel_mask=mask).last_hidden_state
    assert torch.equal(plain, tapped)
    deformable = [record for record in tap.records if record.form == "deformable"]
    assert len(deformable) == 4
    assert len(tap.records) == 6
    for record in tap.records:
        assert check_record(record).value_error < 1e-5
    mass = torch.cat([record.rows([0, 3]).sum(-1).flatten() for record in deformable])
    assert mass.min() < 0.99
    assert mass.max() < 1 + 1e-5
