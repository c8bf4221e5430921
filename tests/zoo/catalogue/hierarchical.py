"""Pyramids: shifted windows, pooled and strided keys, convolutional attention."""

from __future__ import annotations

from typing import Any

import torch

from zoo.species import Species, model, pixels, small, tower

SWIN: dict[str, Any] = {
    "patch_size": 4,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": 32,
}
PYRAMID: dict[str, Any] = {
    "num_encoder_blocks": 2,
    "depths": [2, 1],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "image_size": 32,
}


def only(options: dict[str, Any], *dropped: str, **further: Any) -> dict[str, Any]:
    return {**{name: value for name, value in options.items() if name not in dropped}, **further}


def sam_vision(kind: str, **given: Any) -> Any:
    return tower(
        kind,
        lambda: {"pixel_values": pixels(48)},
        image_size=48,
        output_channels=16,
        num_pos_feats=8,
        window_size=4,
        global_attn_indexes=[1],
        **given,
    )


def sam2_hiera() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("Sam2HieraDetConfig", **SAM2_HIERA)
    return model("sam2.Sam2HieraDetModel", config), {"pixel_values": pixels(64)}


SAM2_HIERA: dict[str, Any] = {
    "hidden_size": 16,
    "num_attention_heads": 1,
    "image_size": [64, 64],
    "patch_kernel_size": [7, 7],
    "patch_stride": [4, 4],
    "patch_padding": [3, 3],
    "query_stride": [2, 2],
    "window_positional_embedding_background_size": [2, 2],
    "num_query_pool_stages": 3,
    "blocks_per_stage": [1, 1, 2, 1],
    "embed_dim_per_stage": [16, 32, 64, 128],
    "num_attention_heads_per_stage": [1, 2, 4, 8],
    "window_size_per_stage": [4, 2, 4, 2],
    "global_attention_blocks": [3],
}

SPECIES = (
    Species("Swin", tower("Swin", **SWIN)),
    Species("Swin, padded", tower("Swin", lambda: {"pixel_values": pixels(40)}, **only(SWIN, image_size=40))),
    Species("Swin v2", tower("Swinv2", **SWIN)),
    Species("Swin2SR", tower("Swin2SR", **only(SWIN, patch_size=1, image_size=8))),
    Species("Donut-Swin", tower("DonutSwin", **SWIN)),
    Species(
        "MaskFormer-Swin",
        tower(
            "MaskFormerSwin",
            config="maskformer.maskformer_swin.MaskFormerSwinConfig",
            cls="maskformer.maskformer_swin.MaskFormerSwinModel",
            **SWIN,
        ),
    ),
    Species(
        "Hiera",
        tower(
            "Hiera",
            embed_dim=16,
            image_size=[64, 64],
            patch_size=[7, 7],
            patch_stride=[4, 4],
            patch_padding=[3, 3],
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
        ),
    ),
    Species("PVT", tower("Pvt", **only(PYRAMID, patch_sizes=[4, 2], sequence_reduction_ratios=[4, 1]))),
    Species("PVT v2", tower("PvtV2", **only(PYRAMID, sr_ratios=[4, 1]))),
    Species("PVT v2, linear", tower("PvtV2", **only(PYRAMID, sr_ratios=[4, 1], linear_attention=True))),
    Species("SegFormer", tower("Segformer", **only(PYRAMID, "image_size", sr_ratios=[4, 1]))),
    Species("GLPN", tower("GLPN", **only(PYRAMID, "image_size", sr_ratios=[4, 1]))),
    Species(
        "CvT",
        tower("Cvt", embed_dim=[16, 32, 48], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    ),
    Species(
        "LeViT",
        tower(
            "Levit",
            lambda: {"pixel_values": pixels(64)},
            image_size=64,
            patch_size=16,
            hidden_sizes=[16, 32, 48],
            num_attention_heads=[2, 4, 6],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
        ),
    ),
    Species(
        "MobileViT",
        tower(
            "MobileViT",
            lambda: {"pixel_values": pixels(128)},
            image_size=128,
            patch_size=2,
            hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
        ),
    ),
    Species(
        "MobileViT v2",
        tower(
            "MobileViTV2",
            lambda: {"pixel_values": pixels(64)},
            image_size=64,
            patch_size=2,
            base_attn_unit_dims=[16, 24, 32],
            n_attn_blocks=[1, 1, 1],
            width_multiplier=0.25,
        ),
        matrixless="separable attention: a weight a patch scales its key, keys are summed; no query-key matrix",
        ignored={"*.attention": "weights of a sum of keys, one a patch"},
    ),
    Species(
        "SwiftFormer",
        tower(
            "SwiftFormer",
            lambda: {"pixel_values": pixels(64)},
            image_size=64,
            depths=[1, 1, 1, 1],
            embed_dims=[16, 16, 32, 32],
        ),
        matrixless="efficient additive attention: no query-key matrix; its softmax is over an axis of size one",
        ignored={"*.attn": "softmax over an axis of size one"},
    ),
    Species("SAM vision", sam_vision("SamVision")),
    Species("SAM-HQ vision", sam_vision("SamHQVision")),
    Species(
        "SAM 2 Hiera",
        sam2_hiera,
        ignored={"blocks.*.attn": "a softmax over heads, computed and thrown away beside the SDPA call"},
        not_eager="what it returns as attentions are the outputs of the attention modules",
    ),
    Species(
        "SegGPT",
        tower(
            "SegGpt",
            lambda: {"pixel_values": pixels(32), "prompt_pixel_values": pixels(32), "prompt_masks": pixels(32)},
            image_size=[64, 32],
            pretrain_image_size=32,
            intermediate_hidden_state_indices=[0, 1],
            merge_index=0,
            mlp_dim=48,
        ),
    ),
)
