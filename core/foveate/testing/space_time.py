"""A space-time transformer small enough to train in seconds, as a clip source: the subject of the motion tasks.

Every patch of every frame is a token; two pre-norm layers attend over all of them at once (joint space-time
attention, as in VideoMAE); the answer is read from the mean over tokens. Positions in space and time are learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import ModelError, SampleError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate.testing.motion_tasks import FRAMES, LABELS, SIZE, TASKS

SITE = "video.encoder.self"
STREAM = "video.tokens"


@dataclass(frozen=True)
class SpaceTimeConfig:
    """Shape of a :class:`SpaceTimeTransformer`."""

    frames: int = FRAMES
    image: int = SIZE
    patch: int = 4
    width: int = 48
    heads: int = 4
    layers: int = 2
    classes: int = 2

    @property
    def side(self) -> int:
        """Patches along one side of a frame."""
        return self.image // self.patch


class SpaceTimeBlock(nn.Module):
    """Pre-norm attention and MLP, both with a residual."""

    def __init__(self, config: SpaceTimeConfig) -> None:
        super().__init__()
        width, self.heads = config.width, config.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SpaceTimeAttention(width, config.heads)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(sample, token, channel)`` to the same."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class SpaceTimeAttention(nn.Module):
    """Multi-head self-attention over the tokens of all frames."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(sample, token, channel)`` to the same."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class SpaceTimeTransformer(nn.Module):
    """Patches of all frames as tokens, ``layers`` blocks, a linear head on their mean."""

    def __init__(self, config: SpaceTimeConfig = SpaceTimeConfig(), seed: int = 0) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Linear(3 * config.patch**2, config.width)
            self.place = nn.Parameter(0.5 * torch.randn(1, 1, config.side**2, config.width))
            self.time = nn.Parameter(0.5 * torch.randn(1, config.frames, 1, config.width))
            self.blocks = nn.ModuleList(SpaceTimeBlock(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width)
            self.head = nn.Linear(config.width, config.classes)
        self.eval()

    def forward(self, clips: Tensor) -> Tensor:
        """``(sample, frame, channel, y, x)`` to logits ``(sample, class)``."""
        count, frames, channels = clips.shape[:3]
        side, patch = self.config.side, self.config.patch
        cut = clips.reshape(count, frames, channels, side, patch, side, patch)
        patches = cut.permute(0, 1, 3, 5, 2, 4, 6).reshape(count, frames, side**2, channels * patch**2)
        x = (self.embed(patches) + self.place + self.time).reshape(count, frames * side**2, -1)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


class SpaceTimeSource(AttentionSource):
    """A :class:`SpaceTimeTransformer` for clips of any number of frames: as many as it reads are taken, evenly.

    ``names`` are the classes. :meth:`trained` gives the network of a motion task that ships with foveate.
    """

    targets = ("class",)
    media = "clip"

    def __init__(
        self,
        module: SpaceTimeTransformer | None = None,
        names: Sequence[str] = ("first", "second"),
        id: str = "space-time",
    ) -> None:
        self._module = module or SpaceTimeTransformer()
        self.config, self.names = self._module.config, tuple(names)
        self.card = ModelCard(id=id, source="space-time", adapter=type(self).__name__, licence="Apache-2.0")

    @classmethod
    def trained(cls, task: str) -> SpaceTimeSource:
        """The network trained on one of the motion tasks (``training/motion_tasks.py``)."""
        if task not in TASKS:
            raise UsageError(f"SpaceTimeSource: no task {task!r}", remedy=f"one of {', '.join(TASKS)}")
        from safetensors.torch import load_file

        path = Path(__file__).parents[1] / "assets/motion-tasks" / f"{task}.safetensors"
        if not path.is_file():
            raise ModelError(f"{path}: the shipped weights are gone", remedy="install foveate again")
        module = SpaceTimeTransformer()
        module.load_state_dict({name: value.float() for name, value in load_file(path).items()})
        return cls(module, LABELS[task], f"motion-{task}")

    @classmethod
    def open(
        cls,
        row: Any = None,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> SpaceTimeSource:
        """``task`` opens trained weights (``weights="random"`` an untrained network of the same shape)."""
        task = options.pop("task", None)
        if options:
            raise UsageError(f"space-time: no option {sorted(options)[0]!r}", remedy="task=colour, for instance")
        if task is not None and weights != "random":
            source = cls.trained(str(task))
        else:
            source = cls(names=LABELS.get(str(task), ("first", "second")))
        source.module.to(device=device, dtype=getattr(torch, dtype))
        return source

    @property
    def module(self) -> SpaceTimeTransformer:
        """The network."""
        return self._module

    @property
    def sites(self) -> tuple[Site, ...]:
        """One site: self-attention over the patches of all frames."""
        modules = {f"blocks.{layer}.attention": layer for layer in range(self.config.layers)}
        return (Site(SITE, modules, self.config.heads, STREAM, STREAM, summary="patches of all frames"),)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Frames taken evenly, resized by whole-pixel sampling, scaled to [-1, 1]."""
        size, frames = self.config.image, self.config.frames
        inputs, geometry, index = [], [], []
        for sample in samples:
            if not sample.is_clip:
                raise SampleError(
                    f"{sample.id}: an image, expected a clip", remedy="give a video or a folder of frames"
                )
            count, height, width = sample.pixels.shape[:3]
            chosen = np.round(np.linspace(0, count - 1, frames)).astype(np.int64)
            rows = ((np.arange(size) + 0.5) * height / size).astype(np.int64)
            columns = ((np.arange(size) + 0.5) * width / size).astype(np.int64)
            pixels = sample.pixels[chosen][:, rows][:, :, columns]
            inputs.append(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0)
            geometry.append(Geometry(height, width, size, size, size / height, size / width))
            index.append(torch.from_numpy(chosen))
        like = next(self.module.parameters())
        ids = tuple(sample.id for sample in samples)
        return Batch(torch.stack(inputs).to(like), tuple(geometry), ids, {"frame_index": torch.stack(index)})

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """Logits ``(sample, class)``."""
        with torch.set_grad_enabled(grad):
            logits: Tensor = self.module(batch.inputs)
        return logits

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        """All classes, best first."""
        scores = outputs.detach().float().softmax(-1)
        return [
            [Prediction(self.names[int(c)], float(row[c]), int(c)) for c in row.argsort(descending=True)]
            for row in scores
        ]

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        """One row a sample: the predicted class, or the one that is named."""
        if target.kind not in ("default", "class"):
            raise UsageError(f"space-time: no target kind {target.kind!r}", remedy="use 'class'")
        best = outputs.argmax(-1).tolist()
        classes = best if target.label is None else [self._class(target.label)] * len(best)
        rows = tuple(TargetRow(i, "class", c, self.names[c]) for i, c in enumerate(classes))
        return BoundTarget(rows, target.scale)

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's class, float32 ``(target,)``."""
        if bound.scale == "value":
            raise UsageError("space-time: a class has no 'value'", remedy="use 'probability' or 'logit'")
        logits = outputs.float()
        table = logits.softmax(-1) if bound.scale == "probability" else logits
        return table[[row.sample for row in bound.rows], [row.class_index for row in bound.rows]]

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        """Patches frame by frame, on both axes."""
        axis = self._tokens()
        return CallLabels((("sample", len(batch)),), axis, axis)

    def readout(self, batch: Batch, outputs: Tensor, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The mean over all tokens."""
        return self._mean_row(len(bound) if bound is not None else len(batch))

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The mean is known before the forward."""
        return self._mean_row(len(batch))

    def flow(self, batch: Batch, outputs: Tensor) -> list[Step]:
        """Layer after layer, each with its residual."""
        return [AttentionStep(CallKey(SITE, layer), STREAM, STREAM) for layer in range(self.config.layers)]

    def cells(self, batch: Batch) -> CellGrid:
        """The patches of one frame."""
        side, pixels = self.config.side, self.config.image
        return CellGrid.regular(side, side, height=pixels, width=pixels)

    def facts(self) -> Mapping[str, Any]:
        """Shape of the model."""
        c = self.config
        return {"frames": c.frames, "image": c.image, "patch": c.patch, "layers": c.layers, "heads": c.heads}

    def _mean_row(self, count: int) -> dict[str, Readout]:
        tokens = self.config.frames * self.config.side**2
        return {SITE: Readout(torch.full((count, tokens), 1.0 / tokens), "patch mean")}

    def _tokens(self) -> TokenAxis:
        side, pixels = self.config.side, self.config.image
        frame = TokenAxis.patches(side, side, height=pixels, width=pixels)
        axis = TokenAxis.concat(*[frame] * self.config.frames)
        return replace(axis, frame=np.repeat(np.arange(self.config.frames, dtype=np.int32), side**2))

    def _class(self, label: str | int) -> int:
        index = self.names.index(label) if label in self.names else label
        if not isinstance(index, int) or not 0 <= index < len(self.names):
            raise UsageError(f"space-time: no class {label!r}", remedy=f"one of {', '.join(self.names)}")
        return index
