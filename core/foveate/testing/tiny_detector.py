"""A tiny detector: an encoder over patches, learned object queries that read from it, one class a query.

It has what the plain :class:`~foveate.testing.tiny.TinySource` lacks: cross-attention, several targets of
one sample, a padding mask, and a first decoder layer whose queries depend on no pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.interfaces import (
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate.testing.tiny import TinyConfig, TinySource

ENCODER, OWN, CROSS = "encoder.self", "decoder.self", "decoder.cross"
TOKENS, QUERIES = "encoder.tokens", "decoder.queries"


@dataclass(frozen=True)
class DetectorConfig(TinyConfig):
    """A :class:`~foveate.testing.tiny.TinyConfig` with object queries; ``layers`` counts both stacks."""

    queries: int = 5


class Reader(nn.Module):
    """Multi-head attention of one sequence over another, with an optional mask of valid keys."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q, self.k, self.v, self.proj = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(sample, query, channel)`` reads ``(sample, key, channel)``; ``valid`` is bool (sample, key)."""
        q, k, v = (
            layer(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, t in ((self.q, x), (self.k, memory), (self.v, memory))
        )
        mask = None if valid is None else valid[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        read: Tensor = self.proj(out)
        return read


class TinyDetectorModel(nn.Module):
    """Encoder layers of self-attention, decoder layers of self- and cross-attention, all with residuals."""

    def __init__(self, config: DetectorConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.position = nn.Parameter(torch.zeros(1, config.side**2, config.width))
        self.queries = nn.Parameter(torch.zeros(1, config.queries, config.width))
        self.encoder = nn.ModuleList(Reader(config) for _ in range(config.layers))
        self.own = nn.ModuleList(Reader(config) for _ in range(config.layers))
        self.cross = nn.ModuleList(Reader(config) for _ in range(config.layers))
        self.head = nn.Linear(config.width, config.classes)
        self._fill(torch.Generator().manual_seed(seed))
        self.eval()

    def forward(self, pixels: Tensor, valid: Tensor | None = None) -> Tensor:
        """``(sample, channel, y, x)`` to logits ``(sample, query, class)``."""
        width = (self.config.width,)
        x = self.embed(pixels).flatten(2).transpose(1, 2) + self.position
        for layer in self.encoder:
            y = F.layer_norm(x, width)
            x = x + layer(y, y, valid)
        objects = self.queries.expand(len(x), -1, -1)
        for own, cross in zip(self.own, self.cross, strict=True):
            y = F.layer_norm(objects, width)
            objects = objects + own(y, y)
            objects = objects + cross(F.layer_norm(objects, width), F.layer_norm(x, width), valid)
        logits: Tensor = self.head(F.layer_norm(objects, width))
        return logits

    @torch.no_grad()
    def _fill(self, generator: torch.Generator) -> None:
        for name, value in self.named_parameters():
            fan_in = 1 if name in ("position", "queries") else value[0].numel() if value.dim() > 1 else 100
            value.normal_(0.0, fan_in**-0.5, generator=generator)
            if name.endswith(("q.weight", "k.weight")):
                value.mul_(self.config.sharpness**0.5)


class TinyDetector(TinySource):
    """A :class:`TinyDetectorModel` as a source; ``batch.per_sample["valid"]`` (sample, key) masks keys."""

    targets = ("object",)

    def __init__(self, config: DetectorConfig = DetectorConfig(), seed: int = 0) -> None:
        super().__init__(config, seed)
        self.queries = config.queries
        self._module = TinyDetectorModel(config, seed)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Encoder, and the decoder's own and cross attention."""
        heads, layers = self.config.heads, range(self.config.layers)
        return (
            Site(ENCODER, {f"encoder.{i}": i for i in layers}, heads, TOKENS, TOKENS, masks=("padding",)),
            Site(OWN, {f"own.{i}": i for i in layers}, heads, QUERIES, QUERIES),
            Site(CROSS, {f"cross.{i}": i for i in layers}, heads, QUERIES, TOKENS, "cross", masks=("padding",)),
        )

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """All patches valid."""
        batch = super().encode(samples)
        valid = torch.ones(len(samples), self.config.side**2, dtype=torch.bool)
        return replace(batch, per_sample={"valid": valid})

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """Logits ``(sample, query, class)``."""
        with torch.set_grad_enabled(grad):
            logits: Tensor = self.module(batch.inputs, batch.per_sample.get("valid"))
        return logits

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        """One prediction a query, best first."""
        answers = []
        for sample in outputs.detach().float().softmax(-1):
            score, index = sample.max(-1)
            order = score.argsort(descending=True).tolist()
            answers.append(
                [Prediction(self._name(int(index[q])), float(score[q]), int(index[q]), q) for q in order]
            )
        return answers

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        """The best class of every query of every sample, or of one query."""
        queries = range(self.queries) if target.object is None else [target.object]
        best = outputs.argmax(-1).tolist()
        rows = tuple(
            TargetRow(i, "object", best[i][q], self._name(best[i][q]), q)
            for i in range(len(batch))
            for q in queries
        )
        return BoundTarget(rows, target.scale)

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's query and class."""
        logits = outputs.float()
        table = logits.softmax(-1) if bound.scale == "probability" else logits
        rows = bound.rows
        return table[[r.sample for r in rows], [r.object for r in rows], [r.class_index for r in rows]]

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        """Patches and object queries."""
        side, pixels = self.config.side, self.config.image
        patches = TokenAxis.patches(side, side, height=pixels, width=pixels)
        objects = TokenAxis.of_kind("object", self.queries)
        axes = {ENCODER: (patches, patches), OWN: (objects, objects), CROSS: (objects, patches)}
        return CallLabels((("sample", len(batch)),), *axes[call.site])

    def readout(self, batch: Batch, outputs: Tensor, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Each target's own query; without targets the query that is surest."""
        if bound is None:
            chosen = outputs.detach().softmax(-1).amax(-1).argmax(-1)
        else:
            chosen = torch.tensor([row.object for row in bound.rows])
        return {CROSS: Readout(F.one_hot(chosen, self.queries).float(), "object query")}

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """None: which query answers depends on the output."""
        return {}

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder, then each decoder layer's own and cross attention."""
        layers = range(self.config.layers)
        steps: list[Step] = [AttentionStep(CallKey(ENCODER, i), TOKENS, TOKENS) for i in layers]
        for i in layers:
            steps.append(AttentionStep(CallKey(OWN, i), QUERIES, QUERIES))
            steps.append(AttentionStep(CallKey(CROSS, i), QUERIES, TOKENS))
        return steps
