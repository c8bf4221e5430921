"""Clips: joint, factorised and divided space-time attention."""

from __future__ import annotations

from typing import Any

import torch

from zoo.species import Species, model, noise, pixels, small, tower, words


def clips(count: int = 4, size: int = 32) -> dict[str, Any]:
    return {"pixel_values": pixels(size, frames=count)}


def vjepa2() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "VJEPA2Config",
        crop_size=32,
        frames_per_clip=4,
        hidden_size=48,
        pred_hidden_size=48,
        pred_num_attention_heads=4,
        pred_num_hidden_layers=1,
    )
    return model("VJEPA2Model", config), {"pixel_values_videos": pixels(32, frames=4)}


def xclip() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "XCLIPVisionConfig",
        num_frames=4,
        mit_hidden_size=16,
        mit_intermediate_size=24,
        mit_num_attention_heads=2,
    )
    return model("XCLIPVisionModel", config), {"pixel_values": noise(8, 3, 32, 32)}


def xclip_both() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "XCLIPConfig",
        vision_config={
            "num_frames": 4,
            "mit_hidden_size": 16,
            "mit_intermediate_size": 24,
            "mit_num_attention_heads": 2,
        },
        projection_dim=16,
        prompt_layers=1,
        prompt_num_attention_heads=2,
    )
    return model("XCLIPModel", config), {"input_ids": words(), "pixel_values": pixels(32, frames=4)}


EQUAL = "uniform by construction: before the first layer all frames have the same class token"

SPECIES = (
    Species("VideoMAE", tower("VideoMAE", clips, num_frames=4)),
    Species("TimeSformer", tower("Timesformer", clips, num_frames=4)),
    Species("TimeSformer, joint", tower("Timesformer", clips, num_frames=4, attention_type="joint_space_time")),
    Species("ViViT", tower("Vivit", clips, num_frames=4, tubelet_size=[2, 8, 8])),
    Species("V-JEPA 2", vjepa2),
    Species(
        "VideoPrism",
        tower(
            "VideoPrismVision",
            lambda: {"pixel_values_videos": pixels(32, frames=4)},
            num_frames=4,
            tubelet_size=[1, 8, 8],
            num_spatial_layers=2,
            num_temporal_layers=1,
            num_auxiliary_layers=1,
        ),
    ),
    Species("X-CLIP vision", xclip, uniform={"*layers.0.message_attn": EQUAL}),
    Species("X-CLIP", xclip_both, uniform={"*layers.0.message_attn": EQUAL}),
)
