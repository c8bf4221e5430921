"""A tracker that reads clips a block of frames at a time: a memory token, tracks by colour that are born in time.

Frame by frame the memory and the patches attend to each other; the memory goes on to the next frame. Tracks (one a
colour that was seen so far) and two anchors read the patches. Nothing is random but the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    Part,
    Place,
    Prediction,
    Readout,
    Site,
    TargetRow,
    TokenAxis,
)
from foveate.testing.tiny import TinyBlock, TinyConfig
from foveate.testing.tiny_detector import Reader

SELF, READ = "encoder.self", "tracker.cross"
TOKENS, PATCHES, ROWS = "encoder.tokens", "encoder.patches", "tracker.rows"
COLOURS = ("red", "green", "blue")
ANCHORS = 2


@dataclass
class Answer:
    """What one block did: the tracks of every frame, masks, running scores, and what goes on."""

    rows: list[list[int]]
    masks: Tensor
    scores: dict[int, float]
    logits: Tensor
    state: dict[str, Any]


class MemoryModel(nn.Module):
    """See the module."""

    def __init__(self, config: TinyConfig, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.config = config
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.start = nn.Parameter(torch.randn(1, 1, config.width))
        self.blocks = nn.ModuleList(TinyBlock(config) for _ in range(2))
        self.read = Reader(config)
        self.colours = nn.Parameter(torch.randn(len(COLOURS), config.width))
        self.anchors = nn.Parameter(torch.randn(ANCHORS, config.width))
        self.head = nn.Linear(config.width, len(COLOURS))
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.endswith(("qkv.weight", "q.weight", "k.weight")):
                    value *= 3
        self.eval()

    def forward(self, clip: Tensor, state: dict[str, Any] | None) -> Answer:
        """``(frame, channel, y, x)`` of one clip."""
        state = state or {"memory": self.start, "seen": (), "sums": {}, "frames": 0}
        memory, seen = state["memory"], list(state["seen"])
        sums, count = dict(state["sums"]), state["frames"]
        rows, masks, logits = [], [], self.head(memory[0, 0])
        for frame in clip:
            found = self.segments(frame)
            seen += [c for c in range(len(COLOURS)) if found[c].any() and c not in seen]
            patches = self.embed(frame[None]).flatten(2).transpose(1, 2)
            x = torch.cat([memory, patches], 1)
            for block in self.blocks:
                x = block(x)
            queries = torch.cat([self.colours[seen], self.anchors])[None] + x[:, :1]
            read = self.read(queries, x[:, 1:])
            for i, colour in enumerate(seen):
                sums[colour] = sums.get(colour, 0.0) + float(self.head(read[0, i])[colour].sigmoid())
            memory, count = torch.tanh(x[:, :1]), count + 1
            logits = self.head(memory[0, 0])
            rows.append(list(seen))
            masks.append(found)
        scores = {colour: total / count for colour, total in sums.items()}
        kept = {"memory": memory.detach(), "seen": tuple(seen), "sums": sums, "frames": count}
        return Answer(rows, torch.stack(masks), scores, logits, kept)

    @staticmethod
    def segments(frame: Tensor) -> Tensor:
        """Where each colour is, bool ``(colour, y, x)``."""
        bright, others = frame > 0.5, frame < -0.2
        return torch.stack([bright[c] & others[[k for k in range(3) if k != c]].all(0) for c in range(3)])


class MemorySource(AttentionSource):
    """One clip at a time, every frame, at its own size."""

    media, carries, targets = "clip", True, ("class", "mask")

    def __init__(self, seed: int = 0, size: int = 16) -> None:
        self.config = TinyConfig(image=size, patch=8)
        self.card = ModelCard("memory", "memory", "memory")
        self._module = MemoryModel(self.config, seed)
        self.largest = 0
        """Most frames of any forward."""

    @classmethod
    def open(cls, row: Any = None, **options: Any) -> MemorySource:
        return cls(**{k: v for k, v in options.items() if k in ("seed", "size")})

    @property
    def module(self):
        return self._module

    @property
    def sites(self):
        heads = self.config.heads
        return (
            Site(SELF, {f"blocks.{i}.attention": i for i in range(2)}, heads, TOKENS, TOKENS, group=("frame",)),
            Site(READ, {"read": 0}, heads, ROWS, PATCHES, "cross", group=("frame",), ragged=("query",)),
        )

    def encode(self, samples):
        clips = [torch.from_numpy(s.pixels.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1 for s in samples]
        inputs = torch.stack(clips)
        index = torch.arange(inputs.shape[1]).expand(len(samples), -1)
        geometry = tuple(Geometry.identity(*s.pixels.shape[1:3]) for s in samples)
        return Batch(inputs, geometry, tuple(s.id for s in samples), {"frame_index": index})

    def forward(self, batch, *, grad=False):
        (clip,) = batch.inputs
        self.largest = max(self.largest, len(clip))
        with torch.set_grad_enabled(grad):
            return self.module(clip, batch.shared.get("state"))

    def carry(self, outputs):
        return outputs.state

    def predictions(self, outputs, batch):
        masks = outputs.masks.numpy()
        ranked = sorted(outputs.scores, key=lambda c: -outputs.scores[c])
        return [
            [
                Prediction(COLOURS[c], outputs.scores[c], c, object=c, mask=masks[:, c], track=f"track {c}")
                for c in ranked
            ]
        ]

    def bind(self, outputs, batch, target):
        best = int(outputs.logits.argmax())
        return BoundTarget((TargetRow(0, "class", best, COLOURS[best]),), target.scale)

    def score(self, outputs, batch, bound):
        return outputs.logits[[row.class_index for row in bound.rows]].float()

    def label(self, call: CallKey, batch, outputs):
        side = batch.inputs.shape[-1]
        cells = side // self.config.patch
        patches = TokenAxis.patches(cells, cells, height=side, width=side)
        frame = {"frame": Part((call.number,), batch.inputs.shape[1])}
        if call.site == SELF:
            tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), patches)
            return CallLabels((("sample", 1),), tokens, tokens, at=frame)
        seen, rows = outputs.rows[-1], outputs.rows[call.number]
        names = tuple(f"track {c}" for c in seen)
        axis = TokenAxis.concat(
            TokenAxis.of_kind("object", ANCHORS), TokenAxis.of_kind("track", len(seen), label=names)
        )
        index = (*(ANCHORS + seen.index(c) for c in rows), *range(ANCHORS))
        return CallLabels((("sample", 1),), axis.take(index), patches, at=frame, query_place=Place(axis, index))

    def readout(self, batch, outputs, bound=None):
        side = batch.inputs.shape[-1] // self.config.patch
        weights = torch.zeros(1, 1 + side * side)
        weights[:, 0] = 1
        return {SELF: Readout(weights, "memory")}

    def fixed_readout(self, batch):
        return self.readout(batch, None)

    def flow(self, batch, outputs):
        return []

    def cells(self, batch):
        side = batch.inputs.shape[-1]
        return CellGrid.regular(side // 8, side // 8, height=side, width=side)

    def bounds(self, header):
        return {ROWS: ANCHORS + len(COLOURS)}


def swimming(count: int, *, size: int = 16, births: dict[int, int] | None = None, seed: int = 0) -> np.ndarray:
    """uint8 (frame, y, x, 3): grey noise and a moving square of each colour from its frame of birth on."""
    random = np.random.default_rng(seed)
    clip = random.integers(60, 100, (count, size, size, 1), dtype=np.uint8).repeat(3, -1)
    for colour, born in (births or {0: 0, 1: count // 3, 2: 2 * count // 3}).items():
        for t in range(born, count):
            y, x = 5 * colour % (size - 4), (t + 3 * colour) % (size - 4)
            clip[t, y : y + 4, x : x + 4] = 10
            clip[t, y : y + 4, x : x + 4, colour] = 250
    return clip
