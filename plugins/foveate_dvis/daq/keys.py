"""Names of parameters: from the published state dicts to this package's modules.

Tracker and refiner keep their names. The segmenter's follow transformers' Mask2Former, with the backbone that of
detectron2 (ResNet) or of the original Swin; attention whose query, key and value weights are one tensor there
and three here is split.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_ENCODER = "segmenter.model.pixel_level_module.encoder"
_PIXEL = "segmenter.model.pixel_level_module.decoder"
_DECODER = "segmenter.model.transformer_module.decoder"
_HEAD = r"sem_seg_head\.pixel_decoder"
_PREDICTOR = r"sem_seg_head\.predictor"

UNUSED = ("daq_criterion.", "criterion.", "sem_seg_head.predictor.reid_embed.", "pixel_mean", "pixel_std")
"""Beginnings of names that inference does not read: losses, and the head that learnt to tell instances apart."""

IGNORED_HERE = (
    "num_batches_tracked",
    "segmenter.criterion.",
    f"{_ENCODER}.swin.layernorm.",
    "relative_position_index",
)
"""Parts of our names that no checkpoint brings and no answer depends on."""

_RENAMED: tuple[tuple[str, str], ...] = (
    # backbone: ResNet
    (r"backbone\.stem\.conv1\.weight", rf"{_ENCODER}.embedder.embedder.convolution.weight"),
    (r"backbone\.stem\.conv1\.norm\.(\w+)", rf"{_ENCODER}.embedder.embedder.normalization.\1"),
    # pixel decoder
    (rf"{_HEAD}\.input_proj\.(.+)", rf"{_PIXEL}.input_projections.\1"),
    (rf"{_HEAD}\.transformer\.level_embed", rf"{_PIXEL}.level_embed"),
    (
        rf"{_HEAD}\.transformer\.encoder\.layers\.(\d+)\.linear([12])\.(\w+)",
        rf"{_PIXEL}.encoder.layers.\1.fc\2.\3",
    ),
    (
        rf"{_HEAD}\.transformer\.encoder\.layers\.(\d+)\.norm1\.(\w+)",
        rf"{_PIXEL}.encoder.layers.\1.self_attn_layer_norm.\2",
    ),
    (
        rf"{_HEAD}\.transformer\.encoder\.layers\.(\d+)\.norm2\.(\w+)",
        rf"{_PIXEL}.encoder.layers.\1.final_layer_norm.\2",
    ),
    (
        rf"{_HEAD}\.transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)",
        rf"{_PIXEL}.encoder.layers.\1.self_attn.\2",
    ),
    (rf"{_HEAD}\.mask_features\.(\w+)", rf"{_PIXEL}.mask_projection.\1"),
    (rf"{_HEAD}\.(adapter|layer)_(\d)\.weight", rf"{_PIXEL}.\1_\2.0.weight"),
    (rf"{_HEAD}\.(adapter|layer)_(\d)\.norm\.(\w+)", rf"{_PIXEL}.\1_\2.1.\3"),
    # masked-attention decoder
    (rf"{_PREDICTOR}\.class_embed\.(\w+)", r"segmenter.class_predictor.\1"),
    (rf"{_PREDICTOR}\.decoder_norm\.(\w+)", rf"{_DECODER}.layernorm.\1"),
    (rf"{_PREDICTOR}\.level_embed\.weight", r"segmenter.model.transformer_module.level_embed.weight"),
    (rf"{_PREDICTOR}\.query_embed\.weight", r"segmenter.model.transformer_module.queries_embedder.weight"),
    (rf"{_PREDICTOR}\.query_feat\.weight", r"segmenter.model.transformer_module.queries_features.weight"),
    (rf"{_PREDICTOR}\.input_proj\.(.+)", r"segmenter.model.transformer_module.input_projections.\1"),
    (rf"{_PREDICTOR}\.mask_embed\.layers\.(\d)\.(\w+)", rf"{_DECODER}.mask_predictor.mask_embedder.\1.0.\2"),
    (
        rf"{_PREDICTOR}\.transformer_cross_attention_layers\.(\d+)\.multihead_attn\.(.+)",
        rf"{_DECODER}.layers.\1.cross_attn.\2",
    ),
    (
        rf"{_PREDICTOR}\.transformer_cross_attention_layers\.(\d+)\.norm\.(\w+)",
        rf"{_DECODER}.layers.\1.cross_attn_layer_norm.\2",
    ),
    (
        rf"{_PREDICTOR}\.transformer_self_attention_layers\.(\d+)\.self_attn\.(.+)",
        rf"{_DECODER}.layers.\1.self_attn.\2",
    ),
    (
        rf"{_PREDICTOR}\.transformer_self_attention_layers\.(\d+)\.norm\.(\w+)",
        rf"{_DECODER}.layers.\1.self_attn_layer_norm.\2",
    ),
    (rf"{_PREDICTOR}\.transformer_ffn_layers\.(\d+)\.linear([12])\.(\w+)", rf"{_DECODER}.layers.\1.fc\2.\3"),
    (rf"{_PREDICTOR}\.transformer_ffn_layers\.(\d+)\.norm\.(\w+)", rf"{_DECODER}.layers.\1.final_layer_norm.\2"),
    # backbone: Swin
    (r"backbone\.patch_embed\.proj\.(\w+)", rf"{_ENCODER}.swin.embeddings.patch_embeddings.projection.\1"),
    (r"backbone\.patch_embed\.norm\.(\w+)", rf"{_ENCODER}.swin.embeddings.norm.\1"),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.norm1\.(\w+)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.layernorm_before.\3",
    ),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.norm2\.(\w+)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.layernorm_after.\3",
    ),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.(\w+)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention.in_proj_\3",
    ),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.(\w+)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention.o_proj.\3",
    ),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.attn\.(relative_position_bias_table)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.attention.relative_position_bias.\3",
    ),
    (
        r"backbone\.layers\.(\d+)\.blocks\.(\d+)\.mlp\.fc([12])\.(\w+)",
        rf"{_ENCODER}.swin.encoder.layers.\1.blocks.\2.mlp.fc\3.\4",
    ),
    (r"backbone\.layers\.(\d+)\.downsample\.(.+)", rf"{_ENCODER}.swin.encoder.layers.\1.downsample.\2"),
)
_RENAMES = tuple((re.compile(pattern), ours) for pattern, ours in _RENAMED)
_RESNET = re.compile(r"backbone\.res(\d)\.(\d+)\.(?:conv(\d)|(shortcut))\.(weight|norm\.\w+)")
_SWIN_NORM = re.compile(r"backbone\.norm(\d)\.(\w+)")
_JOINT = re.compile(r"(.+)\.in_proj_(weight|bias)")
_KEPT_JOINT = (".cross_attn.", "tracker.", "refiner.")


def is_unused(name: str) -> bool:
    """Whether inference does without this tensor of a published state dict."""
    return name.startswith(UNUSED) or name.endswith("relative_position_index")


def our_name(name: str) -> str | None:
    """Where a published parameter lies in :class:`~foveate_dvis.daq.network.DvisDaq`; None for unknown names.

    Query, key and value weights in one tensor keep an ``in_proj`` name; :func:`translate` splits them.
    """
    if name.startswith(("tracker.", "refiner.")):
        return name
    if found := _RESNET.fullmatch(name):
        return _resnet(found)
    if found := _SWIN_NORM.fullmatch(name):
        return f"{_ENCODER}.hidden_states_norms.stage{int(found[1]) + 1}.{found[2]}"
    for pattern, ours in _RENAMES:
        if found := pattern.fullmatch(name):
            return found.expand(ours)
    return None


def _resnet(found: re.Match[str]) -> str:
    stage, block, conv, shortcut, rest = found.groups()
    part = shortcut or f"layer.{int(conv) - 1}"
    leaf = "convolution.weight" if rest == "weight" else rest.replace("norm.", "normalization.")
    return f"{_ENCODER}.encoder.stages.{int(stage) - 2}.layers.{block}.{part}.{leaf}"


def translate(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A published state dict under our names, and its names that mean nothing to us (unused ones left out)."""
    ours: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in state.items():
        if is_unused(name):
            continue
        new = our_name(name)
        if new is None:
            unknown.append(name)
        else:
            ours |= _split(new, tensor)
    return ours, unknown


def _split(name: str, tensor: Tensor) -> dict[str, Tensor]:
    found = _JOINT.fullmatch(name)
    if found is None or any(part in name for part in _KEPT_JOINT):
        return {name: tensor}
    parts = zip("qkv", tensor.chunk(3), strict=True)
    return {f"{found[1]}.{letter}_proj.{found[2]}": part.clone() for letter, part in parts}
