"""Segmentation, depth, promptable masks and picture matching."""

from __future__ import annotations

from typing import Any

import torch

from zoo.catalogue.detection import swin
from zoo.catalogue.hierarchical import SAM2_HIERA
from zoo.species import Build, Species, model, padded, pixels, small, words

DISCARDED = "a softmax over heads, computed and thrown away beside the SDPA call"
TOKENS = "what it returns as attentions are the tokens of its two-way blocks"
KEYPOINTS = {
    "keypoint_detector.keypoint_decoder": "softmax over the cells of a keypoint, no attention",
    "keypoint_detector.descriptor_decoder": "descriptors sampled at keypoints, no attention",
}
OUTPUTS = "what it returns as attentions are the outputs of the attention modules"


def mask2former() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "Mask2FormerConfig",
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        dim_feedforward=48,
        decoder_layers=4,
    )
    return model("Mask2FormerModel", config), {"pixel_values": pixels(64)}


def maskformer() -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import DetrConfig

    config = small(
        "MaskFormerConfig",
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        fpn_feature_size=32,
        mask_feature_size=32,
        decoder_config=small(DetrConfig, backbone_config=swin("stage4")),
    )
    return model("MaskFormerModel", config), {"pixel_values": pixels(64)}


def oneformer() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "OneFormerConfig",
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        conv_dim=32,
        mask_dim=32,
        hidden_dim=32,
        encoder_feedforward_dim=48,
        dim_feedforward=48,
        decoder_layers=3,
        encoder_layers=1,
        task_seq_len=9,
        text_encoder_width=32,
        text_encoder_context_length=9,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=99,
        text_encoder_n_ctx=2,
    )
    return model("OneFormerModel", config), {"pixel_values": pixels(64), "task_inputs": words(9).float()}


def eomt(kind: str, **given: Any) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(f"{kind}Config", num_blocks=1, num_upscale_blocks=1, **given)
        return model(f"{kind}ForUniversalSegmentation", config), {"pixel_values": pixels()}

    return build


def videomt() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("VideomtConfig", num_blocks=1, num_upscale_blocks=1)
    return model("VideomtForUniversalSegmentation", config), {"pixel_values_videos": pixels(32, frames=2)}


def depth(kind: str, **given: Any) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        backbone = small(
            "Dinov2Config",
            num_hidden_layers=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
            reshape_hidden_states=False,
        )
        config = small(
            f"{kind}Config",
            backbone_config=backbone,
            reassemble_hidden_size=32,
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
            head_hidden_size=8,
            **given,
        )
        inputs = {"pixel_values": pixels()}
        return model(f"{kind}ForDepthEstimation", config), inputs

    return build


def zoedepth() -> tuple[torch.nn.Module, dict[str, Any]]:
    backbone = small(
        "BeitConfig",
        num_hidden_layers=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        use_relative_position_bias=True,
    )
    config = small(
        "ZoeDepthConfig",
        backbone_config=backbone,
        neck_hidden_sizes=[8, 8, 16, 16],
        fusion_hidden_size=16,
        bottleneck_features=16,
        num_attractors=[4, 2, 2, 1],
        bin_embedding_dim=16,
        num_relative_features=8,
        bin_configurations=[
            {"n_bins": 8, "min_depth": 0.1, "max_depth": 8.0, "name": "nyu"},
            {"n_bins": 8, "min_depth": 0.1, "max_depth": 80.0, "name": "kitti"},
        ],
        num_patch_transformer_layers=4,
        patch_transformer_hidden_size=128,
        patch_transformer_intermediate_size=24,
        patch_transformer_num_attention_heads=4,
    )
    return model("ZoeDepthForDepthEstimation", config), {"pixel_values": pixels(64)}


def clipseg() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "CLIPSegConfig",
        extract_layers=[0, 1],
        reduce_dim=16,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=24,
    )
    return model("CLIPSegForImageSegmentation", config), {
        "pixel_values": pixels(),
        "input_ids": words(),
        "attention_mask": padded(),
    }


def groupvit() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "GroupViTVisionConfig", depths=[1, 1, 1], num_group_tokens=[6, 4, 0], num_output_groups=[6, 4, 4]
    )
    return model("GroupViTVisionModel", config), {"pixel_values": pixels()}


def sam(kind: str) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(
            f"{kind}Config",
            vision_config={
                "image_size": 64,
                "output_channels": 32,
                "num_pos_feats": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
                "mlp_dim": 48,
            },
            prompt_encoder_config={"image_size": 64, "mask_input_channels": 8},
            mask_decoder_config={
                "mlp_dim": 48,
                "iou_head_hidden_dim": 16,
                **({"vit_dim": 32} if kind == "SamHQ" else {}),
            },
        )
        return model(f"{kind}Model", config), {
            "pixel_values": pixels(64),
            "input_points": 60 * torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(2)),
        }

    return build


def sam2(kind: str = "Sam2", hiera: bool = True) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        backbone = small("Sam2HieraDetConfig", **SAM2_HIERA)
        config = small(
            f"{kind}Config",
            vision_config={
                "backbone_config": backbone,
                "backbone_channel_list": [128, 64, 32, 16],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 32,
                "fpn_top_down_levels": [2, 3],
            },
            prompt_encoder_config={"image_size": 64, "patch_size": 16, "mask_input_channels": 8},
            mask_decoder_config={"mlp_dim": 48, "iou_head_hidden_dim": 32},
        )
        return model(f"{kind}Model", config), {
            "pixel_values": pixels(64),
            "input_points": 60 * torch.rand(2, 2, 3, 2, generator=torch.Generator().manual_seed(2)),
        }

    return build


def sam3_vit() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("Sam3ViTConfig", image_size=48, window_size=3, global_attn_indexes=[1], pretrain_image_size=32)
    return model("sam3.Sam3ViTModel", config), {"pixel_values": pixels(48)}


def sam3() -> tuple[torch.nn.Module, dict[str, Any]]:
    vit = small("Sam3ViTConfig", image_size=64, window_size=4, global_attn_indexes=[1], pretrain_image_size=32)
    config = small(
        "Sam3Config",
        vision_config={
            "backbone_config": vit,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
            "scale_factors": [4.0, 2.0, 1.0, 0.5],
        },
        text_config={"max_position_embeddings": 16},
        geometry_encoder_config={"num_layers": 1},
        detr_encoder_config={"num_layers": 2},
        detr_decoder_config={"num_layers": 2, "num_queries": 7},
    )
    return model("sam3.Sam3Model", config), {
        "pixel_values": pixels(64),
        "input_ids": words(),
        "attention_mask": padded(),
    }


def superpoint() -> Any:
    return small(
        "SuperPointConfig",
        encoder_hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=32,
        descriptor_decoder_dim=32,
        keypoint_threshold=0.0,
        max_keypoints=20,
        border_removal_distance=0,
    )


def superglue() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "SuperGlueConfig",
        keypoint_detector_config=superpoint(),
        keypoint_encoder_sizes=[16, 32],
        gnn_layers_types=["self", "cross"],
    )
    return model("SuperGlueForKeypointMatching", config), {"pixel_values": pixels(64, frames=2)}


def lightglue() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "LightGlueConfig",
        keypoint_detector_config=superpoint(),
        descriptor_dim=32,
        num_key_value_heads=4,
        depth_confidence=-1.0,
        width_confidence=-1.0,
    )
    return model("LightGlueForKeypointMatching", config), {"pixel_values": pixels(64, frames=2)}


def loftr() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "EfficientLoFTRConfig",
        stage_num_blocks=[1, 1, 1, 1],
        out_features=[16, 16, 32, 32],
        stage_stride=[2, 1, 2, 2],
        num_attention_layers=1,
        num_attention_heads=8,
        q_aggregation_kernel_size=2,
        kv_aggregation_kernel_size=2,
        q_aggregation_stride=2,
        kv_aggregation_stride=2,
    )
    return model("EfficientLoFTRForKeypointMatching", config), {"pixel_values": pixels(64, frames=2)}


def upernet() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "UperNetConfig",
        backbone_config=swin("stage1", "stage2", "stage3", "stage4"),
        auxiliary_channels=16,
        auxiliary_in_channels=64,
    )
    return model("UperNetForSemanticSegmentation", config), {"pixel_values": pixels(64)}


def vitmatte() -> tuple[torch.nn.Module, dict[str, Any]]:
    backbone = small(
        "VitDetConfig",
        num_channels=4,
        out_features=["stage2"],
        use_relative_position_embeddings=True,
        patch_size=16,
        image_size=64,
    )
    config = small(
        "VitMatteConfig",
        backbone_config=backbone,
        hidden_size=32,
        convstream_hidden_sizes=[8, 8, 16],
        fusion_hidden_sizes=[16, 16, 8, 8],
    )
    return model("VitMatteForImageMatting", config), {"pixel_values": pixels(64, channels=4)}


SPECIES = (
    Species("Mask2Former", mask2former),
    Species("MaskFormer", maskformer),
    Species("OneFormer", oneformer),
    Species("EoMT", eomt("Eomt", num_register_tokens=2)),
    Species("EoMT DINOv3", eomt("EomtDinov3", num_register_tokens=2)),
    Species("VideoMT", videomt),
    Species("Depth Anything", depth("DepthAnything")),
    Species("Prompt Depth Anything", depth("PromptDepthAnything")),
    Species("ZoeDepth", zoedepth, ignored={"metric_head*": "probabilities of depth bins and of the domain"}),
    Species("UperNet", upernet),
    Species("ViTMatte", vitmatte),
    Species("CLIPSeg", clipseg),
    Species(
        "GroupViT vision",
        groupvit,
        ignored={
            "*.assign": "group assignment: the one-hot argmax of a softmax over groups, no weights over keys"
        },
        not_eager="what it returns as attentions are the group assignments",
    ),
    Species("SAM", sam("Sam"), not_eager=TOKENS),
    Species("SAM-HQ", sam("SamHQ"), not_eager=TOKENS),
    Species("SAM 2", sam2(), ignored={"*.blocks.*.attn": DISCARDED}, not_eager=OUTPUTS),
    Species("SAM 3 ViT", sam3_vit),
    Species("SAM 3", sam3, note="without box prompts, which need torchvision"),
    Species("SuperGlue", superglue, ignored=KEYPOINTS),
    Species("LightGlue", lightglue, ignored=KEYPOINTS),
    Species(
        "Efficient LoFTR", loftr, ignored={"": "matching scores between the two pictures and sub-pixel refinement"}
    ),
)
