"""Train the small space-time transformers on which the test "appearance, motion or both" is proved.

    python training/motion_tasks.py train [--out runs/motion] [--tasks xor ...] [--seeds 20] [--first 0]
    python training/motion_tasks.py ship  [--out runs/motion] [--assets core/foveate/assets/motion-tasks]

``train`` trains every seed of a task at once (one stacked set of weights, torch.func; each seed has its own start
and its own clips) and writes ``<task>-<first>.safetensors`` with the axis ``seed`` first, and a log beside it.
Accuracies are measured on held-out clips after the weights went through float16, also with one cue alone, as the
task's generator makes them. About five minutes a task for 20 seeds on one CPU core.

``ship`` writes seed 0 of each task to the package, float16.

``benchmarks/motion.py`` then asks of every one of them what it decides by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from foveate.testing.motion_tasks import SIZE, TASKS, motion_clips
from foveate.testing.space_time import SpaceTimeTransformer

STEPS: Mapping[str, int] = {"colour": 300, "direction": 1200, "xor": 1200, "redundant": 1200}
LEARNING_PLACES = 800
"""Steps until the square may start anywhere. From all places at once no single (place, time) says anything of the
direction, and training stays at chance for thousands of steps; from few at first, it never does."""
RATE, WARM_UP = 3e-3, 50
BATCH = 32
HELD_OUT_SEED, HELD_OUT = 1_000_003, 1000
LOG_EVERY = 100
EVAL_ROWS = 250

Weights = dict[str, Tensor]


class Stack:
    """Networks of one shape as one function of stacked weights ``(seed, ...)``."""

    def __init__(self, seeds: range) -> None:
        self.networks = [SpaceTimeTransformer(seed=seed) for seed in seeds]
        stacked, _ = stack_module_state(self.networks)
        self.weights: Weights = {name: value.detach().requires_grad_() for name, value in stacked.items()}
        self._each = vmap(self._one)

    def _one(self, weights: Weights, clips: Tensor) -> Tensor:
        logits: Tensor = functional_call(self.networks[0], weights, (clips,))
        return logits

    def __call__(self, clips: Tensor) -> Tensor:
        """``(seed, clip, frame, channel, y, x)`` to logits ``(seed, clip, class)``."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no batching rule
            logits: Tensor = self._each(self.weights, clips)
        return logits


def as_input(clips: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> Tensor:
    """uint8 ``(..., frame, y, x, channel)`` as the model takes it, ``(..., frame, channel, y, x)`` in [-1, 1]."""
    return torch.from_numpy(clips).movedim(-1, -3).float() / 127.5 - 1.0


def batches(task: str, seeds: range) -> Iterator[tuple[Tensor, Tensor]]:
    """Fresh clips, each seed its own, easy ones first: inputs (seed, clip, ...) and labels (seed, clip)."""
    step = 0
    while True:
        spread = min(SIZE, 1 + SIZE * step // LEARNING_PLACES)
        made = [motion_clips(task, BATCH, 10_000 * (seed + 1) + step, spread=spread) for seed in seeds]
        yield (
            as_input(np.stack([one.clips for one in made])),
            torch.from_numpy(np.stack([one.labels for one in made])),
        )
        step += 1


def train(task: str, seeds: range) -> tuple[Weights, list[dict[str, object]]]:
    """Stacked float16 weights of all seeds, and the log."""
    stack = Stack(seeds)
    optimiser = torch.optim.AdamW(list(stack.weights.values()), lr=RATE, weight_decay=0.01)
    steps, log, started = STEPS[task], list[dict[str, object]](), time.perf_counter()
    for step, (clips, labels) in zip(range(steps), batches(task, seeds), strict=False):
        warm, left = (step + 1) / WARM_UP, 1.0 - step / steps
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, warm, 3.0 * left)
        logits = stack(clips)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
        optimiser.zero_grad()
        losses.mean(1).sum().backward()  # the sum over seeds: none sees another
        _clip_each(stack.weights)
        optimiser.step()
        if (step + 1) % LOG_EVERY == 0:
            right = (logits.argmax(-1) == labels).float().mean(1)
            log.append(
                {
                    "step": step + 1,
                    "loss": [round(float(v), 4) for v in losses.detach().mean(1)],
                    "accuracy": [round(float(v), 3) for v in right],
                    "seconds": round(time.perf_counter() - started, 1),
                }
            )
            loss, worst, passed = float(losses.detach().mean()), float(right.min()), log[-1]["seconds"]
            print(f"{task} step {step + 1}: loss {loss:.4f}, worst accuracy {worst:.3f}, {passed} s", flush=True)
    return {name: value.detach().half() for name, value in stack.weights.items()}, log


def _clip_each(weights: Weights, largest: float = 1.0) -> None:
    """Bound the norm of every seed's own gradient."""
    gradients = [value.grad for value in weights.values() if value.grad is not None]
    squares = torch.stack([(g.flatten(1) ** 2).sum(1) for g in gradients]).sum(0)
    factor = (largest / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def accuracy(weights: Weights, task: str, seeds: range) -> dict[str, list[float]]:
    """Held-out accuracy of every seed: both cues, and one cue alone as the generator makes it."""
    stack = Stack(seeds)
    stack.weights = {name: value.float() for name, value in weights.items()}
    found: dict[str, list[float]] = {}
    for name, alone in (("both", False), ("one_alone", True)):
        clips = motion_clips(task, HELD_OUT, HELD_OUT_SEED, alone=alone)
        inputs, labels = as_input(clips.clips), torch.from_numpy(clips.labels)
        right = torch.zeros(len(seeds), HELD_OUT)
        for start in range(0, HELD_OUT, EVAL_ROWS):
            rows = slice(start, start + EVAL_ROWS)
            logits = stack(inputs[rows].expand(len(seeds), *inputs[rows].shape))
            right[:, rows] = (logits.argmax(-1) == labels[rows]).float()
        if alone:
            found["grey"] = _means(right[:, torch.from_numpy((clips.colours < 0) & (clips.directions != 0))])
            found["still"] = _means(right[:, torch.from_numpy(clips.directions == 0)])
        else:
            found[name] = _means(right)
    return found


def _means(right: Tensor) -> list[float]:
    return [round(float(v), 4) for v in right.mean(1)]


def run_training(out: Path, tasks: list[str], seeds: range) -> None:
    """Train the tasks and write weights and logs."""
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        started = time.process_time()
        weights, log = train(task, seeds)
        found = accuracy(weights, task, seeds)
        save_file(
            weights, out / f"{task}-{seeds.start}.safetensors", metadata={"task": task, "first": str(seeds.start)}
        )
        record = {"task": task, "seeds": list(seeds), "accuracy": found, "log": log}
        record["cpu_seconds"] = round(time.process_time() - started, 1)
        (out / f"{task}-{seeds.start}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"{task}: held out {found['both']}", flush=True)


def ship(out: Path, assets: Path) -> None:
    """Seed 0 of every task as float16 files of the package."""
    assets.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        stacked = load_file(out / f"{task}-0.safetensors")
        save_file({name: value[0].clone() for name, value in stacked.items()}, assets / f"{task}.safetensors")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=("train", "ship"))
    parser.add_argument("--out", type=Path, default=Path("runs/motion"))
    parser.add_argument("--assets", type=Path, default=Path("core/foveate/assets/motion-tasks"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.job == "ship":
        ship(given.out, given.assets)
    else:
        run_training(given.out, given.tasks, range(given.first, given.first + given.seeds))


if __name__ == "__main__":
    main()
