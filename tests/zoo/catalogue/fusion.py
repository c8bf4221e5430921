"""Pictures and words together: cross-attention, query transformers, single streams, decoders."""

from __future__ import annotations

from typing import Any

import torch

from zoo.catalogue.plain import text
from zoo.species import Build, Species, model, noise, padded, pixels, small, words

Built = tuple[torch.nn.Module, dict[str, Any]]


def sentence(length: int = 9) -> dict[str, Any]:
    return {"input_ids": words(length), "attention_mask": padded(length)}


def both(kind: str, cls: str = "", **given: Any) -> Build:
    """A model of two towers on two pictures and two sentences."""

    def build() -> Built:
        return model(cls or f"{kind}Model", small(f"{kind}Config", **given)), {
            "pixel_values": pixels(),
            **sentence(),
        }

    return build


def bridgetower() -> Built:
    config = small("BridgeTowerConfig", vision_config={"hidden_size": 64}, link_tower_type="add")
    return model("BridgeTowerModel", config), {"pixel_values": pixels(), **sentence()}


def vilt() -> Built:
    return model("ViltModel", small("ViltConfig")), {
        "pixel_values": pixels(),
        "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long),
        **sentence(),
    }


def visual_bert() -> Built:
    config = small("VisualBertConfig", visual_embedding_dim=24)
    return model("VisualBertModel", config), {
        **sentence(),
        "visual_embeds": noise(2, 5, 24),
        "visual_attention_mask": padded(5, missing=2),
    }


def lxmert() -> Built:
    config = small("LxmertConfig", l_layers=1, x_layers=2, r_layers=1, visual_feat_dim=24)
    return model("LxmertModel", config), {
        **sentence(),
        "visual_feats": noise(2, 5, 24),
        "visual_pos": noise(2, 5, 4).sigmoid(),
        "visual_attention_mask": padded(5, missing=2).float(),
    }


def layoutlm() -> Built:
    config = small(
        "LayoutLMv3Config",
        input_size=32,
        coordinate_size=6,
        shape_size=4,
        max_2d_position_embeddings=100,
        hidden_size=32,
    )
    boxes = torch.randint(0, 40, (2, 9, 4), generator=torch.Generator().manual_seed(3)).cumsum(-1) // 4
    return model("LayoutLMv3Model", config), {**sentence(), "bbox": boxes, "pixel_values": pixels()}


def blip_text() -> Built:
    config = small("BlipTextConfig", encoder_hidden_size=32, is_decoder=True)
    return model("BlipTextModel", config), {
        **sentence(),
        "encoder_hidden_states": noise(2, 17, 32),
        "encoder_attention_mask": padded(17, missing=5),
    }


def qformer(kind: str, text_input: bool) -> Build:
    def build() -> Built:
        config = small(f"{kind}QFormerConfig", encoder_hidden_size=32)
        seen = {
            "query_embeds": noise(2, 5, 32),
            "encoder_hidden_states": noise(2, 17, 32, seed=4),
            "encoder_attention_mask": padded(17, missing=5),
        }
        if text_input:
            seen |= {"input_ids": words(6), "attention_mask": torch.cat([torch.ones(2, 5), padded(6)], 1)}
        return model(f"{kind}QFormerModel", config), seen

    return build


def git() -> Built:
    config = small("GitConfig")
    return model("GitModel", config), {**sentence(), "pixel_values": pixels()}


def tvp() -> Built:
    from zoo.catalogue.detection import resnet

    config = small(
        "TvpConfig",
        backbone_config=resnet("stage2", widths=(8, 32)),
        num_frames=2,
        max_img_size=64,
        visual_prompt_size=8,
    )
    return model("TvpModel", config), {
        "input_ids": words(batch=1),
        "attention_mask": padded(batch=1),
        "pixel_values": pixels(64, frames=2, batch=1),
    }


def pix2struct_vision() -> Built:
    config = small("Pix2StructVisionConfig", patch_embed_hidden_size=48, d_ff=48, d_kv=8, seq_len=16)
    return model("Pix2StructVisionModel", config), {
        "flattened_patches": torch.cat(
            [torch.arange(1, 17).reshape(1, 16, 1).repeat(2, 1, 2) % 5, noise(2, 16, 48)], -1
        ),
        "attention_mask": padded(16, missing=4),
    }


def udop() -> Built:
    config = small("UdopConfig", d_kv=8, d_ff=48, num_layers=2, image_size=32, max_2d_position_embeddings=100)
    boxes = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(3)).cumsum(-1) / 4
    return model("UdopModel", config), {
        **sentence(),
        "bbox": boxes,
        "pixel_values": pixels(),
        "decoder_input_ids": words(5),
    }


def kosmos() -> Built:
    config = small(
        "Kosmos2Config",
        text_config={"embed_dim": 32, "layers": 2, "ffn_dim": 48, "attention_heads": 4},
        latent_query_num=3,
    )
    where = torch.zeros(2, 9, dtype=torch.long)
    where[:, 1:4] = 1
    return model("Kosmos2Model", config), {
        "pixel_values": pixels(),
        **sentence(),
        "image_embeds_position_mask": where,
    }


def flava() -> Built:
    return model("FlavaModel", small("FlavaConfig", hidden_size=32)), {"pixel_values": pixels(), **sentence()}


def dual() -> Built:
    from transformers import BertConfig, ViTConfig

    config = small("VisionTextDualEncoderConfig", vision_config=small(ViTConfig), text_config=small(BertConfig))
    return model("VisionTextDualEncoderModel", config), {"pixel_values": pixels(), **sentence()}


def idefics_perceiver() -> Built:
    config = small(
        "idefics2.Idefics2PerceiverConfig",
        resampler_n_latents=4,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    return model("idefics2.Idefics2PerceiverResampler", config), {
        "context": noise(2, 16, 32),
        "attention_mask": padded(16, missing=4),
    }


def trocr() -> Built:
    config = small(
        "TrOCRConfig",
        is_decoder=True,
        add_cross_attention=True,
        cross_attention_hidden_size=32,
        decoder_start_token_id=2,
    )
    return model("TrOCRForCausalLM", config), {
        **sentence(),
        "encoder_hidden_states": noise(2, 17, 32),
        "encoder_attention_mask": padded(17, missing=5),
    }


def mllama_text() -> Built:
    config = small(
        "MllamaTextConfig",
        cross_attention_layers=[1],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        pad_token_id=0,
    )
    mask = torch.zeros(2, 1, 9, 17)
    mask[1, ..., 12:] = torch.finfo(torch.float32).min
    return model("MllamaTextModel", config), {
        **sentence(),
        "cross_attention_states": noise(2, 17, 32),
        "cross_attention_mask": mask,
        "full_text_row_masked_out_mask": torch.ones(2, 1, 9, 1),
    }


def aria() -> Built:
    from types import SimpleNamespace

    from transformers.models.aria.modeling_aria import AriaProjector

    torch.manual_seed(0)
    config = SimpleNamespace(
        projector_patch_to_query_dict={16: 5},
        max_value_projector_patch_to_query_dict=5,
        vision_config=small("Idefics3VisionConfig"),
        text_config=SimpleNamespace(hidden_size=32, intermediate_size=48),
    )
    return AriaProjector(config).eval(), {"key_value_states": noise(2, 16, 32)}


def llava() -> Built:
    from transformers import CLIPVisionConfig, LlamaConfig

    config = small(
        "LlavaConfig",
        vision_config=small(CLIPVisionConfig),
        text_config=small(LlamaConfig),
        image_token_index=98,
        vision_feature_layer=-1,
    )
    ids = torch.cat([words(2), torch.full((2, 16), 98), words(4)], 1)
    return model("LlavaModel", config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels(),
    }


def paligemma() -> Built:
    from transformers import GemmaConfig, SiglipVisionConfig

    config = small(
        "PaliGemmaConfig",
        vision_config=small(SiglipVisionConfig, vision_use_head=False),
        text_config=small(GemmaConfig),
        image_token_index=98,
        projection_dim=32,
    )
    ids = torch.cat([torch.full((2, 16), 98), words(5)], 1)
    kinds = torch.cat([torch.zeros(2, 17), torch.ones(2, 4)], 1).long()
    return model("PaliGemmaModel", config), {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": kinds,
        "pixel_values": pixels(),
    }


SPECIES = (
    Species("CLIP", both("CLIP")),
    Species("ALIGN text", text("AlignText")),
    Species("AltCLIP text", text("AltCLIPText")),
    Species("Chinese CLIP text", text("ChineseCLIPText")),
    Species("SigLIP 2 text", text("Siglip2Text")),
    Species("Vision-text dual encoder", dual),
    Species("BridgeTower", bridgetower),
    Species("ViLT", vilt),
    Species("VisualBERT", visual_bert),
    Species("LXMERT", lxmert),
    Species("LayoutLMv3", layoutlm),
    Species("FLAVA", flava),
    Species("BLIP text", blip_text),
    Species("BLIP-2 Q-Former", qformer("Blip2", False)),
    Species("InstructBLIP Q-Former", qformer("InstructBlip", True)),
    Species("InstructBLIP video Q-Former", qformer("InstructBlipVideo", True)),
    Species("GIT", git),
    Species("Kosmos-2", kosmos),
    Species("TVP", tvp, note="one clip: its position tables do not broadcast over a batch"),
    Species("Pix2Struct vision", pix2struct_vision),
    Species("UDOP", udop),
    Species("Idefics2 perceiver", idefics_perceiver),
    Species("TrOCR decoder", trocr),
    Species("Mllama text", mllama_text),
    Species("Aria projector", aria),
    Species("LLaVA", llava),
    Species("PaliGemma", paligemma),
)
