"""Other tools that return attention, where they are installed; on the same tower where they can, else on one of
the same size (ViT-B/16 and CLIP ViT-B/16 do the same work). Each keeps what it would keep by default.

None of them is a dependency. ``missing`` says why one is left out.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.methods import METHODS, Method
from benchmarks.towers import Tower

Run = Callable[[Tower], object]


def _torchlens(tower: Tower) -> object:
    import torchlens

    with torch.no_grad():
        return torchlens.trace(tower.model, tower.batch.inputs)


def _nnsight(tower: Tower) -> object:
    from nnsight import NNsight

    kept = []
    with torch.no_grad(), tower.eager() as model:
        wrapped: Any = NNsight(model)
        with wrapped.trace(tower.batch.inputs):
            for number in range(tower.case.size.layers):
                kept.append(wrapped.encoder.layers[number].self_attn.output[1].save())
    return kept


@cache
def _bridge(case: Case) -> Any:
    """TransformerLens around a random ViT: it has no adapter for CLIP, and reads configurations from a folder."""
    import transformers
    from transformer_lens import TransformerBridge

    size = case.size
    config = transformers.ViTConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        patch_size=size.patch,
        image_size=case.pixels,
    )
    model = transformers.ViTModel(config, add_pooling_layer=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return TransformerBridge.boot_transformers(folder, hf_model=model, device="cpu")


def _transformer_lens(tower: Tower) -> object:
    with torch.no_grad():
        return _bridge(tower.case).run_with_cache(
            tower.batch.inputs, names_filter=lambda name: name.endswith("hook_pattern")
        )


@cache
def _timm(case: Case) -> Any:
    """timm's own ViT of that size under AttentionExtract, which needs its fused attention off."""
    from timm.layers import set_fused_attn
    from timm.models.vision_transformer import VisionTransformer
    from timm.utils import AttentionExtract

    size = case.size
    set_fused_attn(False)
    model = VisionTransformer(
        img_size=case.pixels,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.layers,
        num_heads=size.heads,
    )
    return AttentionExtract(model.eval(), method="fx")


def _attention_extract(tower: Tower) -> object:
    with torch.no_grad():
        return _timm(tower.case)(tower.batch.inputs)


PEERS = {
    "torchlens": Method("torchlens", "trace of every operation", _torchlens),
    "nnsight": Method("nnsight", "eager weights of every layer saved", _nnsight),
    "transformer-lens": Method(
        "transformer-lens",
        "hook_pattern of every layer, ViT",
        _transformer_lens,
        prepare=lambda tower: _bridge(tower.case),
    ),
    "timm": Method(
        "timm", "AttentionExtract by fx, unfused ViT", _attention_extract, prepare=lambda tower: _timm(tower.case)
    ),
}


def missing(name: str) -> str:
    """Why a peer cannot be measured, or nothing."""
    try:
        version(name)
    except PackageNotFoundError:
        return "not installed"
    return ""


def find(name: str) -> Method:
    """One of foveate's, eager or peers' methods. Raises KeyError."""
    return (METHODS | PEERS)[name]
