"""A complete attention source small enough to check by hand: a two-layer ViT with peaked attention.

Randomly initialised transformers attend uniformly to five digits, so equality tests on them prove
nothing. Here q and k are scaled until rows are peaked (median row entropy well under 0.6 ln K), and all
weights follow from a seed. Use :class:`TinySource` wherever a test needs a model: it implements the whole
of :class:`~foveate.interfaces.AttentionSource` and downloads nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from foveate.errors import UsageError
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

SITE = "vision.encoder.self"
STREAM = "vision.tokens"
LABELS = ("red", "green", "blue")
AttentionStyle = Literal["sdpa", "mha", "mha_weights", "manual"]


@dataclass(frozen=True)
class TinyConfig:
    """Shape and style of a :class:`TinyViT`; ``sharpness`` multiplies q and k."""

    image: int = 32
    patch: int = 8
    width: int = 24
    heads: int = 3
    layers: int = 2
    classes: int = 3
    sharpness: float = 5.0
    style: AttentionStyle = "sdpa"

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.image // self.patch


class TinyAttention(nn.Module):
    """Multi-head self-attention in one of the spellings that models in the wild use."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.heads, self.style = config.heads, config.style
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """``(sample, token, channel)`` to the same."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.style == "manual":
            out = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(out.transpose(1, 2).reshape(batch, tokens, width))
        return projected


class TinyMHA(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` as self-attention, asking for its weights or not."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__(config.width, config.heads, batch_first=True)
        self.ask = config.style == "mha_weights"

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """``(sample, token, channel)`` to the same."""
        return super().forward(x, x, x, need_weights=self.ask)[0]


class TinyBlock(nn.Module):
    """Pre-norm attention and MLP, both with a residual."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = TinyMHA(config) if config.style.startswith("mha") else TinyAttention(config)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(sample, token, channel)`` to the same."""
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class TinyViT(nn.Module):
    """CLS token, learned positions, ``layers`` blocks, a linear head on the CLS token."""

    def __init__(self, config: TinyConfig = TinyConfig(), seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.width))
        self.position = nn.Parameter(torch.zeros(1, config.side**2 + 1, config.width))
        self.blocks = nn.ModuleList(TinyBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        self._fill(torch.Generator().manual_seed(seed))
        self.eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """``(sample, channel, y, x)`` to logits ``(sample, class)``."""
        patches = self.embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(pixels), -1, -1), patches], 1) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits

    @torch.no_grad()
    def _fill(self, generator: torch.Generator) -> None:
        """Fan-in scaled normal weights; rows of q and k times ``sharpness``."""
        for name, value in self.named_parameters():
            if value.dim() > 1:
                fan_in = value.shape[-1] if value.dim() < 4 else value[0].numel()
                scale = 1.0 if name in ("cls", "position") else fan_in**-0.5
                value.normal_(0.0, scale, generator=generator)
            elif "norm" not in name:
                value.normal_(0.0, 0.1, generator=generator)
            if name.endswith(("qkv.weight", "in_proj_weight")):
                value[: 2 * self.config.width] *= self.config.sharpness**0.5


def tiny_samples(count: int = 4, *, height: int = 32, width: int = 32, seed: int = 0) -> list[Sample]:
    """``count`` noisy RGB images with a bright square in a random place, whose mask is given."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        pixels = random.integers(0, 120, (height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), bool)
        size_y, size_x = max(1, height // 4), max(1, width // 4)
        y, x = random.integers(0, height - size_y + 1), random.integers(0, width - size_x + 1)
        mask[y : y + size_y, x : x + size_x] = True
        pixels[mask] = 40
        pixels[mask, number % 3] = 250
        samples.append(Sample(id=f"tiny-{number}", pixels=pixels, sha256=f"{seed}-{number}", mask=mask))
    return samples


class TinySource(AttentionSource):
    """A :class:`TinyViT` with preprocessing: the image is resized to the input, whatever its shape."""

    targets = ("class",)

    def __init__(self, config: TinyConfig = TinyConfig(), seed: int = 0) -> None:
        self.config = config
        self._module: nn.Module = TinyViT(config, seed)
        self.card = ModelCard(id="tiny", source="tiny", adapter=type(self).__name__, family="tiny")

    @classmethod
    def open(
        cls,
        row: Any = None,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> TinySource:
        """``options`` are ``seed`` and the fields of :class:`TinyConfig`."""
        seed = int(options.pop("seed", 0))
        source = cls(TinyConfig(**options), seed)
        source.module.to(device=device, dtype=getattr(torch, dtype))
        return source

    @property
    def module(self) -> nn.Module:
        """The :class:`TinyViT`."""
        return self._module

    @property
    def sites(self) -> tuple[Site, ...]:
        """One site: self-attention over CLS and patches."""
        modules = {f"blocks.{layer}.attention": layer for layer in range(self.config.layers)}
        return (Site(SITE, modules, self.config.heads, STREAM, STREAM, summary="CLS and patches"),)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Resize, scale to [-1, 1]; each image with its exact geometry."""
        pairs = [self.prepare(np.asarray(sample.pixels)) for sample in samples]
        like = next(self.module.parameters())
        inputs = torch.stack([torch.from_numpy(pixels) for pixels, _ in pairs]).to(like)
        return Batch(inputs, tuple(geometry for _, geometry in pairs), tuple(sample.id for sample in samples))

    def prepare(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[np.ndarray[Any, Any], Geometry]:
        """One image ``(y, x, channel)`` as the model takes it, ``(channel, y, x)``, and its geometry."""
        height, width = pixels.shape[:2]
        side = self.config.image
        geometry = Geometry(height, width, side, side, side / height, side / width)
        return _normalised(_resized(pixels, side, side)), geometry

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """Logits ``(sample, class)``."""
        with torch.set_grad_enabled(grad):
            logits: Tensor = self.module(batch.inputs)
        return logits

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        """All classes, best first."""
        scores = outputs.detach().float().softmax(-1)
        return [
            [Prediction(self._name(int(c)), float(row[c]), int(c)) for c in row.argsort(descending=True)]
            for row in scores
        ]

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        """One row a sample: the predicted class, or the one that is named."""
        if target.kind not in ("default", "class"):
            raise UsageError(f"tiny: no target kind {target.kind!r}", remedy="use 'class'")
        best = outputs.argmax(-1).tolist()
        classes = best if target.label is None else [self._class(target.label)] * len(best)
        rows = tuple(TargetRow(i, "class", c, self._name(c)) for i, c in enumerate(classes))
        return BoundTarget(rows, target.scale)

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's class, float32 ``(target,)``."""
        if bound.scale == "value":
            raise UsageError("tiny: a class has no 'value'", remedy="use 'probability' or 'logit'")
        logits = outputs.float()
        table = logits.softmax(-1) if bound.scale == "probability" else logits
        samples = [row.sample for row in bound.rows]
        return table[samples, [row.class_index for row in bound.rows]]

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        """CLS, then patches, on both axes."""
        axis = self._tokens()
        return CallLabels((("sample", len(batch)),), axis, axis)

    def readout(self, batch: Batch, outputs: Tensor, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The CLS row."""
        return self._cls_row(len(bound) if bound is not None else len(batch))

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The CLS row is known before the forward."""
        return self._cls_row(len(batch))

    def flow(self, batch: Batch, outputs: Tensor) -> list[Step]:
        """Layer after layer, each with its residual."""
        return [AttentionStep(CallKey(SITE, layer), STREAM, STREAM) for layer in range(self.config.layers)]

    def cells(self, batch: Batch) -> CellGrid:
        """The patches."""
        side, pixels = self.config.side, self.config.image
        return CellGrid.regular(side, side, height=pixels, width=pixels)

    def facts(self) -> Mapping[str, Any]:
        """Shape of the model."""
        c = self.config
        return {"image": c.image, "patch": c.patch, "layers": c.layers, "heads": c.heads, "prefix": 1}

    def _cls_row(self, count: int) -> dict[str, Readout]:
        weights = torch.zeros(count, self.config.side**2 + 1)
        weights[:, 0] = 1.0
        return {SITE: Readout(weights, "cls")}

    def _tokens(self) -> TokenAxis:
        side, pixels = self.config.side, self.config.image
        return TokenAxis.concat(
            TokenAxis.of_kind("cls", 1), TokenAxis.patches(side, side, height=pixels, width=pixels)
        )

    def _name(self, index: int) -> str:
        return LABELS[index] if index < len(LABELS) else f"class {index}"

    def _class(self, label: str | int) -> int:
        known = [self._name(i) for i in range(self.config.classes)]
        index = known.index(label) if label in known else label
        if not isinstance(index, int) or not 0 <= index < len(known):
            raise UsageError(f"tiny: no class {label!r}", remedy=f"one of {', '.join(known)}")
        return index


class TinyCropSource(TinySource):
    """The same model behind CLIP's preprocessing: shortest side to the input, then the centre is cropped."""

    def prepare(self, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> tuple[np.ndarray[Any, Any], Geometry]:
        """One image ``(y, x, channel)`` of any size as ``(channel, y, x)``, and its geometry."""
        height, width = pixels.shape[:2]
        side = self.config.image
        rows = side if height <= width else int(side * height / width)
        columns = side if width <= height else int(side * width / height)
        top, left = (rows - side) // 2, (columns - side) // 2
        cropped = _resized(pixels, rows, columns)[top : top + side, left : left + side]
        geometry = Geometry(height, width, side, side, rows / height, columns / width, -top, -left)
        return _normalised(cropped), geometry


def _resized(
    pixels: np.ndarray[Any, np.dtype[np.uint8]], rows: int, columns: int
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if pixels.shape[:2] == (rows, columns):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BICUBIC))


def _normalised(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32) / 127.5 - 1.0
