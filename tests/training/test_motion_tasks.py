"""The shipped networks of the motion tasks solve them; the script trains each seed as if it were alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from foveate.errors import ModelError, SampleError, UsageError
from foveate.interfaces import Sample
from foveate.testing.conformance import SourceConformance
from foveate.testing.motion_tasks import FRAMES, LABELS, TASKS, motion_clips
from foveate.testing.space_time import SpaceTimeSource, SpaceTimeTransformer

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "core" / "foveate" / "assets" / "motion-tasks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_motion_tasks", ROOT / "training" / "motion_tasks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_motion_tasks"] = module
    spec.loader.exec_module(module)
    return module


class TestSpaceTime(SourceConformance):
    def open(self) -> SpaceTimeSource:
        return SpaceTimeSource.trained("xor")

    def samples(self) -> list[Sample]:
        return motion_clips("xor", 3, 0).samples()


@pytest.mark.parametrize("task", TASKS)
def test_shipped_networks_solve_their_task(task: str) -> None:
    source = SpaceTimeSource.trained(task)
    clips = motion_clips(task, 600, 77, alone=False)
    with torch.no_grad():
        right = source.module(source.encode(clips.samples()).inputs).argmax(-1).numpy() == clips.labels
    assert right.mean() > 0.96
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 300_000


def test_either_cue_is_enough_for_the_redundant_network() -> None:
    source = SpaceTimeSource.trained("redundant")
    clips = motion_clips("redundant", 600, 78, alone=True)
    with torch.no_grad():
        right = source.module(source.encode(clips.samples()).inputs).argmax(-1).numpy() == clips.labels
    assert right[clips.colours < 0].mean() > 0.94
    assert right[clips.directions == 0].mean() > 0.94


def test_stacked_networks_are_the_single_ones_and_do_not_see_each_other(script: ModuleType) -> None:
    seeds = range(3)
    stack = script.Stack(seeds)
    clips, labels = next(script.batches("xor", seeds))
    losses = F.cross_entropy(stack(clips).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    losses.mean(1).sum().backward()
    script._clip_each(stack.weights)
    for i in seeds:
        one = SpaceTimeTransformer(seed=i)
        loss = F.cross_entropy(one(clips[i]), labels[i])
        assert float(loss.detach()) == pytest.approx(float(losses[i].detach().mean()), abs=1e-5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
        for name, value in one.named_parameters():
            assert value.grad is not None
            assert torch.allclose(stack.weights[name].grad[i], value.grad, atol=1e-5), (i, name)


def test_clips_of_training_begin_easy_and_differ_by_seed(script: ModuleType) -> None:
    clips, _ = next(script.batches("direction", range(2)))
    assert not torch.equal(clips[0], clips[1])
    first = motion_clips("direction", 200, 5, spread=1).masks.any(2)[:, 0]
    assert (first == first[0]).all(), "every square starts at the same place"
    assert len(np.unique(motion_clips("direction", 200, 5).masks.any(2)[:, 0], axis=0)) == 12


def test_shipping_is_seed_zero_in_float16(script: ModuleType, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    stack = script.Stack(range(2))
    halves = {name: value.detach().half() for name, value in stack.weights.items()}
    for task in TASKS:
        save_file(halves, tmp_path / f"{task}-0.safetensors")
    script.ship(tmp_path, tmp_path / "assets")
    for task in TASKS:
        shipped = load_file(tmp_path / "assets" / f"{task}.safetensors")
        assert all(torch.equal(shipped[name], value[0]) for name, value in halves.items())
        assert set(shipped) == set(load_file(ASSETS / f"{task}.safetensors"))


def test_the_source_refuses_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no task 'shape'"):
        SpaceTimeSource.trained("shape")
    with pytest.raises(UsageError, match="no option 'size'"):
        SpaceTimeSource.open(size=3)
    with pytest.raises(SampleError, match="an image"):
        SpaceTimeSource().encode([Sample("i", np.zeros((12, 12, 3), np.uint8))])
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(ModelError, match="weights are gone"):
        SpaceTimeSource.trained("xor")


def test_frames_are_taken_evenly_and_pixels_by_their_place() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (10, 24, 36, 3), np.uint8)
    batch = SpaceTimeSource(names=LABELS["xor"]).encode([Sample("big", pixels)])
    assert batch.per_sample["frame_index"].tolist() == [[0, 3, 6, 9]]
    assert batch.inputs.shape == (1, FRAMES, 3, 12, 12)
    for t, y, x in [(0, 0, 0), (1, 5, 7), (3, 11, 11)]:
        expected = pixels[[0, 3, 6, 9][t], 2 * y + 1, 3 * x + 1] / 127.5 - 1.0
        assert np.allclose(batch.inputs[0, t, :, y, x].numpy(), expected, atol=1e-6)
