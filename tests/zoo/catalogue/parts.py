"""Models of which the part that attends is run alone, or that are put together from towers seen elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.catalogue.dense import TOKENS
from zoo.species import Build, Species, found, model, noise, pixels, small, words

NONE: Mapping[str, Any] = {}
Built = tuple[torch.nn.Module, dict[str, Any]]


def memory(family: str, sizes: Mapping[str, Any] = NONE, more: Mapping[str, Any] = NONE) -> Build:
    """Memory attention of a video segmenter: 4 x 4 cells of this frame read 2 frames and 3 object pointers."""

    def build() -> Built:
        config = small(
            f"{family}Config",
            memory_attention_hidden_size=32,
            memory_attention_num_layers=2,
            memory_attention_num_attention_heads=1,
            memory_attention_feed_forward_hidden_size=48,
            **sizes,
        )
        config._attn_implementation = "sdpa"  # as a whole model sets it
        config.memory_attention_rope_feat_sizes = [4, 4]  # some derive it anew from the size of the picture
        torch.manual_seed(0)
        made = found(f"{family}MemoryAttention")(config).eval()
        return made, {
            **more,
            "current_vision_features": noise(16, 2, 32),
            "current_vision_position_embeddings": noise(16, 2, 32, seed=1),
            "memory": noise(35, 2, 64, seed=2),
            "memory_posision_embeddings": noise(35, 2, 64, seed=3),
            "num_object_pointer_tokens": 3,
        }

    return build


def svtr(family: str) -> Build:
    """The text recogniser between backbone and head, on one row of 12 features."""

    def build() -> Built:
        made = model(f"{family}EncoderWithSVTR", small(f"{family}Config", conv_kernel_size=[1, 3]))
        return made, {"hidden_states": noise(2, next(made.parameters()).shape[1], 1, 12)}

    return build


def gemma3() -> Built:
    vision = small("SiglipVisionConfig", vision_use_head=False)
    config = small("Gemma3Config", vision_config=vision, image_token_index=98, mm_tokens_per_image=4)
    ids = torch.cat([words(2), torch.full((2, 4), 98), words(5)], 1)
    kinds = (ids == 98).long()
    seen = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": kinds,
        "pixel_values": pixels(),
    }
    return model("Gemma3Model", config), seen


def inkling2() -> Built:
    config = small("inkling2.Inkling2VisionConfig")
    seen = {"pixel_values": noise(6, 16, 16, 3), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2]])}
    return model("inkling2.Inkling2VisionModel", config), seen


def tracker() -> Built:
    vit = small("Sam3ViTConfig", image_size=64, window_size=4, global_attn_indexes=[1], pretrain_image_size=32)
    vision = {
        "backbone_config": vit,
        "fpn_hidden_size": 32,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        "scale_factors": [4.0, 2.0, 1.0, 0.5],
    }
    config = small(
        "sam3_tracker.Sam3TrackerConfig",
        vision_config=vision,
        prompt_encoder_config={"image_size": 64, "patch_size": 8, "mask_input_channels": 8},
        mask_decoder_config={"mlp_dim": 48, "iou_head_hidden_dim": 32},
    )
    seen = {"pixel_values": pixels(64), "input_points": 60 * noise(2, 2, 3, 2).sigmoid()}
    return model("sam3_tracker.Sam3TrackerModel", config), seen


SPECIES = (
    Species("SAM 2 video memory", memory("sam2_video.Sam2Video")),
    Species(
        "EdgeTAM video memory",
        memory(
            "edgetam_video.EdgeTamVideo",
            {"memory_attention_rope_k_sizes": [4, 4]},
            {"num_spatial_memory_tokens": 2},
        ),
    ),
    Species("SAM 3 tracker memory", memory("sam3_tracker_video.Sam3TrackerVideo")),
    Species("SAM 3 tracker", tracker, not_eager=TOKENS),
    Species("PP-OCRv5 server recogniser", svtr("pp_ocrv5_server_rec.PPOCRV5ServerRec")),
    Species("PP-OCRv5 mobile recogniser", svtr("pp_ocrv5_mobile_rec.PPOCRV5MobileRec")),
    Species("Gemma 3", gemma3),
    Species("Inkling 2 vision", inkling2),
)
