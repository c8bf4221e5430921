"""The configuration that tensors' shapes show, for weights that come without one.

Shapes fix every size. The rules, which no tensor shows, are those of a data set's preset.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError
from foveate_dvis.daq.config import DaqConfig, Mode, RefinerConfig, ResNetConfig, SwinConfig

if TYPE_CHECKING:
    from torch import Tensor

OFFSETS_A_HEAD = 3 * 4 * 2
"""Numbers that a deformable layer of the pixel decoder predicts for one head: levels x points x (x, y)."""


def infer_config(state: Mapping[str, Tensor], *, dataset: str = "ovis", mode: Mode | None = None) -> DaqConfig:
    """Sizes from the tensors of a published state dict, rules from the preset of ``dataset``.

    ``mode`` None: offline where there is a refiner. Raises ModelError for a state dict that is not DVIS-DAQ's,
    for an unsupported backbone, or for mode "offline" without a refiner.
    """
    predictor, tracker = "sem_seg_head.predictor", "tracker"
    queries, width = _shape(state, f"{predictor}.query_feat.weight")
    has_refiner = any(name.startswith("refiner.") for name in state)
    if mode == "offline" and not has_refiner:
        raise ModelError("these weights have no refiner: the offline mode needs one", remedy="open them online")
    mode = mode or ("offline" if has_refiner else "online")
    encoder = "sem_seg_head.pixel_decoder.transformer.encoder.layers"
    sizes: dict[str, Any] = {
        "backbone": _backbone(state),
        "num_queries": queries,
        "num_new_ins": queries,
        "hidden_dim": width,
        "conv_dim": _shape(state, "sem_seg_head.pixel_decoder.mask_features.weight")[1],
        "mask_dim": _shape(state, "sem_seg_head.pixel_decoder.mask_features.weight")[0],
        "heads": _shape(state, f"{encoder}.0.self_attn.sampling_offsets.weight")[0] // OFFSETS_A_HEAD,
        "encoder_layers": _count(state, encoder),
        "encoder_ffn_dim": _shape(state, f"{encoder}.0.linear1.weight")[0],
        "decoder_layers": _count(state, f"{predictor}.transformer_ffn_layers"),
        "ffn_dim": _shape(state, f"{predictor}.transformer_ffn_layers.0.linear1.weight")[0],
    }
    classes = _shape(state, f"{predictor}.class_embed.weight")[0] - 1
    config = DaqConfig.preset(dataset, mode=mode, num_classes=classes, **sizes)
    rules = replace(
        config.tracker,
        layers=_count(state, f"{tracker}.transformer_ffn_layers"),
        slots=_shape(state, f"{tracker}.bg_slots.weight")[0],
    )
    refiner = _refiner(state) if mode == "offline" else None
    return replace(config, tracker=rules, refiner=refiner)


def _refiner(state: Mapping[str, Tensor]) -> RefinerConfig:
    local = any(name.startswith("refiner.conv_short_aggregate_layers.") for name in state)
    return RefinerConfig(layers=_count(state, "refiner.transformer_ffn_layers"), local_attention=local)


def _backbone(state: Mapping[str, Tensor]) -> ResNetConfig | SwinConfig:
    if "backbone.stem.conv1.weight" in state:
        depths = tuple(_count(state, f"backbone.res{stage}") for stage in (2, 3, 4, 5))
        outer, inner = _shape(state, "backbone.res2.0.conv3.weight")[:2]
        return ResNetConfig(_shape(state, "backbone.stem.conv1.weight")[0], outer, depths, inner)
    if "backbone.patch_embed.proj.weight" in state:
        stages = range(_count(state, "backbone.layers"))
        tables = [
            _shape(state, f"backbone.layers.{stage}.blocks.0.attn.relative_position_bias_table")
            for stage in stages
        ]
        # A table holds every offset between two positions of a window of side w: (2 w - 1)^2 of them.
        return SwinConfig(
            width=_shape(state, "backbone.patch_embed.proj.weight")[0],
            depths=tuple(_count(state, f"backbone.layers.{stage}.blocks") for stage in stages),
            heads=tuple(heads for _, heads in tables),
            window=(round(tables[0][0] ** 0.5) + 1) // 2,
        )
    if any(name.startswith(("backbone.vit_module.", "backbone.interactions.")) for name in state):
        raise ModelError(
            "the ViT-adapter backbone of the published ViT-L models is not implemented",
            remedy="use a ResNet-50 or Swin-L checkpoint, or export runs from your own detectron2 installation",
        )
    raise ModelError("no backbone known here: expected names of detectron2's ResNet or of Swin under backbone.")


def _shape(state: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    if name not in state:
        raise ModelError(
            f"not a state dict of DVIS-DAQ: {name} is missing",
            remedy='expected upstream\'s names (backbone., sem_seg_head., tracker.), flat or under "model"',
        )
    return tuple(state[name].shape)


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered children a module has."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    found = {int(match[1]) for name in state if (match := pattern.match(name))}
    if not found:
        raise ModelError(f"not a state dict of DVIS-DAQ: no tensors under {prefix}.0")
    return max(found) + 1
