"""PLONK's velocity network: an MLP whose blocks are modulated by the image and the noise level.

Written from the paper (arXiv:2412.06781, section 3.3 and appendix) and the published tensor names, so that
its checkpoints load; parity with the authors' package is tested where that is installed. There is no
attention in it: everything that PLONK looks at is in its image encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

_LEVELS = 1000.0  # noise levels in [0, 1] are embedded like the 1000 steps of a diffusion model
_LONGEST = 10_000.0
FIELDS = ("input_dim", "dim", "depth", "expansion", "cond_dim")


class Sinusoids(nn.Module):
    """``cos`` and ``sin`` of a number at geometrically spaced frequencies."""

    freqs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        exponents = torch.arange(channels // 2, dtype=torch.float32) * (2 / channels)
        self.register_buffer("freqs", _LONGEST**-exponents)

    def forward(self, value: Tensor) -> Tensor:
        """``(row,)`` to ``(row, channel)``."""
        angles = value[:, None] * self.freqs
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class LevelEmbedding(nn.Module):
    """A noise level in [0, 1] as a vector: standardised sinusoids, then two layers."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.encode_time = Sinusoids(channels)
        self.map_time = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, level: Tensor) -> Tensor:
        """``(row,)`` to ``(row, width)``."""
        waves = self.encode_time(level * _LEVELS)
        centred = waves - waves.mean(dim=-1, keepdim=True)
        embedded: Tensor = self.map_time(centred / waves.std(dim=-1, keepdim=True))
        return embedded


class ModulatedBlock(nn.Module):
    """A residual MLP on normalised features; condition sets its scale, shift and gate (adaptive layer norm)."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        hidden = width * expansion
        # the Identity keeps the published numbering of layers, where a dropout stood
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Identity(), nn.Linear(hidden, width))
        self.ada_map = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))
        self.ln = nn.LayerNorm(width, elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(row, width)`` and ``(row, width)`` to ``(row, width)``."""
        scale, shift, gate = self.ada_map(condition).chunk(3, dim=-1)
        updated: Tensor = x + gate * self.mlp(shift + (1 + scale) * self.ln(x))
        return updated


class VelocityNetwork(nn.Module):
    """Velocity on R^3 of a point at a noise level, given an image embedding."""

    def __init__(self, input_dim: int, dim: int, depth: int, expansion: int, cond_dim: int) -> None:
        super().__init__()
        self.time_embedder = LevelEmbedding(dim // 4, dim)
        self.cond_mapper = nn.Linear(cond_dim, dim)
        self.initial_mapper = nn.Linear(input_dim, dim)
        self.blocks = nn.ModuleList(ModulatedBlock(dim, expansion) for _ in range(depth))
        self.final_adaln = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.final_ln = nn.LayerNorm(dim, elementwise_affine=False)
        self.final_linear = nn.Linear(dim, input_dim)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Velocity ``(row, 3)`` for ``y (row, 3)``, ``gamma (row,)`` and ``emb (row, cond_dim)``."""
        condition = self.cond_mapper(batch["emb"]) + self.time_embedder(batch["gamma"])
        x = self.initial_mapper(batch["y"])
        for block in self.blocks:
            x = block(x, condition)
        scale, shift = self.final_adaln(condition).chunk(2, dim=-1)
        velocity: Tensor = self.final_linear(shift + (1 + scale) * self.final_ln(x))
        return velocity


def network_fields(config: Mapping[str, Any]) -> dict[str, int]:
    """The network's sizes out of its ``config.json``. Raises ModelError for a missing or impossible one."""
    try:
        fields = {name: int(config[name]) for name in FIELDS}
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"PLONK config: {error!r}", remedy=f"it needs whole numbers for {', '.join(FIELDS)}"
        ) from error
    if fields["input_dim"] != 3:
        raise ModelError(
            f"PLONK config: input_dim {fields['input_dim']}; locations are unit vectors in 3 dimensions"
        )
    return fields
