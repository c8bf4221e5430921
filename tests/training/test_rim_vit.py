"""The shipped classifier and its twins are what their cards say."""

from __future__ import annotations

import csv
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "core" / "foveate" / "assets"
TWINS = ("rim-vit", "rim-vit-untrained", "rim-vit-shuffled")

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rim_vit", ROOT / "training" / "rim_vit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["rim_vit"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def opened(script: ModuleType, name: str) -> torch.nn.Module:
    return script.ViTForImageClassification.from_pretrained(ASSETS / name).eval()


def held_out(script: ModuleType, count: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    return script.as_input(script.rim_discs(count, seed=script.HELD_OUT_SEED))


@pytest.mark.parametrize("name", TWINS)
def test_the_files_are_small_float16_and_opened_in_float32(script: ModuleType, name: str) -> None:
    from safetensors.torch import load_file

    weights = ASSETS / name / "model.safetensors"
    assert weights.stat().st_size < 1_000_000
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    model = opened(script, name)
    assert model.dtype == torch.float32
    assert tuple(model.config.id2label.values()) == tuple(script.CLASSES)


@pytest.mark.parametrize(("name", "low", "high"), [("rim-vit", 0.97, 1), (TWINS[1], 0, 0.3), (TWINS[2], 0, 0.3)])
def test_held_out_accuracy(script: ModuleType, name: str, low: float, high: float) -> None:
    assert low <= script.accuracy(opened(script, name), *held_out(script)) <= high


def test_the_shuffled_twin_remembers_its_permuted_labels(script: ModuleType) -> None:
    pixels, labels = script.remembered_set()
    assert script.accuracy(opened(script, "rim-vit-shuffled"), pixels[:300], labels[:300]) > 0.85


def test_the_untrained_twin_is_where_training_started(script: ModuleType) -> None:
    start = script.build().half().state_dict()
    shipped = opened(script, "rim-vit-untrained").half().state_dict()
    assert all(torch.equal(start[name], shipped[name]) for name in start)


def test_the_input_is_what_the_shipped_processor_makes(script: ModuleType) -> None:
    from transformers import ViTImageProcessorPil

    processor = ViTImageProcessorPil.from_pretrained(ASSETS / "rim-vit")
    data = script.rim_discs(4, seed=3)
    made = processor(list(data.images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(script.as_input(data)[0], made, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", TWINS)
def test_card_and_log_agree(name: str) -> None:
    card = (ASSETS / name / "README.md").read_text()
    with (ASSETS / name / "training_log.csv").open() as file:
        log = list(csv.DictReader(file))
    steps = re.search(r"(\d+) steps of", card)
    assert (steps is None) == (not log)
    if steps is not None:
        assert float(log[-1]["step"]) == int(steps[1])
        assert f"{float(log[-1]['accuracy']):.4f}" in card


def test_training_moves_the_loss(script: ModuleType) -> None:
    check = script.as_input(script.rim_discs(20, seed=9))
    model = script.build()
    before = [value.clone() for value in model.parameters()]
    log = script.train(model, script.fresh_batches(), 3, check)
    assert [row["step"] for row in log] == [3]
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
