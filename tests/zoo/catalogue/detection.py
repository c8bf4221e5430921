"""Detectors: encoder-decoders over one map or a pyramid, deformable attention, text-conditioned ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.species import Build, Species, model, padded, pixels, small, words

DEFORMABLE = ("sampling_offsets",)


def resnet(*stages: str, widths: tuple[int, ...] = (8, 16)) -> Any:
    return small(
        "ResNetConfig",
        embedding_size=8,
        hidden_sizes=list(widths),
        depths=[1] * len(widths),
        layer_type="basic",
        out_features=list(stages),
    )


def swin(*stages: str) -> Any:
    return small(
        "SwinConfig",
        patch_size=4,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        image_size=64,
        out_features=list(stages),
    )


def picture(size: int = 64, *, mask: bool = True) -> dict[str, Any]:
    seen = torch.ones(2, size, size, dtype=torch.long)
    seen[1, :, size - 24 :] = 0
    return {"pixel_values": pixels(size), **({"pixel_mask": seen} if mask else {})}


def detector(
    kind: str, backbone: Callable[[], Any], *, cls: str = "", mask: bool = True, size: int = 64, **given: Any
) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(f"{kind}Config", backbone_config=backbone(), **given)
        return model(cls or f"{kind}Model", config), picture(size, mask=mask)

    return build


def one() -> Any:
    return resnet("stage2")


def two() -> Any:
    return resnet("stage1", "stage2")


def rt_resnet() -> Any:
    return small(
        "RTDetrResNetConfig",
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def hgnet(*stages: str) -> Any:
    return small(
        "HGNetV2Config",
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 8, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 3, 3],
        stage_numb_of_layers=[1, 1, 1, 1],
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        out_features=list(stages or ("stage2", "stage3", "stage4")),
    )


RT: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [16, 24, 32],
    "encoder_layers": 1,
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
}


def grounding(kind: str, backbone: str = "SwinConfig", **given: Any) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(
            f"{kind}Config",
            backbone_config=swin("stage2", "stage3", "stage4"),
            text_config={"vocab_size": 1100},
            num_feature_levels=3,
            max_text_len=16,
            **given,
        )
        ids = words(9)
        ids[:, 0], ids[:, 4], ids[:, 8] = 101, 1012, 102  # [CLS] three words . three words [SEP]
        return model(f"{kind}Model", config), {
            **picture(),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }

    return build


def omdet() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "OmDetTurboConfig",
        backbone_config=swin("stage2", "stage3", "stage4"),
        text_config={"max_position_embeddings": 16, "projection_dim": 32},
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=32,
        text_projection_out_dim=32,
        task_encoder_hidden_dim=32,
        class_embed_dim=32,
        encoder_hidden_dim=48,
        vision_features_channels=[48, 48, 48],
        encoder_in_channels=[32, 64, 128],
        encoder_dim_feedforward=48,
        decoder_hidden_dim=48,
        decoder_num_heads=4,
        decoder_num_layers=2,
        decoder_dim_feedforward=48,
        class_distance_type="cosine",
    )
    inputs = {
        "pixel_values": pixels(64),
        "classes_input_ids": words(6, batch=5),
        "classes_attention_mask": padded(6, batch=5, missing=2),
        "tasks_input_ids": words(5),
        "tasks_attention_mask": padded(5, missing=1),
        "classes_structure": torch.tensor([3, 2]),
    }
    return model("OmDetTurboForObjectDetection", config), inputs


def owl(kind: str) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(f"{kind}Config", text_config={"max_position_embeddings": 16}, projection_dim=32)
        inputs = {"pixel_values": pixels(), "input_ids": words(6, batch=4), "attention_mask": padded(6, batch=4)}
        return model(f"{kind}ForObjectDetection", config), inputs

    return build


def lw_detr() -> tuple[torch.nn.Module, dict[str, Any]]:
    backbone = small(
        "LwDetrViTConfig",
        image_size=64,
        pretrain_image_size=64,
        window_block_indices=[0],
        num_windows=4,
        out_features=["stage2"],
    )
    config = small(
        "LwDetrConfig",
        backbone_config=backbone,
        projector_scale_factors=[1.0],
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        group_detr=2,
        c2f_num_blocks=1,
    )
    return model("LwDetrModel", config), picture()


def rf_detr() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "RfDetrConfig",
        backbone_config=small("rf_detr.RfDetrDinov2Config", image_size=64, num_windows=2, out_features=["stage2"]),
        decoder_self_attention_heads=4,
        decoder_cross_attention_heads=4,
        group_detr=2,
        c2f_num_blocks=1,
    )
    return model("RfDetrModel", config), picture()


BOOLEAN = "the eager text tower adds its boolean mask to the scores: another function"

SPECIES = (
    Species("DETR", detector("Detr", one)),
    Species("Conditional DETR", detector("ConditionalDetr", one)),
    Species("DAB-DETR", detector("DabDetr", one), sharpen=("_content_proj", "_pos_proj", "_sine_proj")),
    Species("Table Transformer", detector("TableTransformer", one)),
    Species("Deformable DETR", detector("DeformableDetr", two, num_feature_levels=2)),
    Species(
        "Deformable DETR, two-stage",
        detector(
            "DeformableDetr",
            two,
            num_feature_levels=2,
            two_stage=True,
            two_stage_num_proposals=7,
            with_box_refine=True,
            cls="DeformableDetrForObjectDetection",
        ),
    ),
    Species("RT-DETR", detector("RTDetr", rt_resnet, **RT)),
    Species("RT-DETR v2", detector("RTDetrV2", rt_resnet, **RT)),
    Species("RT-DETR v2, discrete", detector("RTDetrV2", rt_resnet, decoder_method="discrete", **RT)),
    Species("D-FINE", detector("DFine", hgnet, **RT, decoder_n_points=[3, 6, 3])),
    Species("DEIMv2", detector("Deimv2", hgnet, **RT, decoder_n_points=[3, 6, 3])),
    Species("LW-DETR", lw_detr),
    Species("RF-DETR", rf_detr),
    Species("Grounding DINO", grounding("GroundingDino"), sharpen=("vision_proj", "text_proj"), not_eager=BOOLEAN),
    Species(
        "MM Grounding DINO", grounding("MMGroundingDino"), sharpen=("vision_proj", "text_proj"), not_eager=BOOLEAN
    ),
    Species("OmDet-Turbo", omdet),
    Species("OWL-ViT", owl("OwlViT")),
    Species("OWLv2", owl("Owlv2")),
    Species("PP-DocLayout v2", detector("PPDocLayoutV2", hgnet, cls="pp_doclayout_v2.PPDocLayoutV2Model", **RT)),
    Species(
        "PP-DocLayout v3",
        detector(
            "PPDocLayoutV3",
            lambda: hgnet("stage1", "stage2", "stage3", "stage4"),
            cls="pp_doclayout_v3.PPDocLayoutV3Model",
            x4_feat_dim=8,
            mask_feature_channels=[8, 8],
            **RT,
        ),
    ),
)
