"""Checkpoints that name a timm backbone open without timm, and compute what they did."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from detr_models import DENSE, photos, sharpen
from foveate.errors import MissingDependencyError, ModelError
from foveate.plugins.opening import open_source
from foveate_detr.backbones import rename

SMALL = {key: value for key, value in DENSE.items() if key != "backbone_config"}
PROCESSOR = {"image_processor_type": "DetrImageProcessor", "size": {"shortest_edge": 64, "longest_edge": 96}}


class Block(nn.Module):
    """A residual block as timm names its parts: two 3 x 3 convolutions, or 1 x 1, 3 x 3 with the stride, 1 x 1."""

    def __init__(self, before: int, width: int, after: int, stride: int, *, deep: bool) -> None:
        super().__init__()
        shapes = (
            [(before, width, 1), (width, width, 3), (width, after, 1)]
            if deep
            else [
                (before, width, 3),
                (width, after, 3),
            ]
        )
        self.count = len(shapes)
        for i, (a, b, k) in enumerate(shapes, 1):
            step = stride if i == (2 if deep else 1) else 1
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, step, k // 2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = None
        if before != after or stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x if self.downsample is None else self.downsample(x), x
        for i in range(1, self.count + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            y = y if i == self.count else y.relu()
        return (y + kept).relu()


class TimmResNet(nn.Module):
    """The network of He et al. 2016 with timm's names, written here as an oracle."""

    def __init__(self, depths: tuple[int, ...], *, deep: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        before = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            after = width * (4 if deep else 1)
            blocks = []
            for i in range(depth):
                stride = 2 if stage and not i else 1
                blocks.append(Block(before, width, after, stride, deep=deep))
                before = after
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(before, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
        for stage in (1, 2, 3, 4):
            x = getattr(self, f"layer{stage}")(x)
        return x


@torch.no_grad()
def oracle(name: str) -> TimmResNet:
    made = TimmResNet({"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name], deep=name == "resnet50").eval()
    generator = torch.Generator().manual_seed(3)
    for key, value in made.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.dim() == 1:
            value.normal_(0.1 if "bias" in key or "mean" in key else 1.0, 0.1, generator=generator)
        elif value.dim() > 1:
            value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
    return made


def checkpoint(folder: Path, family: str, backbone: str, timm: TimmResNet) -> Path:
    """A folder as the authors publish it: timm's names, and a configuration that asks for timm."""
    twin = open_source(family, weights="random", config=SMALL | {"backbone": backbone, "use_timm_backbone": True})
    sharpen(twin.module, 4.0)
    state = {k: v for k, v in twin.module.state_dict().items() if ".backbone." not in k}
    prefix = next(k for k in twin.module.state_dict() if "embedder.embedder" in k).split("embedder.embedder")[0]
    state |= {prefix + key: value for key, value in timm.state_dict().items()}
    config = SMALL | {"backbone": backbone, "use_timm_backbone": True, "model_type": twin.module.config.model_type}
    config |= {"architectures": [type(twin.module).__name__]}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("family", "backbone"),
    [("detr", "resnet50"), ("conditional-detr", "resnet18"), ("table-transformer", "resnet18")],
)
def test_timm_checkpoints_open_and_compute_the_same(tmp_path: Path, family: str, backbone: str) -> None:
    timm = oracle(backbone)
    source = open_source(checkpoint(tmp_path / "m", family, backbone, timm), source=family, canvas="batch")
    batch = source.encode(photos((64, 90)))
    with torch.no_grad():
        found = source.feature_map(batch)
        expected = timm(batch.inputs)
    torch.testing.assert_close(found, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    assert source.strides == (32.0,)


def test_backbones_that_only_timm_has_name_the_remedy() -> None:
    for change in ({"backbone": "convnext_tiny"}, {"backbone": "resnet50", "dilation": True}):
        config = SMALL | change | {"use_timm_backbone": True}
        with pytest.raises(MissingDependencyError, match="pip install timm"):
            open_source("detr", weights="random", config=config)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "m", "detr", "resnet18", oracle("resnet18"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights found"):
        open_source(folder)


@pytest.mark.parametrize("missing", [r"layer2\.0\.downsample", r"layer4\.1\.bn2"])
def test_a_missing_backbone_weight_is_an_error(tmp_path: Path, missing: str) -> None:
    timm: Any = oracle("resnet18")
    folder = checkpoint(tmp_path / "m", "detr", "resnet18", timm)
    from safetensors.torch import load_file

    state = {k: v for k, v in load_file(folder / "model.safetensors").items() if not re.search(missing, k)}
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ModelError, match="parameters are missing"):
        open_source(folder)


def test_names_outside_the_backbone_are_left_alone() -> None:
    for key in (
        "model.encoder.layers.0.fc1.weight",
        "class_labels_classifier.bias",
        "model.layer1.0.conv1.weight",
    ):
        assert rename(key) == key
    prefix = "model.backbone.conv_encoder.model."
    assert rename(prefix + "fc.weight") is None
    assert rename(prefix + "layer1.0.bn1.num_batches_tracked") is None
    assert rename(prefix + "layer3.4.bn2.running_var") == (
        prefix + "encoder.stages.2.layers.4.layer.1.normalization.running_var"
    )
