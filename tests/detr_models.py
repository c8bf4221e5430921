"""Tiny detectors of every family that the DETR plugin opens, with attention that is not uniform."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from foveate.interfaces import AttentionSource, Sample
from foveate.plugins.opening import open_source

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage4"],
}
DENSE = {
    "backbone_config": RESNET,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 7,
    "num_labels": 3,
}
PYRAMID = RESNET | {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
HEADS8 = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
LEVELS3 = RESNET | {"out_features": ["stage2", "stage3", "stage4"]}
DEFORMABLE = DENSE | {"backbone_config": LEVELS3, "num_feature_levels": 4}
HYBRID = {
    "backbone_config": LEVELS3 | {"model_type": "rt_detr_resnet"},
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [12, 16, 24],
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 4,
    "d_model": 32,
    "num_queries": 7,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "num_labels": 3,
    "num_denoising": 0,
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "hidden_sizes": [8, 12, 16, 24],
    "depths": [1, 1, 1, 1],
    "stage_in_channels": [8, 8, 12, 16],
    "stage_mid_channels": [4, 4, 6, 8],
    "stage_out_channels": [8, 12, 16, 24],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
RF = {
    "num_queries": 7,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "decoder_ffn_dim": 32,
    "num_labels": 3,
    "group_detr": 1,
    "backbone_config": {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": 96,
        "patch_size": 16,
        "num_windows": 2,
        "out_features": ["stage2", "stage4"],
        "window_block_indexes": [0, 1, 2],
    },
}
DFINE = HYBRID | {"backbone_config": HGNET, "decoder_n_points": [3, 6, 3], "num_feature_levels": 3}
TWO_STAGE = {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 7}
SWIN = {
    "model_type": "swin",
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 2, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
MASKED = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 6,
    "num_attention_heads": 4,
    "dim_feedforward": 32,
    "num_queries": 7,
    "num_labels": 3,
}
MASKFORMER = {
    "backbone_config": SWIN,
    "decoder_config": {
        "model_type": "detr",
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "num_queries": 7,
    },
    "fpn_feature_size": 32,
    "mask_feature_size": 32,
    "num_labels": 3,
}
ONEFORMER = MASKED | {
    "backbone_config": SWIN,
    "mask_dim": 32,
    "conv_dim": 32,
    "decoder_layers": 4,
    "text_encoder_width": 32,
    "text_encoder_num_layers": 1,
    "text_encoder_vocab_size": 60,
    "text_encoder_context_length": 12,
    "max_seq_len": 12,
    "task_seq_len": 12,
    "text_encoder_proj_layers": 1,
    "text_encoder_n_ctx": 4,
    "query_dec_layers": 2,
    "is_training": False,
}
EOMT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "num_blocks": 2,
    "num_queries": 7,
    "num_labels": 3,
    "num_upscale_blocks": 1,
    "num_register_tokens": 1,
}
YOLOS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "image_size": [64, 96],
    "patch_size": 16,
    "num_detection_tokens": 7,
    "num_labels": 3,
}
GROUNDED = DEFORMABLE | {
    "backbone_config": SWIN | {"out_features": ["stage2", "stage3", "stage4"]},
    "text_config": {
        "model_type": "bert",
        "vocab_size": 1100,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    },
    "max_text_len": 16,
}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
OWL = {
    "vision_config": TOWER | {"image_size": 96, "patch_size": 16},
    "text_config": TOWER | {"vocab_size": 60, "max_position_embeddings": 8},
    "projection_dim": 32,
}
PROMPTS = {"prompts": ["a cat", "a dog", "a grey bird"]}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DETR": ("detr", DENSE),
    "DETR segmentation": (
        "detr",
        DENSE | HEADS8 | {"architectures": ["DetrForSegmentation"], "backbone_config": PYRAMID},
    ),
    "Conditional DETR": ("conditional-detr", DENSE),
    "DAB-DETR": ("dab-detr", DENSE | {"hidden_size": 32}),
    "Table Transformer": ("table-transformer", DENSE),
    "Deformable DETR": ("deformable-detr", DEFORMABLE),
    "Deformable DETR, two stages": ("deformable-detr", DEFORMABLE | TWO_STAGE),
    "Deformable DETR, one level": ("deformable-detr", DENSE | {"num_feature_levels": 1}),
    "RT-DETR": ("rt-detr", HYBRID),
    "RT-DETRv2": ("rt-detr-v2", HYBRID),
    "RT-DETRv2, discrete": ("rt-detr-v2", HYBRID | {"decoder_method": "discrete"}),
    "D-FINE": ("d-fine", DFINE),
    "D-FINE, discrete": ("d-fine", DFINE | {"decoder_method": "discrete"}),
    "RF-DETR": ("rf-detr", RF),
    "MaskFormer": ("maskformer", MASKFORMER),
    "Mask2Former": ("mask2former", MASKED | {"backbone_config": PYRAMID}),
    "OneFormer": ("oneformer", ONEFORMER),
    "EoMT": ("eomt", EOMT),
    "YOLOS": ("yolos", YOLOS),
    "Grounding DINO": ("grounding-dino", GROUNDED),
    "OWLv2": ("owlv2", OWL),
}
"""Name -> (family, configuration)."""
FIXED: dict[str, Any] = {
    "RT-DETR": {"image_size": (96, 128)},
    "RT-DETRv2": {"image_size": (96, 128)},
    "RT-DETRv2, discrete": {"image_size": (96, 128)},
    "D-FINE": {"image_size": (96, 128)},
    "D-FINE, discrete": {"image_size": (96, 128)},
    "RF-DETR": {"image_size": (96, 96)},
    "EoMT": {},
    "YOLOS": {"image_size": (64, 96)},
    "OWLv2": {},
}
"""Models that resize every image to one size."""
OPTIONS: dict[str, Any] = {
    "OneFormer": {"task_inputs": [5, 9, 2, 7, 0, 0, 0, 0, 0, 0, 0, 0]},
    "Grounding DINO": PROMPTS | {"prompt_ids": [[7, 8], [7, 9], [7, 11, 12]]},
    "OWLv2": PROMPTS | {"prompt_ids": [[1, 5, 9], [1, 6, 9], [1, 7, 8, 9]]},
}
EDGES = (64, 128)
"""Shortest and longest edge of the other models' inputs."""


def tiny(name: str, *, seed: int = 0, sharpness: float = 4.0, **options: Any) -> AttentionSource:
    """A tiny random detector whose attention is peaked; ``sharpness`` scales its q and k weights."""
    family, config = CASES[name]
    given = {**FIXED.get(name, {}), **OPTIONS.get(name, {}), **options}
    source = open_source(family, weights="random", config=config, seed=seed, **given)
    sharpen(source.module, sharpness, seed)
    if name not in FIXED:
        one = replace(source.recipe.recipe, edge=EDGES[0], longest=EDGES[1])
        source.recipe = replace(source.recipe, recipe=one)
    return source


SHARPENED = (
    *("q_proj", "k_proj", "q_content", "k_content", "q_pos", "k_pos", "in_proj", "attention_weights"),
    *("query.weight", "key.weight", "query_content", "key_content", "query_pos", "key_pos"),
)


@torch.no_grad()
def sharpen(module: nn.Module, factor: float, seed: int = 0) -> None:
    """Weights of fan-in scale, q and k ``factor`` times that, class logits spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if value.dim() < 2:
            continue
        fan_in = value[0].numel() if value.dim() in (2, 4) else value.shape[-1]  # (1, token, channel): embeddings
        value.normal_(0.0, fan_in**-0.5, generator=generator)
        if any(word in name for word in SHARPENED):
            value.mul_(factor)
        if "class" in name:
            value.mul_(2.0)


def photos(*shapes: tuple[int, int], seed: int = 0) -> list[Sample]:
    """Smooth random pictures of (height, width), without any flat area."""
    random = np.random.default_rng(seed)
    made = []
    for i, (height, width) in enumerate(shapes):
        y, x = np.mgrid[0:height, 0:width]
        waves = random.normal(size=(3, 6, 3))
        planes = [
            sum(a * np.sin(b * y / 9 + c * x / 7) for a, b, c in waves[k]) + random.normal(0, 0.3, (height, width))
            for k in range(3)
        ]
        stacked = np.stack(planes, -1)
        spread = (stacked - stacked.min()) / (stacked.max() - stacked.min())
        made.append(Sample(f"photo-{i}", (spread * 255).astype(np.uint8)))
    return made
