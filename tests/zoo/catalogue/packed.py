"""Vision towers of language models: pictures of different size in one sequence, and others of their own kind."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from zoo.species import Build, Species, model, noise, padded, pixels, small, tower

GRID = ((1, 4, 4), (1, 2, 4))


def packed(
    kind: str,
    cls: str,
    /,
    *,
    patch: int = 8,
    frames: int = 2,
    grid: tuple[tuple[int, ...], ...] = GRID,
    flat: bool = True,
    more: Mapping[str, Any] | None = None,
    **given: Any,
) -> Build:
    """Patches of two pictures in one sequence ``(patch, channel * frame * y * x)`` with their grids."""

    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        made = model(cls, small(kind, **given))
        rows = sum(t * h * w for t, h, w in grid)
        patches = noise(rows, 3 * frames * patch * patch) if flat else noise(rows, 3, patch, patch)
        first, second = list(inspect.signature(made.forward).parameters)[:2]
        return made, {first: patches, second: torch.tensor(grid), **(more or {})}

    return build


def paddle() -> tuple[torch.nn.Module, dict[str, Any]]:
    made = model("paddleocr_vl.PaddleOCRVisionModel", small("paddleocr_vl.PaddleOCRVisionConfig"))
    return made, {"pixel_values": noise(1, 24, 3, 8, 8), "grid_thw": torch.tensor(GRID)}


def minicpm(family: str) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        config = small(f"{family}VisionConfig", insert_layer_id=0)
        sizes = torch.tensor([[4, 4], [2, 4]], dtype=torch.int32)
        return model(f"{family}VisionModel", config), {
            "pixel_values": noise(1, 3, 8, 24 * 8),
            "target_sizes": sizes,
        }

    return build


def kosmos25() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("kosmos2_5.Kosmos2_5VisionConfig", patch_embed_hidden_size=48, max_num_patches=16)
    places = torch.arange(1, 17).reshape(1, 16, 1).repeat(2, 1, 2) % 5
    patches = torch.cat([places, noise(2, 16, 48)], -1)
    return model("kosmos2_5.Kosmos2_5VisionModel", config), {
        "flattened_patches": patches,
        "attention_mask": padded(16),
    }


def encoder(family: str) -> Build:
    def build() -> tuple[torch.nn.Module, dict[str, Any]]:
        made = model(f"{family}VisionEncoder", small(f"{family}VisionEncoderConfig"))
        return made, {"inputs_embeds": noise(2, 12, 32), "num_patches": 6}

    return build


def chameleon() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "chameleon.ChameleonVQVAEConfig",
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        resolution=32,
        latent_channels=8,
        num_embeddings=20,
        attn_resolutions=[16],
    )
    return model("chameleon.ChameleonVQVAEEncoder", config), {"pixel_values": pixels()}


def emu3() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small(
        "emu3.Emu3VQVAEConfig",
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[1],
        hidden_size=32,
        num_attention_heads=1,
        codebook_size=20,
        embed_dim=4,
    )
    return model("emu3.Emu3VQVAEEncoder", config), {"pixel_values": pixels(16, frames=4)}


def gemma4() -> tuple[torch.nn.Module, dict[str, Any]]:
    config = small("gemma4.Gemma4VisionConfig", pooling_kernel_size=2, position_embedding_size=16)
    places = (
        torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
        .reshape(1, 16, 2)
        .repeat(2, 1, 1)
    )
    places[1, 12:] = -1
    return model("gemma4.Gemma4VisionModel", config), {
        "pixel_values": noise(2, 16, 192),
        "pixel_position_ids": places,
    }


TABLE = {"embeddings": "the table of positions, sampled at the grid of the picture"}

DEEPSTACK = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}

SPECIES = (
    Species(
        "Qwen2-VL vision", packed("qwen2_vl.Qwen2VLVisionConfig", "qwen2_vl.Qwen2VisionTransformerPretrainedModel")
    ),
    Species(
        "Qwen2.5-VL vision",
        packed(
            "qwen2_5_vl.Qwen2_5_VLVisionConfig",
            "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            window_size=32,
            fullatt_block_indexes=[1],
        ),
    ),
    Species(
        "Qwen3-VL vision",
        packed(
            "qwen3_vl.Qwen3VLVisionConfig",
            "qwen3_vl.Qwen3VLVisionModel",
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
    Species(
        "Qwen3.5 vision",
        packed("qwen3_5.Qwen3_5VisionConfig", "qwen3_5.Qwen3_5VisionModel", num_position_embeddings=16),
    ),
    Species(
        "Qwen4 vision",
        packed("qwen4_exp.Qwen4ExpVisionConfig", "qwen4_exp.Qwen4ExpVisionModel", num_position_embeddings=16),
    ),
    Species("GLM-4V vision", packed("glm4v.Glm4vVisionConfig", "glm4v.Glm4vVisionModel"), ignored=TABLE),
    Species("GLM-OCR vision", packed("glm_ocr.GlmOcrVisionConfig", "glm_ocr.GlmOcrVisionModel")),
    Species(
        "GLM-Image vision",
        packed("glm_image.GlmImageVisionConfig", "glm_image.GlmImageVisionModel", frames=1),
        ignored=TABLE,
    ),
    Species(
        "ERNIE 4.5 VL vision",
        packed(
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionConfig",
            "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
            frames=1,
        ),
    ),
    Species(
        "Kimi K2.5 vision",
        packed(
            "kimi_k25.Kimi_K25VisionConfig",
            "kimi_k25.Kimi_K25VisionModel",
            flat=False,
            pos_emb_height=4,
            pos_emb_width=4,
        ),
    ),
    Species(
        "Exaone 4.5 vision",
        packed(
            "exaone4_5.Exaone4_5_VisionConfig",
            "exaone4_5.Exaone4_5_VisionModel",
            window_size=32,
            fullatt_block_indexes=[1],
        ),
    ),
    Species(
        "Cohere Compass vision",
        packed(
            "cohere_compass.CohereCompassVisionConfig",
            "cohere_compass.CohereCompassVisionModel",
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
    Species(
        "MiniMax M3 vision",
        packed("minimax_m3_vl.MiniMaxM3VLVisionConfig", "minimax_m3_vl.MiniMaxM3VLVisionModel"),
    ),
    Species(
        "LFM3-VL vision",
        packed("lfm3_vl.Lfm3VlVisionConfig", "lfm3_vl.Lfm3VlVisionModel", layer_types=["conv", "full_attention"]),
    ),
    Species(
        "Dots3 vision",
        packed(
            "dots3_note.Dots3NoteVisionConfig",
            "dots3_note.Dots3NoteVisionModel",
            frames=1,
            mlp_layer_types=["dense", "dense"],
            adapter_in_dim=32,
            adapter_out_dim=32,
        ),
    ),
    Species(
        "Muse Spark vision",
        packed(
            "muse_spark.MuseSparkVisionConfig",
            "muse_spark.MuseSparkVisionModel",
            pos_emb_height=4,
            pos_emb_width=4,
        ),
    ),
    Species("PaddleOCR-VL vision", paddle),
    Species(
        "HunYuan-VL vision",
        packed("hunyuan_vl.HunYuanVLVisionConfig", "hunyuan_vl.HunYuanVLVisionTransformer", frames=1),
    ),
    Species(
        "VideoLLaMA 3 vision",
        packed(
            "video_llama_3.VideoLlama3VisionConfig",
            "video_llama_3.VideoLlama3VisionModel",
            frames=1,
            more={"merge_sizes": torch.tensor([2, 2])},
        ),
    ),
    Species(
        "Cosmos3 vision",
        packed(
            "cosmos3_edge.Cosmos3EdgeVisionConfig", "cosmos3_edge.Cosmos3EdgeVisionModel", frames=1, num_patches=16
        ),
    ),
    Species("MiniCPM-V 4.6 vision", minicpm("minicpmv4_6.MiniCPMV4_6")),
    Species("Step 3.7 vision", tower("step3p7.Step3p7Vision", mlp_ratio=2.0)),
    Species(
        "Molmo 2 vision",
        tower(
            "molmo2.Molmo2Vision",
            lambda: {"pixel_values": noise(2, 16, 192)},
            image_size=[32, 32],
            num_key_value_heads=4,
        ),
    ),
    Species("Gemma 4 vision", gemma4),
    Species("Qianfan-OCR vision", tower("qianfan_ocr.QianfanOCRVision", image_size=[32, 32], patch_size=[8, 8])),
    Species("Granite-Docling vision", tower("granite_docling.GraniteDoclingVision")),
    Species(
        "Florence-2 vision",
        tower(
            "florence2.Florence2Vision",
            lambda: {"hidden_states": pixels(64)},
            cls="florence2.Florence2VisionBackbone",
            depths=[1, 1, 1, 1],
            embed_dim=[16, 16, 32, 32],
            num_heads=[2, 2, 4, 4],
            num_groups=[2, 2, 4, 4],
            window_size=4,
            patch_size=[7, 3, 3, 3],
            projection_dim=32,
        ),
        not_eager="what it returns as attentions are the outputs of the attention modules",
    ),
    Species(
        "GOT-OCR 2 vision",
        tower(
            "got_ocr2.GotOcr2Vision",
            lambda: {"pixel_values": pixels(48)},
            cls="got_ocr2.GotOcr2VisionEncoder",
            image_size=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
    ),
    Species(
        "PP-FormulaNet vision",
        tower(
            "pp_formulanet.PPFormulaNetVision",
            lambda: {"pixel_values": pixels(48)},
            image_size=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
            post_conv_in_channels=16,
            post_conv_mid_channels=16,
            post_conv_out_channels=16,
            decoder_hidden_size=32,
        ),
    ),
    Species(
        "SLANeXt vision",
        tower(
            "slanext.SLANeXtVision",
            lambda: {"pixel_values": pixels(48)},
            cls="slanext.SLANeXtVisionEncoder",
            image_size=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
        ),
    ),
    Species(
        "DeepSeek-OCR 2 SAM",
        tower(
            "deepseek_ocr2.DeepseekOcr2SamVision",
            lambda: {"pixel_values": pixels(48)},
            cls="deepseek_ocr2.DeepseekOcr2SamVisionEncoder",
            image_size=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
            downsample_channels=[16, 16],
        ),
    ),
    Species(
        "GLM-4.5V MoE vision",
        packed("glm4v_moe.Glm4vMoeVisionConfig", "glm4v_moe.Glm4vMoeVisionModel"),
        ignored=TABLE,
    ),
    Species("GLM-5 vision", packed("glm5_next.Glm5NextVisionConfig", "glm5_next.Glm5NextVisionModel")),
    Species(
        "Qwen3-VL MoE vision",
        packed("qwen3_vl_moe.Qwen3VLMoeVisionConfig", "qwen3_vl_moe.Qwen3VLMoeVisionModel", **DEEPSTACK),
    ),
    Species(
        "Qwen3.5 MoE vision",
        packed(
            "qwen3_5_moe.Qwen3_5MoeVisionConfig", "qwen3_5_moe.Qwen3_5MoeVisionModel", num_position_embeddings=16
        ),
    ),
    Species(
        "Qwen2.5-Omni vision",
        packed(
            "qwen2_5_omni.Qwen2_5OmniVisionEncoderConfig",
            "qwen2_5_omni.Qwen2_5OmniVisionEncoder",
            window_size=32,
            fullatt_block_indexes=[1],
        ),
    ),
    Species(
        "Qwen3-Omni vision",
        packed(
            "qwen3_omni_moe.Qwen3OmniMoeVisionEncoderConfig",
            "qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
            **DEEPSTACK,
        ),
    ),
    Species(
        "Muse Glimmer vision",
        packed(
            "muse_glimmer.MuseGlimmerVisionConfig",
            "muse_glimmer.MuseGlimmerVisionModel",
            pos_emb_height=4,
            pos_emb_width=4,
        ),
    ),
    Species("MiniCPM-OCR vision", minicpm("minicpm_ocr.MiniCPMOcr")),
    Species("MiniCPM-V 4.7 vision", minicpm("minicpmv4_7.MiniCPMV4_7")),
    Species("Kosmos-2.5 vision", kosmos25),
    Species(
        "Unlimited-OCR SAM",
        tower(
            "unlimited_ocr.UnlimitedOcrSamVision",
            lambda: {"pixel_values": pixels(48)},
            cls="unlimited_ocr.UnlimitedOcrSamVisionEncoder",
            image_size=48,
            output_channels=16,
            window_size=4,
            global_attn_indexes=[1],
            mlp_dim=48,
            downsample_channels=[16, 16],
        ),
    ),
    Species("DeepSeek-OCR 2 encoder", encoder("deepseek_ocr2.DeepseekOcr2")),
    Species("Chameleon VQ encoder", chameleon),
    Species("Emu3 VQ", emu3),
)
