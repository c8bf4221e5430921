"""The shipped segmenter of clips and its twin are what their cards say; so are the parts of the script."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foveate.plugins.opening import open_source
from foveate.plugins.registry import models
from foveate.plugins.rows import ModelRow
from foveate.testing.swimming import CLASSES, SIZE, TOLD_BY, clips
from foveate_dvis.swimmer_network import SwimmerOutput

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "core" / "foveate" / "assets"
NAMES = ("swim-vis", "swim-vis-untrained")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_swimming", ROOT / "training" / "swimming.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_swimming"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_files_are_small_float16_and_opened_in_float32(name: str) -> None:
    weights = ASSETS / name / "model.safetensors"
    assert weights.stat().st_size < 1_000_000
    assert weights.stat().st_mode & 0o044 == 0o044
    assert {value.dtype for value in load_file(weights).values()} == {torch.float16}
    source = open_source(f"foveate/{name}")
    assert {value.dtype for value in source.module.parameters()} == {torch.float32}
    row: ModelRow = models()[f"foveate/{name}"]
    assert row.sha256 == source.card.weights_sha256
    assert row.licence == "Apache-2.0"


def test_held_out_tracks_and_classes_by_what_tells_them(script: ModuleType) -> None:
    """Every kind of class: IoU of 0.7, nine in ten named right; the untrained twin names none."""
    held_out = clips(120, seed=script.HELD_OUT_SEED)
    found = script.precision(script.opened(ASSETS / NAMES[0]), held_out)
    for cue in dict.fromkeys(TOLD_BY.values()):
        key = cue.replace(" ", "_")
        assert found[f"iou_{key}"] >= 0.7
        assert found[f"accuracy_{key}"] >= 0.85  # some fifty shapes: the card's share is of five hundred clips
    assert found["accuracy"] >= 0.9
    twin = script.precision(script.opened(ASSETS / NAMES[1]), held_out)
    assert twin["found"] < 0.05
    assert twin["accuracy"] < 0.4


def test_the_card_says_what_the_log_ends_with(script: ModuleType) -> None:
    card = (ASSETS / NAMES[0] / "README.md").read_text()
    log = list(csv.DictReader((ASSETS / NAMES[0] / "training_log.csv").open(newline="")))
    assert int(log[-1]["step"]) == script.STEPS
    stated = re.search(r"class accuracy \| \*\*([\d.]+)\*\*", card)
    assert stated is not None
    assert float(stated[1]) >= 0.9
    assert abs(float(stated[1]) - float(log[-1]["accuracy"])) < 0.06
    assert f"{script.STEPS} steps of {script.BATCH}" in card
    assert f"(seed {script.TRAIN_SEED})" in card
    assert len(list(csv.DictReader((ASSETS / NAMES[1] / "training_log.csv").open(newline="")))) == 0


def test_the_untrained_twin_is_where_training_starts(script: ModuleType) -> None:
    fresh, twin = script.build(), script.opened(ASSETS / NAMES[1])
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, fresh.state_dict()[name].half().float())


def test_streams_do_not_meet(script: ModuleType) -> None:
    seeds = (script.TRAIN_SEED, script.VALIDATION_SEED, script.HELD_OUT_SEED)
    assert len(set(seeds)) == 3
    first = [clips(1, seed=seed)[0].frames for seed in seeds]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(first, 2))


def test_a_batch_withholds_the_stated_share(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "BATCH", 40)
    frames, targets = next(script.batches())
    assert frames.shape == (40, 6, 3, SIZE, SIZE)
    assert float(frames.min()) >= -1
    assert float(frames.max()) <= 1
    certain = [bool((answers.max(1).values == 1).all()) for answers, _ in targets]
    assert 0.5 < np.mean(certain) < 1.0
    for answers, masks in targets:
        assert answers.shape == (len(masks), len(CLASSES))
        torch.testing.assert_close(answers.sum(1), torch.ones(len(answers)))
    assert sum(share for share, _ in script.WITHHELD) == pytest.approx(1.0)


def ideal(script: ModuleType, targets: list, queries: list[int], sure: float = 12.0) -> SwimmerOutput:
    """Outputs that say every shape exactly, at the given queries."""
    logits = torch.zeros(len(targets), 4, len(CLASSES) + 1)
    logits[..., -1] = sure
    masks = torch.full((len(targets), 4, 6, SIZE, SIZE), -sure)
    for i, (answers, shapes) in enumerate(targets):
        for query, answer, shape in zip(queries, answers, shapes, strict=False):
            logits[i, query] = torch.cat([answer.clamp_min(1e-6).log(), torch.tensor([-sure])])
            masks[i, query] = torch.where(shape, sure, -sure)
    return SwimmerOutput(logits, masks, ((logits, masks),))


def test_the_loss_is_smallest_for_the_truth_and_blind_to_the_order_of_queries(script: ModuleType) -> None:
    drawn = clips(3, seed=9, shapes=2)
    targets = [script.truth(one) for one in drawn]
    best = float(script.loss_of(ideal(script, targets, [0, 1]), targets))
    assert best < 0.05
    assert float(script.loss_of(ideal(script, targets, [3, 1]), targets)) == pytest.approx(best, abs=1e-5)
    swapped = [(answers.roll(1, 1), shapes) for answers, shapes in targets]
    assert float(script.loss_of(ideal(script, swapped, [0, 1]), targets)) > best + 1
    moved = [(answers, shapes.roll(8, -1)) for answers, shapes in targets]
    assert float(script.loss_of(ideal(script, moved, [0, 1]), targets)) > best + 1


def test_queries_are_matched_by_the_cheapest_assignment(script: ModuleType) -> None:
    """Against every assignment, cost from its definition in float64."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(4, len(CLASSES) + 1, generator=generator)
    masks = torch.randn(4, 50, generator=generator)
    answers = torch.eye(len(CLASSES))[[2, 5, 0]]
    shapes = (torch.rand(3, 50, generator=generator) > 0.6).float()
    query, track = script.match(logits, masks, answers, shapes)

    def cost(q: int, t: int) -> float:
        p, s = masks[q].double().sigmoid(), shapes[t].double()
        dice = 1 - (2 * (p * s).sum() + 1) / (p.sum() + s.sum() + 1)
        filled = -(s * p.log() + (1 - s) * (1 - p).log()).mean()
        return float(2 * dice + 5 * filled - (logits[q].double().softmax(-1)[:-1] * answers[t]).sum())

    options = itertools.permutations(range(4), 3)
    best = min(sum(cost(q, t) for t, q in enumerate(option)) for option in options)
    assert sum(cost(int(q), int(t)) for q, t in zip(query, track, strict=True)) == pytest.approx(best, abs=1e-4)


def test_precision_of_the_truth_is_perfect(script: ModuleType) -> None:
    held_out = clips(6, seed=11)
    targets = [script.truth(one) for one in held_out]

    class Truth(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> SwimmerOutput:
            return ideal(script, targets, [2, 0])

    found = script.precision(Truth(), held_out)
    assert found["iou"] == pytest.approx(1.0)
    assert found["accuracy"] == found["found"] == 1.0
    assert found["extra"] == 0.0
    assert found["shapes"] == sum(len(masks) for _, masks in targets)


def test_a_few_steps_reduce_the_loss(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"STEPS": 10, "BATCH": 4, "VALIDATION": 4, "LOG_EVERY": 5, "WARM_UP": 2}.items():
        monkeypatch.setattr(script, name, value)
    log = script.train(script.build())
    assert [row["step"] for row in log] == [5, 10]
    assert log[1]["loss"] < log[0]["loss"]
