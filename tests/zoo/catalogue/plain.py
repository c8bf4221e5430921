"""Vision transformers of one resolution, and text towers that stand beside them."""

from __future__ import annotations

from typing import Any

import torch

from zoo.species import Build, Species, model, padded, pixels, small, tower, words


def text(kind: str, **given: object) -> Build:
    """A text tower whose second sentence is padded."""
    return tower(kind, lambda: {"input_ids": words(), "attention_mask": padded()}, **given)


def image_gpt() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("ImageGPTConfig", n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=48)
    return model("ImageGPTModel", config), {"input_ids": words(20)}


def siglip2() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("Siglip2VisionConfig", num_patches=16)
    mask = torch.ones(2, 16, dtype=torch.long)
    mask[1, 12:] = 0
    inputs = {
        "pixel_values": torch.randn(2, 16, 192, generator=torch.Generator().manual_seed(0)),
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[4, 4], [3, 4]]),
    }
    return model("Siglip2VisionModel", config), inputs


def vit_mae() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "ViTMAEConfig",
        decoder_hidden_size=24,
        decoder_num_attention_heads=4,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=32,
    )
    return model("ViTMAEForPreTraining", config), {"pixel_values": pixels()}


def vitdet() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "VitDetConfig",
        window_size=3,
        window_block_indices=[0],
        use_relative_position_embeddings=True,
        use_absolute_position_embeddings=True,
        residual_block_indices=[],
    )
    return model("VitDetModel", config), {"pixel_values": pixels()}


def perceiver() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "PerceiverConfig",
        num_latents=6,
        d_latents=32,
        d_model=24,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=2,
    )
    return model("PerceiverModel", config), {
        "inputs": torch.randn(2, 20, 24, generator=torch.Generator().manual_seed(0))
    }


def mllama() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "MllamaVisionConfig",
        num_global_layers=1,
        attention_heads=4,
        max_num_tiles=2,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=96,
        supported_aspect_ratios=[[1, 1], [1, 2]],
    )
    inputs = {
        "pixel_values": pixels(32, frames=4).reshape(2, 2, 2, 3, 32, 32)[:, :1],
        "aspect_ratio_ids": torch.tensor([[1], [2]]),
        "aspect_ratio_mask": torch.tensor([[[1, 0]], [[1, 1]]]),
    }
    return model("MllamaVisionModel", config), inputs


def llama4() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "Llama4VisionConfig",
        projector_input_dim=48,
        projector_output_dim=48,
        vision_output_dim=48,
        intermediate_size=128,
        pixel_shuffle_ratio=0.5,
    )
    return model("Llama4VisionModel", config), {"pixel_values": pixels()}


SPECIES = (
    Species("CLIP vision", tower("CLIPVision")),
    Species("CLIP text", text("CLIPText")),
    Species("SigLIP vision", tower("SiglipVision")),
    Species("SigLIP text", text("SiglipText")),
    Species("SigLIP 2 vision", siglip2),
    Species("ViT", tower("ViT")),
    Species("DeiT", tower("DeiT")),
    Species("BEiT", tower("Beit", use_relative_position_bias=True)),
    Species("BEiT, shared bias", tower("Beit", use_shared_relative_position_bias=True)),
    Species("Data2Vec vision", tower("Data2VecVision", use_relative_position_bias=True)),
    Species("DINOv2", tower("Dinov2")),
    Species("DINOv2 with registers", tower("Dinov2WithRegisters")),
    Species("DINOv3", tower("DINOv3ViT", num_register_tokens=2)),
    Species("I-JEPA", tower("IJepa")),
    Species("AIMv2 vision", tower("Aimv2Vision")),
    Species("AIMv2 text", text("Aimv2Text")),
    Species("MetaCLIP 2 vision", tower("MetaClip2Vision")),
    Species("AltCLIP vision", tower("AltCLIPVision")),
    Species("Chinese CLIP vision", tower("ChineseCLIPVision")),
    Species("BLIP vision", tower("BlipVision")),
    Species("BLIP-2 vision", tower("Blip2Vision")),
    Species("InstructBLIP vision", tower("InstructBlipVision")),
    Species("InstructBLIP video vision", tower("InstructBlipVideoVision")),
    Species("CLIPSeg vision", tower("CLIPSegVision")),
    Species("X-CLIP text", text("XCLIPText")),
    Species("OWL-ViT vision", tower("OwlViTVision")),
    Species("OWLv2 vision", tower("Owlv2Vision")),
    Species("GroupViT text", text("GroupViTText")),
    Species("Kosmos-2 vision", tower("kosmos2.Kosmos2Vision")),
    Species("MLCD vision", tower("MLCDVision")),
    Species("Git vision", tower("GitVision")),
    Species("Janus vision", tower("JanusVision")),
    Species("FLAVA image", tower("FlavaImage")),
    Species("FLAVA text", text("FlavaText")),
    Species("ViT MAE", vit_mae),
    Species("ViT MSN", tower("ViTMSN")),
    Species("ViTDet", vitdet),
    Species("YOLOS", tower("Yolos", image_size=[32, 32], num_detection_tokens=5)),
    Species("DPT", tower("DPT", backbone_config=None)),
    Species("Pixio", tower("Pixio")),
    Species("Radio", tower("Radio")),
    Species("Sapiens 2", tower("Sapiens2")),
    Species("TIPSv2 vision", tower("Tipsv2Vision")),
    Species("ImageGPT", image_gpt),
    Species("Perceiver", perceiver),
    Species("MGP-STR", tower("Mgpstr", lambda: {"pixel_values": pixels(32)}, image_size=[32, 32])),
    Species("Idefics vision", tower("idefics.IdeficsVision", cls="idefics.IdeficsVisionTransformer")),
    Species("Idefics2 vision", tower("idefics2.Idefics2Vision", cls="idefics2.Idefics2VisionTransformer")),
    Species("Idefics3 vision", tower("idefics3.Idefics3Vision", cls="idefics3.Idefics3VisionTransformer")),
    Species("SmolVLM vision", tower("smolvlm.SmolVLMVision", cls="smolvlm.SmolVLMVisionTransformer")),
    Species("InternVL vision", tower("InternVLVision")),
    Species(
        "Ovis2 vision",
        tower("ovis2.Ovis2Vision"),
        ignored={"": "softmax over the visual vocabulary, no attention"},
    ),
    Species(
        "Phi-4 multimodal vision",
        tower("Phi4MultimodalVision"),
        not_eager="eager is bidirectional, SDPA without a mask runs causal (is_causal is set): another function",
    ),
    Species(
        "VitPose backbone", tower("VitPoseBackbone", cls="VitPoseBackbone", image_size=[32, 32], patch_size=[8, 8])
    ),
    Species("Pixtral vision", tower("PixtralVision")),
    Species("Mllama vision", mllama),
    Species("Llama 4 vision", llama4),
)
