"""Train the small detector that ships with foveate, and its untrained twin.

    python training/shapes_cdetr.py [--out core/foveate/assets]

``shapes-cdetr``            Conditional DETR that finds coloured shapes and names their hue
                            (foveate.testing.shapes)
``shapes-cdetr-untrained``  the same network with the weights that it started from

Each goes to a folder that transformers opens: config.json, preprocessor_config.json, model.safetensors
(float16, under 1 MB), README.md (model card) and training_log.csv. Average precision is measured on held-out
pictures after the weights went through float16. transformers replaces the backbone's batch normalisation by a
frozen one and freezes its weights, as suits a pretrained backbone; this one starts from nothing, so it is
trained with live normalisation, whose statistics are written into the frozen one at the end. Takes a quarter
of an hour on one CPU core.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig

from foveate.detection.boxes import iou
from foveate.detection.precision import ImageDetections, average_precision
from foveate.testing.shapes import CLASSES, SIZE, Scene, scenes

INIT_SEED = 0
TRAIN_SEED = 1
VALIDATION_SEED = 2
HELD_OUT_SEED = 1_000_003  # pictures 0 .. HELD_OUT - 1 of this stream are never trained on
HELD_OUT = 1000
VALIDATION = 250
POOL = 8192  # pictures, each seen in its eight mirrored and turned versions
BATCH = 16
LOG_EVERY = 500
STEPS = 6000
RATE, FLOOR, WARM_UP = 1e-3, 0.01, 400

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Labels = list[dict[str, Tensor]]
Log = list[dict[str, float]]


def build() -> ConditionalDetrForObjectDetection:
    """The network, about 0.3 million parameters, initialised from INIT_SEED."""
    torch.manual_seed(INIT_SEED)
    backbone = ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = ConditionalDetrConfig(
        use_timm_backbone=False,
        backbone=None,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        num_queries=10,
        d_model=64,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        dropout=0.0,
        auxiliary_loss=True,
        id2label=dict(enumerate(CLASSES)),
        label2id={name: i for i, name in enumerate(CLASSES)},
    )
    return ConditionalDetrForObjectDetection(config)


# ------------------------------------------------------------------------------------------ data


def as_input(images: np.ndarray) -> Tensor:
    """uint8 ``(sample, y, x, channel)`` as the processor makes it: ``(sample, channel, y, x)``, normalised."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def truth(scene: Scene, turn: int = 0) -> dict[str, Tensor]:
    """Labels as transformers takes them; boxes are centre and size as shares of the picture."""
    top, left, bottom, right = _turned(scene.boxes / SIZE, turn).T
    boxes = np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1)
    return {"class_labels": torch.from_numpy(scene.hues), "boxes": torch.from_numpy(boxes).float()}


def turned(image: np.ndarray, turn: int) -> np.ndarray:
    """One of the eight symmetries of a picture ``(y, x, channel)``: bits flip y, flip x, swap y and x."""
    image = image[::-1] if turn & 1 else image
    image = image[:, ::-1] if turn & 2 else image
    return image.transpose(1, 0, 2) if turn & 4 else image


def _turned(boxes: np.ndarray, turn: int) -> np.ndarray:
    """The same symmetry of boxes (top, left, bottom, right) in [0, 1]."""
    top, left, bottom, right = boxes.T
    if turn & 1:
        top, bottom = 1 - bottom, 1 - top
    if turn & 2:
        left, right = 1 - right, 1 - left
    return np.stack([left, top, right, bottom] if turn & 4 else [top, left, bottom, right], 1)


def batches(pool: list[Scene]) -> Iterator[tuple[Tensor, Labels]]:
    """Epoch after epoch over the pool, in a new order and newly turned each time."""
    rng = np.random.default_rng(TRAIN_SEED)
    while True:
        for index in rng.permutation(len(pool)).reshape(-1, BATCH):
            turns = rng.integers(8, size=BATCH)
            pairs = [(pool[i], int(turn)) for i, turn in zip(index, turns, strict=True)]
            images = np.stack([turned(scene.image, turn) for scene, turn in pairs])
            yield as_input(images), [truth(scene, turn) for scene, turn in pairs]


# -------------------------------------------------------------------------------------- precision


@torch.no_grad()
def precision(model: ConditionalDetrForObjectDetection, held_out: list[Scene]) -> dict[str, float]:
    """AP50 and AP75 in eval mode: every query answers with its best class."""
    model.eval()
    images = [
        found
        for start in range(0, len(held_out), 100)
        for found in _detections(model, held_out[start : start + 100])
    ]
    model.train()
    shares = (0.5, 0.75)
    values = [np.mean(list(average_precision(images, threshold=share).values())) for share in shares]
    return {f"ap{round(share * 100)}": float(value) for share, value in zip(shares, values, strict=True)}


def _detections(model: ConditionalDetrForObjectDetection, part: list[Scene]) -> list[ImageDetections]:
    outputs = model(as_input(np.stack([scene.image for scene in part])))
    scores, classes = outputs.logits.sigmoid().max(-1)
    x, y, width, height = outputs.pred_boxes.double().unbind(-1)
    boxes = torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1) * SIZE
    overlap = [iou(boxes[i, :, None], torch.from_numpy(s.boxes)).numpy() for i, s in enumerate(part)]
    return [
        ImageDetections(scores[i].double().numpy(), classes[i].numpy(), s.hues, overlap[i])
        for i, s in enumerate(part)
    ]


# --------------------------------------------------------------------------------------- training


def thaw(model: nn.Module) -> None:
    """Let everything be trained, with live batch normalisation in place of the frozen one."""
    model.requires_grad_(True)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("FrozenBatchNorm2d"):
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent).add_module(leaf, nn.BatchNorm2d(module.weight.numel()))


def frozen(model: nn.Module) -> ConditionalDetrForObjectDetection:
    """The same weights in the model as transformers defines it: statistics go where frozen layers keep theirs."""
    plain = build()
    plain.load_state_dict(model.state_dict())
    return plain.eval()


def rate(step: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to FLOOR."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS)))
    return min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * cosine)


def train(model: ConditionalDetrForObjectDetection) -> Log:
    """AdamW with gradient clipping; logs loss and precision on validation pictures."""
    validation = scenes(VALIDATION, seed=VALIDATION_SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    log: Log = []
    model.train()
    for step, (pixels, labels) in zip(range(1, STEPS + 1), batches(scenes(POOL, seed=TRAIN_SEED)), strict=False):
        loss = model(pixel_values=pixels, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == STEPS:
            row = {"step": step, "loss": loss.item(), **precision(model, validation)}
            log.append({**row, "cpu_seconds": time.process_time()})
            print(
                "  step {step:5.0f}  loss {loss:.3f}  AP50 {ap50:.3f}  AP75 {ap75:.3f}".format(**row), flush=True
            )
    return log


# ------------------------------------------------------------------------------------------ files


def save(model: ConditionalDetrForObjectDetection, folder: Path) -> None:
    """Weights in float16; the config says float32, so that transformers computes in it."""
    folder.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    processor = {
        "image_processor_type": "ConditionalDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_pad": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


def write_log(log: Log, folder: Path) -> None:
    """One row every LOG_EVERY steps; a header alone for the untrained twin."""
    with (folder / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", "ap50", "ap75", "cpu_seconds"])
        writer.writeheader()
        writer.writerows({name: round(value, 4) for name, value in row.items()} for row in log)


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: object-detection
---
# foveate/{name}

{summary}

| | |
|---|---|
| architecture | Conditional DETR: stride 8, width 64, 2 encoder and 3 decoder layers, 4 heads, 10 queries |
| parameters | {parameters:,} |
| classes | {classes} |
| data | `foveate.testing.shapes`, {size} x {size} px, one to three objects a picture; no photograph was used |
| training | {training} |
| precision | AP50 **{ap50:.3f}**, AP75 {ap75:.3f} on {n} held-out pictures (seed {seed}), weights in float16 |
| weights | {bytes:,} bytes, float16 safetensors |
| made by | `python training/shapes_cdetr.py`, torch {torch} |

{limits}
"""

TRAINED = (
    "Finds coloured shapes among grey ones, and names their hue.",
    "It knows six saturated hues and four outlines, nothing else: what it finds in a photograph lies outside its\n"
    "training data and shows only that the tools run.",
)
UNTRAINED = (
    "shapes-cdetr before training: what architecture and initialisation alone give.",
    "A control. Its answers mean nothing, and no explanation of them can be right.",
)


def write_card(name: str, folder: Path, log: Log, measured: dict[str, float]) -> None:
    """The model card, every number of it measured."""
    summary, limits = TRAINED if log else UNTRAINED
    training = f"none; weights as initialised from seed {INIT_SEED}"
    if log:
        training = (
            f"{log[-1]['step']:.0f} steps of {BATCH} pictures, from {POOL} in eight mirrored and turned versions; "
            f"AdamW, peak rate {RATE:g}; {log[-1]['cpu_seconds']:.0f} CPU seconds"
        )
    model = ConditionalDetrForObjectDetection.from_pretrained(folder)
    text = CARD.format(
        name=name,
        summary=summary,
        limits=limits,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=", ".join(CLASSES),
        size=SIZE,
        training=training,
        **measured,
        n=HELD_OUT,
        seed=HELD_OUT_SEED,
        bytes=(folder / "model.safetensors").stat().st_size,
        torch=torch.__version__.split("+")[0],
    )
    (folder / "README.md").write_text(text)


def write(name: str, model: ConditionalDetrForObjectDetection, log: Log, out: Path) -> None:
    """One model's folder; precision is that of the model as read back from there."""
    folder = out / name
    save(model, folder)
    write_log(log, folder)
    again = ConditionalDetrForObjectDetection.from_pretrained(folder)
    measured = precision(again, scenes(HELD_OUT, seed=HELD_OUT_SEED))
    write_card(name, folder, log, measured)
    print(f"{name}: held-out AP50 {measured['ap50']:.3f}, AP75 {measured['ap75']:.3f} (n = {HELD_OUT})")


def main() -> None:
    """Make both models."""
    assets = Path(__file__).resolve().parent.parent / "core" / "foveate" / "assets"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=assets)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write("shapes-cdetr-untrained", build(), [], options.out)
    model = build()
    thaw(model)
    log = train(model)
    write("shapes-cdetr", frozen(model), log, options.out)


if __name__ == "__main__":
    main()
