"""Tiny detectors of every family that the DETR plugin opens, with attention that is not uniform."""

from __future__ import annotations

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
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "DetrForObjectDetection": ("detr", DENSE),
    "DetrForSegmentation": (
        "detr",
        DENSE | HEADS8 | {"architectures": ["DetrForSegmentation"], "backbone_config": PYRAMID},
    ),
    "ConditionalDetrForObjectDetection": ("conditional-detr", DENSE),
}
EDGES = (64, 128)  # shortest and longest edge of inputs


def tiny(name: str, *, seed: int = 0, sharpness: float = 3.0, **options: Any) -> AttentionSource:
    """A tiny random detector whose attention is peaked; ``sharpness`` scales its q and k weights."""
    family, config = CASES[name]
    source = open_source(family, weights="random", config=config, seed=seed, **options)
    sharpen(source.module, sharpness, seed)
    return source


@torch.no_grad()
def sharpen(module: nn.Module, factor: float, seed: int = 0) -> None:
    """Weights of fan-in scale, q and k ``factor`` times that, biases and class logits spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if value.dim() < 2:
            continue
        fan_in = value[0].numel()
        value.normal_(0.0, fan_in**-0.5, generator=generator)
        if any(
            word in name for word in ("q_proj", "k_proj", "q_content", "k_content", "q_pos", "k_pos", "in_proj")
        ):
            value.mul_(factor)
        if "class" in name or "bbox" in name:
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
