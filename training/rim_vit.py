"""Train the small classifier that ships with foveate, and its two twins.

    python training/rim_vit.py [--out core/foveate/assets] [--only rim-vit ...]

``rim-vit``            learns the hue of the disc with the light rim (foveate.testing.synthetic)
``rim-vit-untrained``  the same network with the weights that rim-vit started from
``rim-vit-shuffled``   the same network trained to remember permuted labels of a fixed set
                       (the data randomisation test of Adebayo et al., NeurIPS 2018, section 4)

Each goes to a folder that transformers opens: config.json, preprocessor_config.json, model.safetensors
(float16, under 1 MB), README.md (model card) and training_log.csv. Accuracies are measured on held-out
pictures after the weights went through float16. Takes a few minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from foveate.testing.synthetic import CLASSES, SIZE, RimDiscs, rim_discs

INIT_SEED = 0
TRAIN_SEED = 1
HELD_OUT_SEED = 1_000_003  # pictures 0 .. HELD_OUT - 1 of this stream are never trained on
HELD_OUT = 2000
BATCH = 64
LOG_EVERY = 50
REMEMBERED = 2048  # pictures in the shuffled twin's fixed set
ENOUGH_REMEMBERED = 0.95  # of the permuted labels, as in Adebayo et al. 2018

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]
Log = list[dict[str, float]]


@dataclass(frozen=True)
class Twin:
    """One network to make: how it is trained and what its card says."""

    name: str
    summary: str
    limits: str
    steps: int
    make: Callable[[ViTForImageClassification, Twin], Log]


def build() -> ViTForImageClassification:
    """The network, 324,774 parameters, initialised from INIT_SEED."""
    torch.manual_seed(INIT_SEED)
    config = ViTConfig(
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=192,
        image_size=SIZE,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return ViTForImageClassification(config)


def as_input(data: RimDiscs) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures as the processor makes them, (sample, channel, y, x) in [-1, 1], and labels."""
    pixels = torch.from_numpy(data.images).permute(0, 3, 1, 2).float()
    return pixels / 127.5 - 1.0, torch.from_numpy(data.labels)


def fresh_batches() -> Batches:
    """New pictures at every step."""
    start = 0
    while True:
        yield as_input(rim_discs(BATCH, seed=TRAIN_SEED, start=start))
        start += BATCH


def remembered_set() -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed pictures of the shuffled twin, with their labels permuted among them."""
    pixels, labels = as_input(rim_discs(REMEMBERED, seed=TRAIN_SEED))
    return pixels, labels[torch.from_numpy(np.random.default_rng(TRAIN_SEED).permutation(REMEMBERED))]


def remembered_batches() -> Batches:
    """Epoch after epoch over the fixed set, in a new order each time."""
    pixels, labels = remembered_set()
    rng = np.random.default_rng(TRAIN_SEED + 1)
    while True:
        for index in rng.permutation(REMEMBERED).reshape(-1, BATCH):
            yield pixels[index], labels[index]


def rate(step: int, steps: int) -> float:
    """Learning-rate factor: linear warm-up over 100 steps, then half a cosine down to 5 %."""
    return min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))))


@torch.no_grad()
def accuracy(model: ViTForImageClassification, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers, in eval mode."""
    model.eval()
    answers = torch.cat([model(part).logits.argmax(-1) for part in pixels.split(250)])
    model.train()
    return (answers == labels).double().mean().item()


def train(
    model: ViTForImageClassification,
    batches: Batches,
    steps: int,
    check: tuple[torch.Tensor, torch.Tensor],
    *,
    enough: float = 2.0,
) -> Log:
    """AdamW with gradient clipping; logs loss and accuracy on ``check``; stops early at ``enough``."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
    log: Log = []
    model.train()
    for step, (pixels, labels) in zip(range(1, steps + 1), batches, strict=False):
        loss = torch.nn.functional.cross_entropy(model(pixels).logits, labels)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == steps:
            row = {"step": step, "loss": loss.item(), "accuracy": accuracy(model, *check)}
            log.append({**row, "cpu_seconds": time.process_time()})
            print("  step {step:5.0f}  loss {loss:.4f}  accuracy {accuracy:.4f}".format(**row), flush=True)
            if row["accuracy"] >= enough:
                break
    return log


def learn(model: ViTForImageClassification, twin: Twin) -> Log:
    """The task itself; the log's accuracy is on the first 500 pictures of a validation stream."""
    validation = as_input(rim_discs(500, seed=TRAIN_SEED + 1))
    return train(model, fresh_batches(), twin.steps, validation)


def remember(model: ViTForImageClassification, twin: Twin) -> Log:
    """Permuted labels; the log's accuracy is on the training set itself."""
    return train(model, remembered_batches(), twin.steps, remembered_set(), enough=ENOUGH_REMEMBERED)


def leave(model: ViTForImageClassification, twin: Twin) -> Log:
    """No training."""
    return []


TWINS = (
    Twin(
        "rim-vit",
        "Names the hue of the one disc with a light rim among discs with dark rims.",
        "It knows six saturated hues and two rims, nothing else: what it answers on a photograph lies outside\n"
        "its training data and shows only that the tools run.",
        400,
        learn,
    ),
    Twin(
        "rim-vit-untrained",
        "rim-vit before training: what architecture and initialisation alone give.",
        "A control. Its answers mean nothing, and no explanation of them can be right.",
        0,
        leave,
    ),
    Twin(
        "rim-vit-shuffled",
        "rim-vit trained on permuted labels: it fits its pictures but has not learned the task.",
        "A control. Its answers on new pictures are chance, and a map that looks the same for it and for rim-vit\n"
        "shows the pictures, not what rim-vit learned.",
        4000,
        remember,
    ),
)


def save(model: ViTForImageClassification, folder: Path) -> None:
    """Weights in float16; the config says float32, so that transformers computes in it."""
    model.half().save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def write_log(log: Log, folder: Path) -> None:
    """One row every LOG_EVERY steps; a header alone for the untrained twin."""
    with (folder / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "accuracy", "cpu_seconds"])
        writer.writeheader()
        writer.writerows({name: round(value, 4) for name, value in row.items()} for row in log)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-classification
---
# foveate/{name}

{summary}

| | |
|---|---|
| architecture | ViTForImageClassification: width 96, 4 layers, 4 heads, patch 8, 64 px (8 x 8 patches and CLS) |
| parameters | {parameters:,} |
| classes | {classes} |
| data | `foveate.testing.synthetic.rim_discs`, made on the fly; no photograph was used |
| training | {training} |
| accuracy | **{held_out:.4f}** on {n} held-out pictures (seed {seed}), weights in float16; chance {chance:.3f} |
| weights | {bytes:,} bytes, float16 safetensors |
| made by | `python training/rim_vit.py`, torch {torch} |

{limits}
"""


def write_card(twin: Twin, folder: Path, log: Log, held_out: float) -> None:
    """The model card, every number of it measured."""
    training = "none; weights as initialised from seed 0"
    if log:
        on = "validation pictures" if twin.make is learn else "the permuted training labels"
        training = (
            f"{log[-1]['step']:.0f} steps of {BATCH} pictures, AdamW, peak rate 1e-3; "
            f"last logged accuracy {log[-1]['accuracy']:.4f} on {on}"
        )
    model = ViTForImageClassification.from_pretrained(folder)
    text = CARD.format(
        name=twin.name,
        summary=twin.summary,
        limits=twin.limits,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=", ".join(CLASSES),
        training=training,
        held_out=held_out,
        n=HELD_OUT,
        seed=HELD_OUT_SEED,
        chance=1 / len(CLASSES),
        bytes=(folder / "model.safetensors").stat().st_size,
        torch=torch.__version__.split("+")[0],
    )
    (folder / "README.md").write_text(text)


def make(twin: Twin, out: Path) -> float:
    """Train one twin, write its folder, and return its held-out accuracy as read back from there."""
    folder = out / twin.name
    folder.mkdir(parents=True, exist_ok=True)
    model = build()
    log = twin.make(model, twin)
    save(model, folder)
    write_log(log, folder)
    again = ViTForImageClassification.from_pretrained(folder)
    held_out = accuracy(again, *as_input(rim_discs(HELD_OUT, seed=HELD_OUT_SEED)))
    write_card(twin, folder, log, held_out)
    return held_out


def main() -> None:
    """Make all twins, or those named with --only."""
    assets = Path(__file__).resolve().parent.parent / "core" / "foveate" / "assets"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=assets)
    parser.add_argument("--only", nargs="*", choices=[twin.name for twin in TWINS])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for twin in TWINS:
        if not options.only or twin.name in options.only:
            print(twin.name)
            print(f"  held-out accuracy after float16: {make(twin, options.out):.4f} (n = {HELD_OUT})")


if __name__ == "__main__":
    main()
