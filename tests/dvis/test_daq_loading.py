"""Configurations and weights: layouts of checkpoints, sizes read off shapes, and what is said where they clash."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daq_models import GOLDEN, TINY, frames, golden_config, golden_tensors, needs_golden, tiny
from foveate.errors import ModelError, UsageError
from foveate_dvis.daq.config import DaqConfig, RefinerConfig, ResNetConfig, SwinConfig, TrackerConfig
from foveate_dvis.daq.infer import infer_config
from foveate_dvis.daq.keys import our_name, translate
from foveate_dvis.daq.loading import load_daq, load_state, unwrapped
from foveate_dvis.daq.network import DvisDaq

OFFLINE = replace(TINY, refiner=RefinerConfig(layers=2, local_attention=True, top_tracks=4))


def published(model: DvisDaq) -> dict[str, Tensor]:
    """The state dict of a ResNet model under upstream's names, written from the list of those names."""
    ours = model.state_dict()
    state = {name: value for name, value in ours.items() if name.startswith(("tracker.", "refiner."))}
    pixel, head = "segmenter.model.pixel_level_module", "sem_seg_head.pixel_decoder"
    state |= _resnet(ours, f"{pixel}.encoder")
    for name, value in ours.items():
        if name.startswith(f"{pixel}.decoder."):
            rest = name.removeprefix(f"{pixel}.decoder.")
            for a, b in (
                ("input_projections.", "input_proj."),
                ("encoder.layers.", "transformer.encoder.layers."),
                ("fc1", "linear1"),
                ("fc2", "linear2"),
                ("self_attn_layer_norm", "norm1"),
                ("final_layer_norm", "norm2"),
                ("mask_projection", "mask_features"),
                ("adapter_1.0", "adapter_1"),
                ("adapter_1.1", "adapter_1.norm"),
                ("layer_1.0", "layer_1"),
                ("layer_1.1", "layer_1.norm"),
            ):
                rest = rest.replace(a, b)
            state[f"{head}.{'transformer.level_embed' if rest == 'level_embed' else rest}"] = value
    return state | _predictor(ours, model.config.decoder_layers)


def _resnet(ours: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    state = {}
    for name, value in ours.items():
        if not name.startswith(prefix) or name.endswith("num_batches_tracked"):
            continue
        parts = name.removeprefix(f"{prefix}.").split(".")
        leaf = "weight" if "convolution" in parts else f"norm.{parts[-1]}"
        if parts[0] == "embedder":
            state[f"backbone.stem.conv1.{leaf}"] = value
        else:  # encoder.stages.S.layers.B.(layer.I | shortcut).(convolution | normalization).x
            conv = "shortcut" if parts[5] == "shortcut" else f"conv{int(parts[6]) + 1}"
            state[f"backbone.res{int(parts[2]) + 2}.{parts[4]}.{conv}.{leaf}"] = value
    return state


def _predictor(ours: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    head, module = "sem_seg_head.predictor", "segmenter.model.transformer_module"
    decoder = f"{module}.decoder"
    names = {
        f"{head}.query_feat.weight": f"{module}.queries_features.weight",
        f"{head}.query_embed.weight": f"{module}.queries_embedder.weight",
        f"{head}.level_embed.weight": f"{module}.level_embed.weight",
    }
    for leaf in ("weight", "bias"):
        names[f"{head}.class_embed.{leaf}"] = f"segmenter.class_predictor.{leaf}"
        names[f"{head}.decoder_norm.{leaf}"] = f"{decoder}.layernorm.{leaf}"
        for i in range(3):
            names[f"{head}.mask_embed.layers.{i}.{leaf}"] = f"{decoder}.mask_predictor.mask_embedder.{i}.0.{leaf}"
        for i in range(layers):
            at, cross = f"{decoder}.layers.{i}", f"{head}.transformer_cross_attention_layers.{i}"
            own, ffn = f"{head}.transformer_self_attention_layers.{i}", f"{head}.transformer_ffn_layers.{i}"
            names[f"{cross}.multihead_attn.in_proj_{leaf}"] = f"{at}.cross_attn.in_proj_{leaf}"
            names[f"{cross}.multihead_attn.out_proj.{leaf}"] = f"{at}.cross_attn.out_proj.{leaf}"
            names[f"{cross}.norm.{leaf}"] = f"{at}.cross_attn_layer_norm.{leaf}"
            names[f"{own}.self_attn.out_proj.{leaf}"] = f"{at}.self_attn.out_proj.{leaf}"
            names[f"{own}.norm.{leaf}"] = f"{at}.self_attn_layer_norm.{leaf}"
            names[f"{ffn}.linear1.{leaf}"] = f"{at}.fc1.{leaf}"
            names[f"{ffn}.linear2.{leaf}"] = f"{at}.fc2.{leaf}"
            names[f"{ffn}.norm.{leaf}"] = f"{at}.final_layer_norm.{leaf}"
    state = {theirs: ours[mine] for theirs, mine in names.items()}
    for i in range(layers):
        for leaf in ("weight", "bias"):
            parts = [ours[f"{decoder}.layers.{i}.self_attn.{letter}_proj.{leaf}"] for letter in "qkv"]
            state[f"{head}.transformer_self_attention_layers.{i}.self_attn.in_proj_{leaf}"] = torch.cat(parts)
    return state


@pytest.fixture(scope="module")
def model() -> DvisDaq:
    return tiny("offline", seed=2)


@pytest.fixture(scope="module")
def state(model: DvisDaq) -> dict[str, Tensor]:
    extra = {
        "daq_criterion.empty_weight": torch.ones(4),
        "sem_seg_head.predictor.reid_embed.layers.0.bias": torch.ones(3),
    }
    return published(model) | extra


# ------------------------------------------------------------------------------------ weights


def same(a: DvisDaq, b: DvisDaq) -> None:
    clip = frames(2)
    x, y = a(clip), b(clip)
    assert torch.equal(x.final_logits, y.final_logits)
    assert torch.equal(x.final_masks, y.final_masks)


@pytest.mark.parametrize("layout", ["flat", "model", "module"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_layouts(layout: str, suffix: str, model: DvisDaq, state: dict[str, Tensor], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    content: dict[str, Any] = {f"module.{k}": v for k, v in state.items()} if layout == "module" else dict(state)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": content, "iteration": 7} if layout == "model" else content, path)
    else:
        save_file({k: v.clone().contiguous() for k, v in content.items()}, path)
    loaded = load_daq(path, config=model.config)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    same(loaded.model, model)


def test_a_folder_with_its_configuration(model: DvisDaq, state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "model.pth")
    (tmp_path / "daq_config.json").write_text(json.dumps(model.config.to_json()))
    loaded = load_daq(tmp_path)
    assert loaded.config == model.config
    assert loaded.weights.name == "model.pth"
    same(loaded.model, model)
    online = load_daq(tmp_path, mode="online")
    assert online.model.refiner is None
    assert torch.equal(online.model(frames(2)).pred_logits, model(frames(2)).pred_logits)


class Opaque:
    """Something that only a real unpickling could restore."""


def test_a_pickle_that_holds_more_is_refused_with_the_command(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"model": state, "config": Opaque()}, path)
    with pytest.raises(ModelError, match="weights_only") as caught:
        load_daq(path, config=OFFLINE)
    assert "foveate_vit.convert --trust-this-file" in caught.value.remedy


def test_no_file_or_several(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_daq(tmp_path / "absent.pth")
    with pytest.raises(ModelError, match="holds 0 files"):
        load_daq(tmp_path)
    for name in ("a.pth", "b.pth"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ModelError, match="holds 2 files"):
        load_daq(tmp_path)
    with pytest.raises(ModelError, match="no tensors"):
        load_daq(tmp_path / "a.pth")


def test_missing_unknown_and_misshapen_are_listed(model: DvisDaq, state: dict[str, Tensor]) -> None:
    broken = dict(state)
    del broken["tracker.bg_slots.weight"]
    broken["tracker.another.weight"] = torch.ones(1)
    broken["tracker.class_embed.bias"] = torch.ones(9)
    broken["something.else"] = torch.ones(1)
    with pytest.raises(ModelError) as caught:
        load_state(DvisDaq(model.config), broken)
    said = str(caught.value)
    assert "1 missing: tracker.bg_slots.weight" in said
    assert "2 unknown: something.else, tracker.another.weight" in said
    assert "1 of another shape: tracker.class_embed.bias (9,) for (4,)" in said


def test_nan_is_refused(model: DvisDaq, state: dict[str, Tensor]) -> None:
    broken = state | {"tracker.class_embed.bias": torch.full((4,), torch.nan)}
    with pytest.raises(ModelError, match="NaN"):
        load_state(DvisDaq(model.config), broken)


def test_offline_needs_a_refiner(state: dict[str, Tensor], tmp_path: Path) -> None:
    online = {k: v for k, v in state.items() if not k.startswith("refiner.")}
    torch.save(online, tmp_path / "model.pth")
    assert load_daq(tmp_path).config.mode == "online"
    with pytest.raises(ModelError, match="no refiner"):
        load_daq(tmp_path, mode="offline")
    with pytest.raises(ModelError, match="missing: refiner"):
        load_daq(tmp_path, config=OFFLINE)


def test_unwrapping_touches_only_a_common_prefix() -> None:
    mixed = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert unwrapped(mixed) == mixed


# ------------------------------------------------------------------------------------ sizes from shapes


def test_sizes_are_read_off_the_shapes(model: DvisDaq, state: dict[str, Tensor]) -> None:
    found = infer_config(state, dataset="ytvis19")
    rules = TrackerConfig(layers=2, slots=2, select_threshold=0.01, ovis_rule=False)
    expected = replace(model.config, tracker=rules, window=5, max_num=20, refiner=RefinerConfig(2, True, 40))
    assert found == expected


@needs_golden
def test_sizes_of_the_recorded_model() -> None:
    found, known = infer_config(golden_tensors("state_dict")), golden_config("offline")
    for name in (
        "backbone",
        "num_classes",
        "num_queries",
        "hidden_dim",
        "heads",
        "encoder_layers",
        "encoder_ffn_dim",
    ):
        assert getattr(found, name) == getattr(known, name), name
    for name in ("conv_dim", "mask_dim", "decoder_layers", "ffn_dim"):
        assert getattr(found, name) == getattr(known, name), name
    assert (found.tracker.layers, found.tracker.slots) == (2, 3)
    assert found.refiner == RefinerConfig(2, True, 40)
    loaded = load_daq(GOLDEN / "state_dict.safetensors", mode="online")
    assert loaded.config.mode == "online"
    assert loaded.config.tracker.select_threshold == 0.1


def test_other_state_dicts_are_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(ModelError, match="not a state dict of DVIS-DAQ"):
        infer_config({"model.layer.weight": torch.ones(2, 2)})
    vit = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    with pytest.raises(ModelError, match="ViT-adapter"):
        infer_config(vit | {"backbone.vit_module.cls_token": torch.ones(1)})
    with pytest.raises(ModelError, match="no backbone known"):
        infer_config(vit)


# ------------------------------------------------------------------------------------ configurations


def test_published_rules() -> None:
    ovis = DaqConfig.preset("ovis")
    assert (ovis.num_classes, ovis.num_queries, ovis.max_num, ovis.window) == (25, 100, 20, 5)
    tracker = ovis.tracker
    assert (tracker.select_threshold, tracker.keep_threshold, tracker.patience, tracker.slots) == (0.1, 0.01, 8, 5)
    assert (tracker.first_threshold, tracker.noise_frames, tracker.layers, tracker.ovis_rule) == (0.01, 5, 6, True)
    offline = DaqConfig.preset("ovis", mode="offline")
    assert offline.tracker.select_threshold == 0.05
    assert offline.refiner == RefinerConfig(6, False, 40)
    for name in ("ytvis19", "ytvis21"):
        youtube = DaqConfig.preset(name, num_classes=3, num_queries=200, num_new_ins=200, backbone=SwinConfig())
        assert (youtube.num_classes, youtube.tracker.select_threshold, youtube.tracker.ovis_rule) == (
            3,
            0.01,
            False,
        )
    with pytest.raises(UsageError, match="coco"):
        DaqConfig.preset("coco")
    with pytest.raises(UsageError, match="batch"):
        DaqConfig.preset("ovis", mode="batch")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        OFFLINE,
        DaqConfig.preset("ytvis21", backbone=SwinConfig()),
        replace(TINY, labels=("cod", "eel", "ray")),
    ],
)
def test_configurations_come_back(config: DaqConfig) -> None:
    assert DaqConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backbone": {"name": "build_vit"}}, "not supported"),
        ({"backbone": {"name": "build_resnet_backbone", "depth": 18}}, "ResNet-18"),
        ({"backbone": {"name": "resnet", "stride_in_1x1": True}}, "1x1"),
        ({"backbone": {"name": "resnet", "width_per_group": 32}}, "4 x inner"),
        ({"task": "vps"}, "'vps'"),
        ({"pre_norm": True}, "pre_norm"),
        ({"encoder_points": 8}, "encoder_points"),
        ({"tracker": {"num_new_ins": 7}}, "expected equal"),
        ({"tracker": {"layers": 0}}, "layers = 0"),
        ({"refiner": {"offline_topk_ins": 0}}, "0 tracks"),
        ({"labels": ["one"]}, "1 class names for 25 classes"),
    ],
)
def test_what_a_configuration_may_not_say(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        DaqConfig.from_json({"num_queries": 100} | change)


def test_a_configuration_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a configuration of DVIS-DAQ"):
        DaqConfig.from_json({"model_type": "vit"})
    with pytest.raises(ModelError, match="has no configuration"):
        DaqConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="one JSON object"):
        DaqConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not a readable JSON"):
        DaqConfig.from_folder(tmp_path)


# ------------------------------------------------------------------------------------ names


def test_every_parameter_has_exactly_one_published_name(model: DvisDaq, state: dict[str, Tensor]) -> None:
    ours, unknown = translate(state)
    assert unknown == []
    expected = {k for k in model.state_dict() if "num_batches_tracked" not in k and "criterion" not in k}
    assert set(ours) == expected
    assert our_name("backbone.stem.conv2.weight") is None


def test_a_resnet_of_other_depths() -> None:
    config = replace(TINY, backbone=ResNetConfig(8, 16, (2, 1, 3, 1), 4))
    net = DvisDaq(config)
    assert infer_config(published(net)).backbone == config.backbone


def test_the_published_sizes_have_the_published_numbers_of_parameters() -> None:
    """Millions, as counted on the original OVIS model of ResNet-50."""
    with torch.device("meta"):
        net = DvisDaq(DaqConfig.preset("ovis", mode="offline"))
    assert net.refiner is not None
    level = net.segmenter.model.pixel_level_module
    counts = {
        "backbone": sum(p.numel() for p in level.encoder.parameters()),
        "pixel decoder": sum(p.numel() for p in level.decoder.parameters()),
        "tracker": sum(p.numel() for p in net.tracker.parameters()),
        "refiner": sum(p.numel() for p in net.refiner.parameters()),
    }
    assert {name: round(count / 1e6, 1) for name, count in counts.items()} == {
        "backbone": 23.5,
        "pixel decoder": 6.0,
        "tracker": 18.6,
        "refiner": 11.3,
    }
