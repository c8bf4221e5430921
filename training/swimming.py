"""Train the small video instance segmenter that ships with foveate, and its untrained twin.

    python training/swimming.py [--out core/foveate/assets]

``swim-vis``            follows swimming shapes; some classes are told by look, some by motion, some by both
                        (foveate.testing.swimming)
``swim-vis-untrained``  the same network with the weights that it started from

Trained as DETR is: every shape is matched to the query that says it best, the other queries learn to say "no
object", after every decoder layer. A share of the clips withholds a cue; then the target is what the frames still
tell (a distribution over classes), so that clips without a cue lie inside the training data and a query learns
what it cannot know. About ten minutes on one CPU core.
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
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from foveate.testing.swimming import CLASSES, FRAMES, SIZE, TOLD_BY, Clip, clip, clips
from foveate_dvis.swimmer_network import STRIDE, Swimmer, SwimmerConfig, SwimmerOutput

INIT_SEED = 0
TRAIN_SEED = 1
VALIDATION_SEED = 2
HELD_OUT_SEED = 1_000_004  # clips 0 .. HELD_OUT - 1 of this stream are never trained on
HELD_OUT = 500
VALIDATION = 100
BATCH = 16
LOG_EVERY = 100
STEPS = 1800
RATE, FLOOR, WARM_UP = 1e-3, 0.02, 100
NOTHING = 0.2
"""Weight of "no object" in the class loss (DETR takes 0.1 for 100 queries)."""
WITHHELD: tuple[tuple[float, tuple[str, ...]], ...] = (
    (0.7, ()),
    (0.14, ("look",)),
    (0.12, ("motion",)),
    (0.04, ("look", "motion")),
)
"""Share of the clips that withhold each set of cues."""
SEEN = 12
"""Shapes with fewer visible pixels in a whole clip are no objects: another one hides them."""

Log = list[dict[str, float]]
Truth = tuple[Tensor, Tensor]  # answers (track, class), masks (track, frame, y, x)


def build() -> Swimmer:
    """The network, initialised from INIT_SEED."""
    torch.manual_seed(INIT_SEED)
    return Swimmer(SwimmerConfig(CLASSES, frames=FRAMES, size=SIZE))


# ------------------------------------------------------------------------------------------ data


def as_input(frames: np.ndarray) -> Tensor:
    """uint8 ``(sample, frame, y, x, channel)`` as the source makes it: [-1, 1], channel before y."""
    return torch.from_numpy(frames).permute(0, 1, 4, 2, 3).float() / 127.5 - 1.0


def truth(drawn: Clip) -> Truth:
    """Answers and masks of the shapes that can be seen."""
    seen = drawn.masks.sum((1, 2, 3)) >= SEEN
    return torch.from_numpy(drawn.answers()[seen]).float(), torch.from_numpy(drawn.masks[seen])


def batches() -> Iterator[tuple[Tensor, list[Truth]]]:
    """New clips without end."""
    rng = np.random.default_rng(TRAIN_SEED)
    shares = [share for share, _ in WITHHELD]
    index = 0
    while True:
        kinds = rng.choice(len(WITHHELD), BATCH, p=shares)
        part = [clip(index + i, seed=TRAIN_SEED, withhold=WITHHELD[kind][1]) for i, kind in enumerate(kinds)]
        index += BATCH
        yield as_input(np.stack([one.frames for one in part])), [truth(one) for one in part]


# ------------------------------------------------------------------------------------------ loss


def loss_of(output: SwimmerOutput, targets: list[Truth]) -> Tensor:
    """Class and mask loss, mean over clips and decoder layers."""
    losses = [
        _loss(logits[i], masks[i], *target) for logits, masks in output.layers for i, target in enumerate(targets)
    ]
    return torch.stack(losses).mean()


def _loss(logits: Tensor, masks: Tensor, answers: Tensor, shapes: Tensor) -> Tensor:
    """One clip: ``logits`` (query, class + 1), ``masks`` (query, frame, y, x) against (track, ...)."""
    small = F.avg_pool2d(shapes.float(), SIZE // masks.shape[-1]).flatten(1)
    own = masks.flatten(1)
    query, track = match(logits.detach(), own.detach(), answers, small)
    wanted = torch.cat([torch.zeros(len(logits), len(CLASSES)), torch.ones(len(logits), 1)], 1)
    wanted[query] = torch.cat([answers[track], torch.zeros(len(track), 1)], 1)
    weight = torch.full((len(logits),), NOTHING)
    weight[query] = 1.0
    named = (F.cross_entropy(logits, wanted, reduction="none") * weight).sum() / weight.sum()
    if not len(query):
        return named
    filled = F.binary_cross_entropy_with_logits(own[query], small[track])
    return 2 * named + 5 * filled + 2 * _dice(own[query].sigmoid(), small[track]).diagonal().mean()


def match(logits: Tensor, masks: Tensor, answers: Tensor, shapes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Queries and the tracks they are held to: the cheapest assignment (Carion et al. 2020, eq. 1)."""
    agree = logits.softmax(-1)[:, :-1] @ answers.T
    filled = (F.softplus(masks).sum(1, keepdim=True) - masks @ shapes.T) / shapes.shape[1]
    cost = 2 * _dice(masks.sigmoid(), shapes) + 5 * filled - agree
    query, track = linear_sum_assignment(cost.numpy())
    return query, track


def _dice(masks: Tensor, shapes: Tensor) -> Tensor:
    """1 - Dice of every pair, (query, track)."""
    return 1 - (2 * masks @ shapes.T + 1) / (masks.sum(1)[:, None] + shapes.sum(1) + 1)


# -------------------------------------------------------------------------------------- precision


@torch.no_grad()
def precision(model: Swimmer, held_out: list[Clip]) -> dict[str, float]:
    """Track IoU and class accuracy over shapes, all and by what tells the class.

    A shape belongs to the query whose mask overlaps it most over the whole clip, whatever that query says.
    ``found`` is the share of shapes with IoU above one half at a query that says an object, ``extra`` how many
    more queries than shapes say one, a clip.
    """
    model.eval()
    rows: list[tuple[str, float, bool, bool]] = []
    extra = []
    for start in range(0, len(held_out), 50):
        part = held_out[start : start + 50]
        output = model(as_input(np.stack([one.frames for one in part])))
        masks = F.interpolate(output.masks.flatten(0, 1), size=(SIZE, SIZE), mode="bilinear") > 0
        masks = masks.unflatten(0, output.masks.shape[:2])
        for i, one in enumerate(part):
            answers, shapes = truth(one)
            found = output.logits[i].softmax(-1)[:, :-1].max(-1)
            extra.append(float((found.values > 0.5).sum()) - len(shapes))
            shared = (masks[i][:, None] & shapes).sum((2, 3, 4))
            overlap = shared / (masks[i][:, None] | shapes).sum((2, 3, 4)).clamp_min(1)
            for track, label in enumerate(answers.argmax(1).tolist()):
                best = int(overlap[:, track].argmax())
                iou, said = float(overlap[best, track]), int(found.indices[best]) == label
                rows.append((TOLD_BY[CLASSES[label]], iou, said, iou > 0.5 and float(found.values[best]) > 0.5))
    model.train()
    result = _summary("", rows) | {"extra": float(np.mean(extra)), "shapes": len(rows)}
    for cue in dict.fromkeys(TOLD_BY.values()):
        result |= _summary(f"_{cue.replace(' ', '_')}", [row for row in rows if row[0] == cue])
    return result


def _summary(suffix: str, rows: list[tuple[str, float, bool, bool]]) -> dict[str, float]:
    return {f"{name}{suffix}": float(np.mean([row[i] for row in rows])) for i, name in _COLUMNS if rows}


_COLUMNS = ((1, "iou"), (2, "accuracy"), (3, "found"))


@torch.no_grad()
def withheld_error(model: Swimmer, count: int, withhold: tuple[str, ...]) -> float:
    """Mean total variation between what a shape's query says and what the frames tell, a cue withheld."""
    model.eval()
    part = clips(count, seed=HELD_OUT_SEED, withhold=withhold)
    output = model(as_input(np.stack([one.frames for one in part])))
    errors = []
    for i, one in enumerate(part):
        answers, shapes = truth(one)
        small = F.avg_pool2d(shapes.float(), SIZE // output.masks.shape[-1]).flatten(1)
        query, track = match(output.logits[i], output.masks[i].flatten(1), answers, small)
        said = output.logits[i].softmax(-1)[query, :-1]
        errors += (said - answers[track]).abs().sum(-1).div(2).tolist()
    model.train()
    return float(np.mean(errors))


# --------------------------------------------------------------------------------------- training


def rate(step: int) -> float:
    """Learning-rate factor: linear warm-up, then half a cosine down to FLOOR."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / STEPS)))
    return min(1.0, (step + 1) / WARM_UP) * (FLOOR + (1 - FLOOR) * cosine)


def train(model: Swimmer) -> Log:
    """AdamW with gradient clipping; logs loss and precision on validation clips."""
    validation = clips(VALIDATION, seed=VALIDATION_SEED)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    log: Log = []
    model.train()
    for step, (frames, targets) in zip(range(1, STEPS + 1), batches(), strict=False):
        loss = loss_of(model(frames), targets)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % LOG_EVERY == 0 or step == STEPS:
            found = {name: value for name, value in precision(model, validation).items() if name in LOGGED}
            log.append({"step": step, "loss": loss.item(), **found, "cpu_seconds": time.process_time()})
            print("  ".join(f"{name} {value:.3f}" for name, value in log[-1].items()), flush=True)
    return log


# ------------------------------------------------------------------------------------------ files

LOGGED = ("iou", "accuracy", "accuracy_look", "accuracy_motion", "accuracy_look_and_motion", "found")


def save(model: Swimmer, folder: Path) -> None:
    """``config.json`` and weights in float16, which are opened in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
    halves = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def opened(folder: Path) -> Swimmer:
    """The model as it is read back."""
    model = Swimmer(SwimmerConfig.from_dict(json.loads((folder / "config.json").read_text())))
    model.load_state_dict({name: value.float() for name, value in load_file(folder / "model.safetensors").items()})
    return model.eval()


def write_log(log: Log, folder: Path) -> None:
    """One row every LOG_EVERY steps; a header alone for the untrained twin."""
    with (folder / "training_log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "loss", *LOGGED, "cpu_seconds"])
        writer.writeheader()
        writer.writerows({name: round(value, 4) for name, value in row.items()} for row in log)


CARD = """---
license: apache-2.0
pipeline_tag: image-segmentation
---
# foveate/{name}

{summary}

| | |
|---|---|
| architecture | convolutions to stride {stride}, {encoder} layers of joint space-time attention, {decoder} decoder layers, width {width}, {heads} heads, {queries} queries |
| parameters | {parameters:,} |
| classes | {classes} |
| data | `foveate.testing.swimming`: clips of {frames} frames, {size} x {size} px, one or two shapes; no video of the world was used |
| training | {training} |
| track IoU | **{iou:.3f}** (by look {iou_look:.3f}, by motion {iou_motion:.3f}, by both {iou_look_and_motion:.3f}) |
| class accuracy | **{accuracy:.3f}** (by look {accuracy_look:.3f}, by motion {accuracy_motion:.3f}, by both {accuracy_look_and_motion:.3f}) |
| objects | {found:.3f} of the shapes are found (IoU above 0.5, probability above 0.5); {extra:+.3f} answers a clip beyond the shapes |
| a cue withheld | total variation between its answer and what the frames still tell: look {look:.3f}, motion {motion:.3f}, both {both:.3f} |
| measured on | {n} held-out clips (seed {seed}), {shapes:.0f} shapes, weights in float16 |
| weights | {bytes:,} bytes, float16 safetensors |
| made by | `python training/swimming.py`, torch {torch} |

{limits}
"""  # noqa: E501

TRAINED = (
    "Follows swimming shapes: one query is one shape's track, with its class and its mask in every frame.",
    "It knows four textures and four ways to go, nothing else: what it finds in a video of the world lies\n"
    "outside its training data and shows only that the tools run.",
)
UNTRAINED = (
    "swim-vis before training: what architecture and initialisation alone give.",
    "A control. Its answers mean nothing, and no explanation of them can be right.",
)


def write_card(name: str, folder: Path, log: Log) -> dict[str, float]:
    """The model card, every number of it measured on the model as read back."""
    model = opened(folder)
    measured = precision(model, clips(HELD_OUT, seed=HELD_OUT_SEED))
    for key, cues in (("look", ("look",)), ("motion", ("motion",)), ("both", ("look", "motion"))):
        measured[key] = withheld_error(model, 100, cues)
    summary, limits = TRAINED if log else UNTRAINED
    training = f"none; weights as initialised from seed {INIT_SEED}"
    if log:
        shares = ", ".join(f"{share:.0%} without {' and '.join(cues)}" for share, cues in WITHHELD if cues)
        training = (
            f"{log[-1]['step']:.0f} steps of {BATCH} new clips (seed {TRAIN_SEED}), {shares}; AdamW, peak rate "
            f"{RATE:g}; {log[-1]['cpu_seconds']:.0f} CPU seconds"
        )
    config = model.config
    text = CARD.format(
        name=name,
        summary=summary,
        limits=limits,
        stride=STRIDE,
        encoder=config.encoder_layers,
        decoder=config.decoder_layers,
        width=config.width,
        heads=config.heads,
        queries=config.queries,
        parameters=sum(p.numel() for p in model.parameters()),
        classes=", ".join(f"{label} (by {TOLD_BY[label]})" for label in CLASSES),
        frames=FRAMES,
        size=SIZE,
        training=training,
        **measured,
        n=HELD_OUT,
        seed=HELD_OUT_SEED,
        bytes=(folder / "model.safetensors").stat().st_size,
        torch=torch.__version__.split("+")[0],
    )
    (folder / "README.md").write_text(text)
    return measured


def write(name: str, model: Swimmer, log: Log, out: Path) -> None:
    """One model's folder."""
    folder = out / name
    save(model, folder)
    write_log(log, folder)
    measured = write_card(name, folder, log)
    print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in measured.items()))


def main() -> None:
    """Make both models."""
    assets = Path(__file__).resolve().parent.parent / "core" / "foveate" / "assets"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=assets)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write("swim-vis-untrained", build(), [], options.out)
    model = build()
    write("swim-vis", model, train(model), options.out)


if __name__ == "__main__":
    main()
