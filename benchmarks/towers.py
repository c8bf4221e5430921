"""The model under test: a CLIP vision tower with random weights whose attention is peaked.

The library's own initialisation attends uniformly to five digits, which flatters nothing in a timing but proves
nothing about exactness. Here q and k are drawn wide enough that rows concentrate (the table prints the median
row entropy over ln K). Weights, pixels and target are frozen; gradients flow to the pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from foveate.interfaces import AttentionSource, Batch, BoundTarget, Sample, Target
from foveate.plugins.opening import open_source

SPREAD = {"q_proj": 1.9, "k_proj": 1.9, "v_proj": 1.0, "out_proj": 1.0, "fc1": 1.0, "fc2": 1.0}
"""Standard deviation of each matrix times sqrt(fan-in)."""


@dataclass(frozen=True, eq=False)
class Tower:
    """A source, a batch of random photos and a frozen target for each of them."""

    case: Case
    source: AttentionSource
    batch: Batch
    bound: BoundTarget

    @property
    def model(self) -> nn.Module:
        """The model of transformers."""
        return self.source.module

    @property
    def site(self) -> str:
        """Its only site."""
        return self.source.sites[0].id

    @contextmanager
    def eager(self) -> Iterator[Any]:
        """The same weights with the library's eager attention, which alone returns attention matrices."""
        model: Any = self.model
        model.set_attn_implementation("eager")
        try:
            yield model
        finally:
            model.set_attn_implementation("sdpa")


def build(case: Case) -> Tower:
    """A tower, its photos and its targets; the same for the same case."""
    size = case.size
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "patch_size": size.patch,
        "image_size": case.pixels,
    }
    source = open_source("clip", weights="random", config=config)
    source.module.requires_grad_(False)
    sharpen(source.module)
    photos = np.random.default_rng(0).integers(0, 256, (case.batch, case.pixels, case.pixels, 3), dtype=np.uint8)
    batch = source.encode([Sample(id=str(i), pixels=photo) for i, photo in enumerate(photos)])
    with torch.no_grad():
        bound = source.bind(source.forward(batch), batch, Target(scale="value"))
    return Tower(case, source, batch, bound)


@torch.no_grad()
def sharpen(module: nn.Module, seed: int = 0) -> None:
    """Fan-in scaled normal weights, wider for q and k; embeddings of the size that trained ones have."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.named_parameters():
        part = name.split(".")[-2] if "." in name else ""
        if name.endswith("weight") and part in SPREAD:
            value.normal_(0.0, SPREAD[part] * value.shape[1] ** -0.5, generator=generator)
        elif "position_embedding" in name:
            value.normal_(0.0, 0.5, generator=generator)
        elif "patch_embedding" in name or "class_embedding" in name:
            value.normal_(0.0, 0.04, generator=generator)


def peakedness(attention: Tensor) -> float:
    """Median row entropy over ln K of ``(..., query, key)``: 1 is uniform."""
    entropy = torch.special.entr(attention.double()).sum(-1)
    return float(entropy.median()) / float(np.log(attention.shape[-1]))
