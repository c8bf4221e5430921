"""The network of the small video instance segmenter: one query follows one shape through the clip.

Convolutions turn every frame, with a glance at the one before and the one after, into cells; cells of all frames
attend to each other (joint space-time attention, as
ViViT's first model, Arnab et al. 2021, arXiv:2103.15691, section 3.3); queries read from all cells at once, speak
with each other and answer with one class and one mask a frame (as Mask2Former for video, Cheng et al. 2021,
arXiv:2112.10764, section 3). Blocks are pre-norm and residual.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MODEL_TYPE = "foveate_swimmer"
STRIDE = 6
"""Pixels along the side of a cell."""


@dataclass(frozen=True)
class SwimmerConfig:
    """Everything that fixes the network but its weights; sizes in pixels, ``classes`` by index."""

    classes: tuple[str, ...]
    frames: int = 6
    size: int = 48
    width: int = 64
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 3
    queries: int = 4

    def __post_init__(self) -> None:
        if self.size % STRIDE or self.width % self.heads:
            raise ValueError(f"size {self.size} must be a multiple of {STRIDE}, width {self.width} of heads")

    @property
    def cells(self) -> int:
        """Cells along one side of a frame."""
        return self.size // STRIDE

    def to_dict(self) -> dict[str, Any]:
        """As it is kept in ``config.json``."""
        return {"model_type": MODEL_TYPE, **asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> SwimmerConfig:
        """Back from ``config.json``; unknown keys raise TypeError."""
        known = {name: value for name, value in kept.items() if name != "model_type"}
        return cls(**{**known, "classes": tuple(kept["classes"])})


@dataclass(frozen=True, eq=False)
class SwimmerOutput:
    """``logits`` (sample, query, class + 1), "no object" last; ``masks`` logits (sample, query, frame, y, x).

    ``layers`` holds both after every decoder layer, the last one included.
    """

    logits: Tensor
    masks: Tensor
    layers: tuple[tuple[Tensor, Tensor], ...] = ()


class Attention(nn.Module):
    """Scaled dot-product attention with heads: ``(sample, query, width)`` reads ``(sample, key, width)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """What the queries read."""
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        read = F.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(read.transpose(1, 2).flatten(2))
        return result


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class EncoderLayer(nn.Module):
    """Cells of all frames read from each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.mlp = _mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, cells: Tensor) -> Tensor:
        """``(sample, cell, width)`` to the same."""
        x = self.norms[0](cells)
        cells = cells + self.self_attn(x, x, x)
        result: Tensor = cells + self.mlp(self.norms[1](cells))
        return result


class DecoderLayer(nn.Module):
    """Queries read from the cells, then from each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.cross_attn, self.self_attn = Attention(width, heads), Attention(width, heads)
        self.mlp = _mlp(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, queries: Tensor, place: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``(sample, query, width)`` to the same; ``place`` tells queries apart."""
        queries = queries + self.cross_attn(self.norms[0](queries) + place, keys, values)
        x = self.norms[1](queries)
        queries = queries + self.self_attn(x + place, x + place, x)
        result: Tensor = queries + self.mlp(self.norms[2](queries))
        return result


class Swimmer(nn.Module):
    """Clips ``(sample, frame, channel, y, x)`` to classes and masks of a fixed number of queries."""

    def __init__(self, config: SwimmerConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        self.fine = nn.Sequential(_conv(3, 32, 2), _conv(32, 32, 1))
        # kernel, stride and padding such that a cell's middle is where its token looks, within half a pixel
        self.coarse = _conv(32, width, STRIDE // 2, kernel=5, padding=1)
        self.near = nn.Conv3d(width, width, (3, 1, 1), padding=(1, 0, 0), padding_mode="replicate")
        self.cell_norm = nn.LayerNorm(width)
        space, time = _places(config.frames, config.cells, width)
        self.space, self.time = nn.Parameter(space), nn.Parameter(time)
        self.encoder = nn.ModuleList(EncoderLayer(width, config.heads) for _ in range(config.encoder_layers))
        self.memory_norm = nn.LayerNorm(width)
        self.decoder = nn.ModuleList(DecoderLayer(width, config.heads) for _ in range(config.decoder_layers))
        self.query = nn.Parameter(0.5 * torch.randn(1, config.queries, width))
        self.query_place = nn.Parameter(0.5 * torch.randn(1, config.queries, width))
        self.answer_norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, len(config.classes) + 1)
        self.mask_query = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.mask_fine, self.mask_coarse = nn.Conv2d(32, width, 1), nn.Conv2d(width, width, 1)
        self.mask_pixels = nn.Sequential(nn.GELU(), nn.Conv2d(width, width, 1))

    def forward(self, clips: Tensor) -> SwimmerOutput:
        """Answers; masks are on a grid of half the input's size."""
        samples, frames = clips.shape[:2]
        fine = self.fine(clips.flatten(0, 1))
        coarse = self.near(self.coarse(fine).unflatten(0, (samples, frames)).transpose(1, 2))
        cells = coarse.permute(0, 2, 3, 4, 1).flatten(2, 3)
        cells = (self.cell_norm(cells) + self.space + self.time).flatten(1, 2)
        for layer in self.encoder:
            cells = layer(cells)
        memory = self.memory_norm(cells)
        pixels = self._pixels(fine, memory, frames)
        keys = memory + (self.space + self.time).flatten(1, 2)
        queries, answers = self.query.expand(samples, -1, -1), []
        for layer in self.decoder:
            queries = layer(queries, self.query_place, keys, memory)
            answers.append(self._answer(queries, pixels))
        return SwimmerOutput(*answers[-1], layers=tuple(answers))

    def _pixels(self, fine: Tensor, memory: Tensor, frames: int) -> Tensor:
        """What masks are made of: (sample, frame, width, y, x)."""
        grid = memory.unflatten(1, (frames, -1)).flatten(0, 1).transpose(1, 2)
        grid = self.mask_coarse(grid.unflatten(-1, (self.config.cells, -1)))
        up = F.interpolate(grid, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        pixels: Tensor = self.mask_pixels(self.mask_fine(fine) + up).unflatten(0, (-1, frames))
        return pixels

    def _answer(self, queries: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.answer_norm(queries)
        masks = torch.einsum("bqc,btcyx->bqtyx", self.mask_query(x), pixels) / self.config.width**0.5
        return self.classifier(x), masks


def _places(frames: int, cells: int, width: int) -> tuple[Tensor, Tensor]:
    """Where training of the codes of place starts: ``(1, 1, cell, width)`` and ``(1, frame, 1, width)``.

    Sines and cosines of y, of x and of time, each in channels of its own, from half a wave to four over the clip:
    near places have like codes, so that what is learned in one cell holds in the next.
    """
    each = width // 6 * 2
    y, x = (_waves(cells, each).repeat_interleave(cells, 0), _waves(cells, each).repeat(cells, 1))
    space = torch.cat([y, x, torch.zeros(cells**2, width - 2 * each)], 1)
    time = torch.cat([torch.zeros(frames, 2 * each), _waves(frames, width - 2 * each)], 1)
    return space[None, None], time[None, :, None]


def _waves(count: int, channels: int) -> Tensor:
    """``(place, channel)``: sines, then cosines, of places between 0 and 1."""
    place = (torch.arange(count) + 0.5) / count
    wave = torch.pi * 8 ** torch.linspace(0, 1, channels // 2)
    angle = place[:, None] * wave
    return torch.cat([angle.sin(), angle.cos()], 1)


def _conv(channels: int, width: int, stride: int, *, kernel: int = 3, padding: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(channels, width, kernel, stride, padding)
    return nn.Sequential(layer, nn.GroupNorm(4, width), nn.GELU())
