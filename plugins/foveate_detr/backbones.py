"""Checkpoints whose configuration names a timm backbone, opened with transformers' own ResNet.

Most published DETR checkpoints say ``use_timm_backbone: true``. timm's ResNets and transformers' are the same
network under other names (stride in the 3 x 3 convolution, 7 x 7 stem, max-pooling), so the configuration is
rewritten and the weights renamed. Anything else needs timm itself, and the error says so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependencyError, ModelError
from foveate_vit import weights as files

if TYPE_CHECKING:
    from torch import Tensor

RESNETS: dict[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
"""Layer type and depths (He et al. 2016, CVPR, table 1)."""
_WIDTHS = {"basic": (64, 128, 256, 512), "bottleneck": (256, 512, 1024, 2048)}

_INSIDE = re.compile(r"(.*backbone\.(?:conv_encoder\.)?(?:model|_backbone)\.)(?:_backbone\.)?(.+)")
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(conv|bn)(\d+)\.(\w+)")
_SHORTCUT = re.compile(r"layer(\d+)\.(\d+)\.downsample\.([01])\.(\w+)")
_KINDS = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}


def names_timm(config: Any) -> bool:
    """Whether a configuration wants its backbone from timm."""
    return getattr(getattr(config, "backbone_config", None), "model_type", "") == "timm_backbone"


def without_timm(config: Any, name: str) -> Any:
    """The same configuration with transformers' ResNet.

    Raises MissingDependencyError for backbones that only timm has, where timm is not installed.
    """
    from transformers import ResNetConfig

    wanted = config.backbone_config
    backbone, stride = str(wanted.backbone).split(".")[0], getattr(wanted, "output_stride", None)
    if backbone not in RESNETS or stride not in (None, 32):
        if find_spec("timm") is not None:
            return config
        dilated = "" if stride in (None, 32) else f" dilated to stride {stride}"
        raise MissingDependencyError(
            f"{name}: its backbone {backbone!r}{dilated} is one of timm's, which is not installed",
            remedy="pip install timm; or a checkpoint with one of " + ", ".join(RESNETS),
        )
    kind, depths = RESNETS[backbone]
    stages = [f"stage{index}" for index in (wanted.out_indices or (1, 2, 3, 4))]
    config.backbone_config = ResNetConfig(
        num_channels=int(wanted.num_channels),
        embedding_size=64,
        hidden_sizes=list(_WIDTHS[kind]),
        depths=list(depths),
        layer_type=kind,
        out_features=stages,
    )
    return config


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A checkpoint's tensors with timm's ResNet names turned into transformers'; others keep theirs."""
    return {new: value for old, value in tensors.items() if (new := rename(old)) is not None}


def rename(key: str) -> str | None:
    """One name; None for what transformers' ResNet does not have (its classifier, batch counters)."""
    inside = _INSIDE.fullmatch(key)
    if inside is None:
        return key
    prefix, name = inside.groups()
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    if name.startswith(("conv1.", "bn1.")):
        part, field = name.split(".")
        return f"{prefix}embedder.embedder.{_KINDS[part[:-1]]}.{field}"
    if block := _BLOCK.fullmatch(name):
        stage, layer, kind, number, field = block.groups()
        place = f"encoder.stages.{int(stage) - 1}.layers.{layer}.layer.{int(number) - 1}"
        return f"{prefix}{place}.{_KINDS[kind]}.{field}"
    if shortcut := _SHORTCUT.fullmatch(name):
        stage, layer, kind, field = shortcut.groups()
        return f"{prefix}encoder.stages.{int(stage) - 1}.layers.{layer}.shortcut.{_KINDS[kind]}.{field}"
    return key


def read_renamed(place: str, revision: str = "") -> dict[str, Tensor]:
    """Renamed tensors of a file, a folder or a hub id. Raises ModelError where there are no weights."""
    path = Path(place)
    found = [path] if path.is_file() else files.weight_files(path) if path.is_dir() else _cached(place, revision)
    if not found:
        raise ModelError(f"{place}: no weights found", remedy="model.safetensors, or a pickle of tensors")
    return renamed({name: value for file in found for name, value in files.read_state(file).items()})


def _cached(place: str, revision: str) -> list[Path]:
    from transformers.utils import cached_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        found = cached_file(place, name, revision=revision or None, _raise_exceptions_for_missing_entries=False)
        if found:
            return [Path(found)]
    return []
