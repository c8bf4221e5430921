"""Tiny transformers of every family the ViT plugin opens, with attention that is not uniform.

Weights are drawn with fan-in scale and q, k are multiplied, because the library's own initialisation
attends uniformly to five digits, where any two attention maps agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from foveate.interfaces import AttentionSource, Sample
from foveate.plugins.opening import open_source

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 54,
    "max_position_embeddings": 16,
    "bos_token_id": 52,
    "eos_token_id": 53,
    "pad_token_id": 53,
}
DINO = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
NAFLEX = {key: value for key, value in SHAPE.items() if key != "image_size"} | {"num_patches": 16}


def _class(name: str) -> dict[str, Any]:
    return {"architectures": [name], "num_labels": 5}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViTModel": ("vit", SHAPE),
    "ViTForImageClassification": ("vit", SHAPE | _class("ViTForImageClassification")),
    "DeiTModel": ("deit", SHAPE),
    "DeiTForImageClassification": ("deit", SHAPE | _class("DeiTForImageClassification")),
    "DeiTForImageClassificationWithTeacher": ("deit", SHAPE | _class("DeiTForImageClassificationWithTeacher")),
    "Dinov2Model": ("dinov2", DINO),
    "Dinov2ForImageClassification": ("dinov2", DINO | _class("Dinov2ForImageClassification")),
    "Dinov2WithRegistersModel": ("dinov2-registers", DINO | {"num_register_tokens": 3}),
    "Dinov2WithRegistersForImageClassification": (
        "dinov2-registers",
        DINO | {"num_register_tokens": 3} | _class("Dinov2WithRegistersForImageClassification"),
    ),
    "DINOv3ViTModel": ("dinov3", SHAPE | {"num_register_tokens": 2}),
    "CLIPVisionModel": ("clip", SHAPE | {"model_type": "clip_vision_model"}),
    "CLIPModel": ("clip", {"vision_config": SHAPE, "text_config": TEXT}),
    "CLIPForImageClassification": (
        "clip",
        {"vision_config": SHAPE, "text_config": TEXT} | _class("CLIPForImageClassification"),
    ),
    "SiglipVisionModel": ("siglip", SHAPE | {"model_type": "siglip_vision_model"}),
    "SiglipModel": ("siglip", {"vision_config": SHAPE, "text_config": TEXT}),
    "SiglipForImageClassification": (
        "siglip",
        {"vision_config": SHAPE, "text_config": TEXT} | _class("SiglipForImageClassification"),
    ),
    "Siglip2Model": ("siglip2-naflex", {"vision_config": NAFLEX, "text_config": TEXT}),
}
CLASSIFIERS = [name for name in CASES if "ForImageClassification" in name]
ENCODERS = [name for name in CASES if name not in CLASSIFIERS]


def open_tiny(case: str, *, seed: int = 0, **options: Any) -> AttentionSource:
    """One case with sharpened weights."""
    family, config = CASES[case]
    source = open_source(family, weights="random", config=config, **options)
    sharpen(source.module, seed)
    return source


NETWORK = {"input_dim": 3, "dim": 32, "depth": 2, "expansion": 2, "cond_dim": 32}


def open_plonk(**options: Any) -> Any:
    """PLONK's two parts with random, sharpened weights, and few steps."""
    options = {"samples": 5, "steps": 8, "likelihood_steps": 6, "backend": "direct", **options}
    config = SHAPE | {"model_type": "clip_vision_model"}
    source = open_source("plonk", weights="random", config=config, network_config=NETWORK, **options)
    sharpen(source.module)
    return source


@torch.no_grad()
def sharpen(module: nn.Module, seed: int = 0, factor: float = 1.7) -> None:
    """Fan-in scaled normal weights; q and k times ``factor``; tokens and positions of unit size."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        if "logit" in name or "norm" in name or name.endswith("lambda1"):
            continue
        if value.dim() > 1:
            place = any(part in name for part in ("position", "token", "probe", "class_embedding"))
            scale = 1.0 if place else value[0].numel() ** -0.5
            value.normal_(0.0, scale, generator=generator)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value.mul_(factor)
        if name.endswith("in_proj_weight"):
            value[: 2 * value.shape[1]] *= factor


def photos(count: int = 3, *, seed: int = 0, height: int = 40, width: int = 60) -> list[Sample]:
    """Noise with one bright block, each of another size."""
    random = np.random.default_rng(seed)
    found = []
    for i in range(count):
        pixels = random.integers(0, 256, (height + 7 * i, width + 5 * i, 3), dtype=np.uint8)
        pixels[5 * i : 5 * i + 20, 10:30] = [250, 40 * i, 5]
        found.append(Sample(id=f"photo-{i}", pixels=pixels, columns={"text": "a cat on a mat"[: 5 + 3 * i]}))
    return found


def toy_tokenizer() -> Any:
    """A CLIP tokenizer that knows letters: ids 0-51, start 52, end 53."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
