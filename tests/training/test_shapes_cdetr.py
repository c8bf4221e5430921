"""The shipped detector and its twin are what their cards say, and the script's parts do what they promise."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "core" / "foveate" / "assets"
NAMES = ("shapes-cdetr", "shapes-cdetr-untrained")

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("shapes_cdetr", ROOT / "training" / "shapes_cdetr.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["shapes_cdetr"] = module
    spec.loader.exec_module(module)
    return module


def opened(script: ModuleType, name: str) -> torch.nn.Module:
    return script.ConditionalDetrForObjectDetection.from_pretrained(ASSETS / name).eval()


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_small_float16_and_opened_in_float32(script: ModuleType, name: str) -> None:
    from safetensors.torch import load_file

    weights = ASSETS / name / "model.safetensors"
    assert weights.stat().st_size < 1_000_000
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    model = opened(script, name)
    assert model.dtype == torch.float32
    assert tuple(model.config.id2label.values()) == tuple(script.CLASSES)


@pytest.mark.parametrize(("name", "low", "high"), [(NAMES[0], 0.95, 1.0), (NAMES[1], 0.0, 0.05)])
def test_held_out_precision(script: ModuleType, name: str, low: float, high: float) -> None:
    found = script.precision(opened(script, name), script.scenes(150, seed=script.HELD_OUT_SEED))
    assert low <= found["ap50"] <= high
    assert found["ap75"] <= found["ap50"] + 1e-9


def test_the_card_says_what_the_log_ends_with(script: ModuleType) -> None:
    card = (ASSETS / NAMES[0] / "README.md").read_text()
    log = list(csv.DictReader((ASSETS / NAMES[0] / "training_log.csv").open(newline="")))
    assert int(log[-1]["step"]) == script.STEPS
    stated = re.search(r"AP50 \*\*([\d.]+)\*\*", card)
    assert stated is not None
    assert float(stated[1]) >= 0.75
    assert abs(float(stated[1]) - float(log[-1]["ap50"])) < 0.03
    assert f"{script.STEPS} steps of {script.BATCH}" in card
    assert len(list(csv.DictReader((ASSETS / NAMES[1] / "training_log.csv").open(newline="")))) == 0


def test_the_untrained_twin_is_where_training_starts(script: ModuleType) -> None:
    fresh, twin = script.build(), opened(script, NAMES[1])
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, fresh.state_dict()[name].half().float())


@pytest.mark.parametrize("turn", range(8))
def test_a_turned_picture_has_turned_boxes(script: ModuleType, turn: int) -> None:
    from foveate.testing.shapes import box_of

    scene = script.scenes(1, seed=3)[0]
    mask = script.turned(scene.masks[0][..., None], turn)[..., 0]
    x, y, width, height = script.truth(scene, turn)["boxes"][0].double().numpy() * script.SIZE
    found = (y - height / 2, x - width / 2, y + height / 2, x + width / 2)
    np.testing.assert_allclose(found, box_of(mask), atol=1e-4)


def test_thawed_and_frozen_again_the_model_answers_the_same(script: ModuleType) -> None:
    torch.manual_seed(0)
    model = script.build()
    script.thaw(model)
    pixels = script.as_input(np.stack([scene.image for scene in script.scenes(4, seed=3)]))
    model.train()
    for _ in range(3):
        model(pixel_values=pixels)  # statistics move
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    with torch.no_grad():
        expected, found = model(pixel_values=pixels), script.frozen(model)(pixel_values=pixels)
    torch.testing.assert_close(found.logits, expected.logits)
    assert not torch.allclose(found.logits, script.build().eval()(pixel_values=pixels).logits)


def test_a_few_steps_reduce_the_loss(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 12, "POOL": 32, "VALIDATION": 8, "LOG_EVERY": 6, "WARM_UP": 2}.items():
        monkeypatch.setattr(script, name, value)
    model = script.build()
    script.thaw(model)
    log = script.train(model)
    assert [row["step"] for row in log] == [6, 12]
    assert log[1]["loss"] < log[0]["loss"]
