"""Sources of clips small enough for loops: a space-time transformer, any function, and a tracker by colour."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Prediction,
    Readout,
    Sample,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate.testing.tiny import SITE, STREAM, TinyBlock, TinyConfig, TinySource

SIDE, PATCH = 16, 4
CONFIG = TinyConfig(image=SIDE, patch=PATCH, width=24, heads=3, layers=2, classes=3)
MOST = 16


def clips(count: int = 2, *, frames: int | Sequence[int] = 8, seed: int = 0, side: int = SIDE) -> list[Sample]:
    """Noisy clips with a bright square of one colour that moves; its mask ``(frame, y, x)`` is given."""
    random = np.random.default_rng(seed)
    lengths = [frames] * count if isinstance(frames, int) else list(frames)
    made = []
    for number, length in enumerate(lengths):
        pixels = random.integers(0, 120, (length, side, side, 3), dtype=np.uint8)
        mask = np.zeros((length, side, side), bool)
        y, x = random.integers(0, side - 5, 2)
        for t in range(length):
            left = (x + t) % (side - 4)
            mask[t, y : y + 4, left : left + 4] = True
        pixels[mask] = 30
        pixels[mask, number % 3] = 250
        times = np.arange(length) / 10.0
        made.append(Sample(f"clip-{number}", pixels, f"{seed}-{number}", times=times, mask=mask))
    return made


def chosen_frames(length: int, wanted: int) -> list[int]:
    """``wanted`` of ``length`` frames, evenly."""
    return [int(i) for i in (np.arange(wanted) + 0.5) * length / wanted]


class SpaceTime(nn.Module):
    """CLS, tubelets of two frames by patches, blocks over all of them, a head on the CLS token."""

    def __init__(self, config: TinyConfig = CONFIG, tubelet: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.config, self.tubelet = config, tubelet
        size = (tubelet, config.patch, config.patch)
        self.embed = nn.Conv3d(3, config.width, size, stride=size)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, 1 + MOST * config.side**2, config.width))
        self.blocks = nn.ModuleList(TinyBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if value.dim() > 1:
                    scale = 1.0 if name in ("cls", "position") else value[0].numel() ** -0.5
                    value.normal_(0.0, scale, generator=generator)
                if name.endswith("qkv.weight"):
                    value[: 2 * config.width] *= config.sharpness**0.5
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """``(sample, frame, channel, y, x)`` to logits."""
        patches = self.embed(pixels.transpose(1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(pixels), -1, -1), patches], 1)
        x = x + self.position[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class ClipSource(TinySource):
    """A video classifier that takes ``frames`` frames, evenly (None: all of them), two a tubelet."""

    media = "clip"

    def __init__(
        self, frames: int | None = 4, tubelet: int = 2, *, config: TinyConfig = CONFIG, seed: int = 0
    ) -> None:
        super().__init__(config, seed)
        self.frames, self.tubelet = frames, tubelet
        self._module = SpaceTime(config, tubelet, seed)

    @classmethod
    def open(cls, row: Any = None, *, seed: int = 0, **options: Any) -> ClipSource:
        return cls(seed=seed)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        index = [chosen_frames(len(s.pixels), self.frames or len(s.pixels)) for s in samples]
        planes = [
            np.stack([self.prepare(s.pixels[i])[0] for i in chosen])
            for s, chosen in zip(samples, index, strict=True)
        ]
        geometry = [self._geometry(s.pixels.shape[1:3]) for s in samples]
        inputs = torch.stack([torch.from_numpy(one) for one in planes]).to(next(self.module.parameters()))
        per_sample = {"frame_index": torch.tensor(index)}
        return Batch(inputs, tuple(geometry), tuple(s.id for s in samples), per_sample)

    def _geometry(self, size: tuple[int, ...]) -> Geometry:
        return self.prepare(np.zeros((*size, 3), np.uint8))[1]

    def frame_cells(self, batch: Batch) -> tuple[int, ...]:
        return tuple(i // self.tubelet for i in range(batch.inputs.shape[1]))

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        axis = self.tokens(batch)
        return CallLabels((("sample", len(batch)),), axis, axis)

    def tokens(self, batch: Batch) -> TokenAxis:
        side, planes = self.config.side, [TokenAxis.of_kind("cls", 1)]
        for frame in range(max(self.frame_cells(batch)) + 1):
            plane = TokenAxis.patches(side, side, height=self.config.image, width=self.config.image)
            plane.frame[:] = frame
            planes.append(plane)
        return TokenAxis.concat(*planes)

    def readout(self, batch: Batch, outputs: Any, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        weights = torch.zeros(len(bound) if bound is not None else len(batch), len(self.tokens(batch)))
        weights[:, 0] = 1.0
        return {SITE: Readout(weights, "cls")}

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        return self.readout(batch, None)

    def bounds(self, header: Mapping[str, Any]) -> Mapping[str, int]:
        if self.frames is not None:
            return {}
        return {STREAM: 1 + int(header["frames"]) // self.tubelet * self.config.side**2}


class FunctionClipSource(ClipSource):
    """Any function of inputs ``(sample, frame, channel, y, x) -> (sample, class)`` behind the same cells."""

    def __init__(self, function: Callable[[Tensor], Tensor], frames: int | None = 4, tubelet: int = 2) -> None:
        super().__init__(frames, tubelet)
        self.function = function

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            return self.function(batch.inputs)


class TrackSource(ClipSource):
    """A tracker that finds one track a colour: where the channel is bright, in every frame.

    Its score is how bright that channel is under the mask that the intact clip gave (held: ``context``).
    """

    targets = ("class",)

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        with torch.set_grad_enabled(grad):
            return batch.inputs + 0.0 * self.module(batch.inputs).sum()  # attention that the answer ignores

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        return [
            [
                Prediction(
                    f"colour {c}", float(mask.double().mean()), c, object=c, track=f"t{c}", mask=mask.numpy()
                )
                for c, mask in enumerate(clip.detach().transpose(0, 1) > 0.5)
                if mask.any()
            ]
            for clip in outputs
        ]

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        rows, masks = [], []
        for sample, answers in enumerate(self.predictions(outputs, batch)):
            for one in answers:
                rows.append(TargetRow(sample, "class", one.class_index, one.label, one.object))
                masks.append(torch.as_tensor(one.mask))
        held = {"mask": torch.stack(masks)} if masks else {}
        return BoundTarget(tuple(rows), target.scale, held)

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        mask = bound.context["mask"].to(outputs)
        planes = torch.stack([outputs[row.sample, :, row.class_index] for row in bound.rows])
        logit = (planes * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3))
        return logit.sigmoid() if bound.scale == "probability" else logit


def bound_clips(
    source: ClipSource, samples: Sequence[Sample] | None = None, *, scale: str = "logit"
) -> tuple[Batch, BoundTarget]:
    """A batch of clips and the target that the source answers."""
    batch = source.encode(clips() if samples is None else samples)
    return batch, source.bind(source.forward(batch), batch, Target(scale=scale))


def clip_cells(source: ClipSource) -> CellGrid:
    """The patches of a frame."""
    return CellGrid.regular(source.config.side, source.config.side, height=SIDE, width=SIDE)
