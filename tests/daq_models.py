"""DVIS-DAQ for tests: the recorded cases where they are, and tiny random models that decide something."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from foveate_dvis.daq.config import DaqConfig, RefinerConfig, ResNetConfig, TrackerConfig
from foveate_dvis.daq.loading import random_daq
from foveate_dvis.daq.network import DvisDaq
from foveate_dvis.daq.outputs import SegmenterOutputs

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden" / "dvis_daq"

needs_golden = pytest.mark.skipif(
    not (GOLDEN / "state_dict.safetensors").is_file(), reason="the recorded DVIS-DAQ cases are not on this machine"
)


def golden_config(case: str) -> DaqConfig:
    return DaqConfig.from_json(json.loads((GOLDEN / case / "config.json").read_text()))


def golden_meta(case: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((GOLDEN / case / "meta.json").read_text())
    return read


def golden_tensors(name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(GOLDEN / f"{name}.safetensors"))


def golden_frames(config: DaqConfig) -> Tensor:
    """The recorded clip, normalised, (frame, 3, y, x)."""
    clip = golden_tensors("clip")["clip"].float()
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.pixel_mean, config.pixel_std))
    return (clip - mean) / std


TINY = DaqConfig(
    backbone=ResNetConfig(stem=8, width=16, depths=(1, 1, 1, 1), bottleneck=4),
    num_classes=3,
    num_queries=6,
    num_new_ins=6,
    hidden_dim=32,
    conv_dim=32,
    mask_dim=32,
    heads=2,
    encoder_layers=1,
    encoder_ffn_dim=16,
    decoder_layers=3,
    ffn_dim=16,
    window=2,
    max_num=4,
    tracker=TrackerConfig(
        layers=2, slots=2, patience=2, noise_frames=1, first_threshold=0.4, select_threshold=0.4
    ),
)


def tiny(mode: str = "online", *, seed: int = 0, local: bool = True, exact: bool = False, **rules: Any) -> DvisDaq:
    """A tiny model whose attention, masks and scores differ from row to row; ``rules``: of the tracker."""
    refiner = RefinerConfig(layers=2, local_attention=local, top_tracks=4) if mode == "offline" else None
    config = replace(TINY, refiner=refiner, tracker=replace(TINY.tracker, **rules))
    return sharpened(random_daq(config, seed=seed, upstream_exact=exact), seed)


def sharpened(model: DvisDaq, seed: int) -> DvisDaq:
    """Random weights give flat attention and equal scores: scale queries, keys and heads up, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "queries_features" in name or "queries_embedder" in name or "bg_slots" in name or "new_ins" in name:
                value.copy_(torch.randn(value.shape, generator=generator))
            elif "sampling_offsets" in name or "attention_weights" in name:
                continue
            elif name.endswith(("in_proj_weight", "q_proj.weight", "k_proj.weight", "project_k.weight")):
                value.mul_(4)
            elif "self_attention_layers" in name and name.endswith("out_proj.weight"):
                value.mul_(0.3)  # rows that mix less stay apart
            elif name.startswith("tracker.transformer_cross") and name.endswith("out_proj.weight"):
                value.mul_(2)
            elif "pos_embed.layers" in name and name.endswith("weight"):
                value.mul_(3)
            elif "class_embed" in name or "class_predictor" in name:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)
            elif name.endswith("bias") or "norm" in name:
                value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return model


def frames(count: int, *, seed: int = 0, height: int = 32, width: int = 64, dtype: Any = torch.float32) -> Tensor:
    """Random frames with something that moves, (frame, 3, y, x)."""
    generator = torch.Generator().manual_seed(seed)
    clip = 0.3 * torch.randn(count, 3, height, width, generator=generator)
    for t in range(count):
        clip[t, :, 4:20, (4 + 5 * t) % width : (4 + 5 * t) % width + 16] += torch.tensor([2.0, -1.0, 1.5])[
            :, None, None
        ]
    return clip.to(dtype)


class GivenSegments(DvisDaq):
    """A model whose segmenter's answers are given: ``frames`` say by their first number which frame they are."""

    given: SegmenterOutputs

    def _segment(self, window: Tensor) -> SegmenterOutputs:
        where = window[:, 0, 0, 0].round().long()
        given = self.given
        return SegmenterOutputs(
            given.logits[where], given.masks[where], given.embeds[where], given.features[where]
        )


def given_segments(
    mode: str = "online", *, count: int = 6, seed: int = 0, exact: bool = False, top: int = 4, **rules: Any
) -> tuple[GivenSegments, Tensor]:
    """A float64 model over random segmenter answers that drift over time, and the frames that name them."""
    local = bool(seed % 2)
    refiner = RefinerConfig(layers=2, local_attention=local, top_tracks=top) if mode == "offline" else None
    config = replace(TINY, refiner=refiner, tracker=replace(TINY.tracker, **rules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GivenSegments(config, upstream_exact=exact).double().eval().requires_grad_(False)
        for name, value in model.named_parameters():
            if name.startswith(("tracker", "refiner")):
                value.copy_(value * 1.5 + 0.1 * torch.randn_like(value))
            if "class_embed" in name:
                value.mul_(3)
        shape = (config.num_queries, config.hidden_dim)
        walk = torch.randn(count, *shape, dtype=torch.float64).cumsum(0)
        model.given = SegmenterOutputs(
            logits=2 * torch.randn(count, config.num_queries, config.num_classes + 1, dtype=torch.float64),
            masks=torch.randn(count, config.num_queries, 4, 6, dtype=torch.float64),
            embeds=torch.nn.functional.layer_norm(walk, (config.hidden_dim,)),
            features=torch.randn(count, config.mask_dim, 4, 6, dtype=torch.float64),
        )
    clip = torch.arange(count, dtype=torch.float64)[:, None, None, None].expand(-1, 3, 32, 32)
    return model, clip


@contextmanager
def recorded_attention(model: DvisDaq) -> Iterator[list[tuple[str, dict[str, Tensor]]]]:
    """Every attention call in the order of execution: (upstream's path, fields as in the recorded cases)."""
    calls: list[tuple[str, dict[str, Tensor]]] = []
    handles: list[Any] = []

    def weights_of(path: str, module: nn.Module) -> None:
        def ask(_module: Any, args: Any, kwargs: Any) -> Any:
            return args, {**kwargs, "need_weights": True, "average_attn_weights": False}

        def take(_module: Any, _args: Any, kwargs: Any, out: Any) -> None:
            fields = {"weights": out[1]}
            if kwargs.get("attn_mask") is not None:
                fields["attn_mask"] = kwargs["attn_mask"]
            calls.append((path, fields))

        handles.append(module.register_forward_pre_hook(ask, with_kwargs=True))
        handles.append(module.register_forward_hook(take, with_kwargs=True))

    def second(path: str, module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda m, a, out: calls.append((path, {"weights": out[1]}))))

    decoder = model.segmenter.model.transformer_module.decoder
    pixel = model.segmenter.model.pixel_level_module.decoder
    for i, layer in enumerate(pixel.encoder.layers):
        second(f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}.self_attn", layer.self_attn)
    for i, layer in enumerate(decoder.layers):
        weights_of(
            f"sem_seg_head.predictor.transformer_cross_attention_layers.{i}.multihead_attn", layer.cross_attn
        )
        second(f"sem_seg_head.predictor.transformer_self_attention_layers.{i}.self_attn", layer.self_attn)
    for name, module in model.named_modules():
        if name.startswith(("tracker.", "refiner.")):
            if isinstance(module, nn.MultiheadAttention):
                weights_of(name, module)
            elif name.endswith("slot_attn"):
                second(name, module)
            elif name.endswith("activation_proj"):

                def pool(_m: Any, _a: Any, out: tuple[Tensor, Tensor], name: str = name) -> None:
                    calls.append((name, {"weights": out[1].T}))

                handles.append(module.register_forward_hook(pool))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
