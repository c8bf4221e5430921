"""Tiny video transformers of transformers with attention that is not uniform, and clips for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from foveate.interfaces import AttentionSource, Sample
from foveate.plugins.opening import open_source

SHAPE = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
SIZE = {"image_size": 32, "patch_size": 8, "num_frames": 4}
JEPA = {
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "mlp_ratio": 1.5,
    "crop_size": 32,
    "patch_size": 8,
    "frames_per_clip": 4,
    "num_pooler_layers": 2,
    "pred_hidden_size": 24,
    "pred_num_attention_heads": 2,
    "pred_num_hidden_layers": 1,
}


def _class(name: str) -> dict[str, Any]:
    return {"architectures": [name], "num_labels": 5}


DIVIDED = SHAPE | SIZE | _class("TimesformerForVideoClassification")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "VideoMAEModel": ("videomae", SHAPE | SIZE),
    "VideoMAEForVideoClassification": ("videomae", SHAPE | SIZE | _class("VideoMAEForVideoClassification")),
    "VideoMAE, first token": (
        "videomae",
        SHAPE | SIZE | _class("VideoMAEForVideoClassification") | {"use_mean_pooling": False},
    ),
    "VivitModel": ("vivit", SHAPE | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}),
    "VivitForVideoClassification": (
        "vivit",
        SHAPE
        | {"image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}
        | _class("VivitForVideoClassification"),
    ),
    "VJEPA2Model": ("vjepa2", JEPA),
    "VJEPA2ForVideoClassification": ("vjepa2", JEPA | _class("VJEPA2ForVideoClassification")),
    "TimesformerModel": ("timesformer", SHAPE | SIZE),
    "TimesformerForVideoClassification": ("timesformer", DIVIDED),
    "TimeSformer, joint": ("timesformer", DIVIDED | {"attention_type": "joint_space_time"}),
}

VIDEOMT = {
    "hidden_size": 36,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "mlp_ratio": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_blocks": 2,
    "num_queries": 5,
    "num_register_tokens": 2,
    "num_upscale_blocks": 1,
    "num_labels": 4,
}


def open_videomt(*, seed: int = 0, config: dict[str, Any] | None = None, **options: Any) -> AttentionSource:
    """A sharpened tiny VidEoMT whose every track is an answer."""
    given = {"threshold": 0.0, **options}
    source = open_source("videomt", weights="random", config=VIDEOMT | (config or {}), **given)
    sharpen(source.module, seed)
    return source


SAM2: dict[str, Any] = {
    "vision_config": {
        "model_type": "sam2_vision_model",
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            "hidden_size": 8,
            "image_size": [64, 64],
            "blocks_per_stage": [1, 1, 2, 1],
            "embed_dim_per_stage": [8, 16, 32, 64],
            "num_attention_heads_per_stage": [1, 1, 2, 2],
            "window_size_per_stage": [8, 4, 4, 2],
            "global_attention_blocks": [3],
            "window_positional_embedding_background_size": [4, 4],
            "mlp_ratio": 2.0,
        },
        "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 128,
    },
    "prompt_encoder_config": {"hidden_size": 128, "image_size": 64, "mask_input_channels": 8},
    "mask_decoder_config": {
        "hidden_size": 128,
        "mlp_dim": 64,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    },
    "image_size": 64,
    "num_maskmem": 3,
    "max_object_pointers_in_encoder": 4,
    "memory_attention_hidden_size": 128,
    "memory_attention_num_layers": 2,
    "memory_attention_feed_forward_hidden_size": 64,
    "memory_attention_rope_feat_sizes": [4, 4],
    "memory_encoder_hidden_size": 128,
    "mask_downsampler_embed_dim": 128,
    "memory_fuser_embed_dim": 128,
    "memory_fuser_intermediate_dim": 64,
}


def open_sam2(*, seed: int = 0, **options: Any) -> AttentionSource:
    """A tiny SAM 2 with sharpened memory attention that always sees its object."""
    source = open_source("sam2-video", weights="random", config=SAM2, seed=seed, **options)
    sharpen(source.module, seed, factor=2.5)
    with torch.no_grad():
        source.module.get_parameter("mask_decoder.pred_obj_score_head.proj_out.bias").fill_(8.0)
    return source


def open_tiny(case: str, *, seed: int = 0, **options: Any) -> AttentionSource:
    """One case with sharpened weights."""
    family, config = CASES[case]
    source = open_source(family, weights="random", config=config, **options)
    sharpen(source.module, seed)
    return source


@torch.no_grad()
def sharpen(module: nn.Module, seed: int = 0, factor: float = 2.0) -> None:
    """Fan-in scaled normal weights, q and k times ``factor``, tokens and positions of unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if "norm" in name or "lambda" in name:
            continue
        place = any(part in name for part in ("position", "token", "time_embeddings", "query.weight"))
        if value.dim() > 1:
            scale = 1.0 if place and "linear" not in name and value.shape[0] != value.shape[-1] else 0.0
            fan_in = value[0].numel() ** -0.5
            value.normal_(0.0, scale or fan_in, generator=generator)
        if name.endswith(("q_proj.weight", "k_proj.weight", "query.weight", "key.weight")):
            value.mul_(factor)
        if name.endswith("qkv.weight"):
            value[: 2 * value.shape[0] // 3] *= factor


def clips(count: int = 3, *, seed: int = 0, frames: int = 7) -> list[Sample]:
    """Noise with a bright block that moves; each clip of another size and length."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        length = frames + 2 * i
        pixels = random.integers(0, 256, (length, 40 + 7 * i, 50 - 3 * i, 3), dtype=np.uint8)
        for t in range(length):
            pixels[t, 5 : 20 + i, 2 * t : 2 * t + 12] = [250, 40 * i, 5]
        found.append(Sample(id=f"clip-{i}", pixels=pixels, times=np.arange(length) / 25))
    return found
