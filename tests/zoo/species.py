"""One architecture of the zoo: how to build it small, and what of it is known not to be attention."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], tuple[nn.Module, dict[str, Any]]]

SMALL: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 32,
    "patch_size": 8,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "projection_dim": 16,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_queries": 7,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "moe_intermediate_size": 16,
}
"""Sizes that every configuration with a field of this name gets, unless a species says otherwise."""


@dataclass(frozen=True)
class Species:
    """``name`` as in the table; ``build`` gives a model (on its default attention) and the inputs of a forward.

    ``ignored`` maps module paths (or patterns with ``*``) whose softmax or grid-sample is not attention to the
    reason; ``uniform`` those whose attention cannot be peaked, whatever the weights; ``heads`` patterns of paths
    to their number of heads, where calls have three axes; ``sharpen`` further parts of names of the parameters
    that make q and k; ``not_eager`` says why the eager path is no reference, ``matrixless`` why nothing can be
    recorded; ``note`` is printed in the table.
    """

    name: str
    build: Build
    ignored: Mapping[str, str] = field(default_factory=dict)
    uniform: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[str, int] = field(default_factory=dict)
    sharpen: tuple[str, ...] = ()
    not_eager: str = ""
    matrixless: str = ""
    note: str = ""


def small(kind: str | type, /, **given: Any) -> Any:
    """A configuration of class ``kind`` with :data:`SMALL` sizes in it and in its parts, then ``given``.

    ``given`` may name a part (``vision_config``) by a mapping of what differs in it, by a configuration, or by
    None (the class's own default).
    """
    cls = found(kind) if isinstance(kind, str) else kind
    fields = {f.name for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {name: size for name, size in SMALL.items() if name in fields}
    for part, part_cls in (getattr(cls, "sub_configs", None) or {}).items():
        chosen = given.pop(part, {})
        if isinstance(chosen, Mapping):
            if part_cls.__name__ == "AutoConfig":
                part_cls = type(cls.sub_configs_defaults[part].default_config)
            chosen = small(part_cls, **chosen)
        values[part] = chosen
    return cls(**{**values, **given})


def model(kind: str, config: Any) -> nn.Module:
    """A transformers model of that class, seeded, in eval mode."""
    torch.manual_seed(0)
    made: nn.Module = found(kind)(config)
    return made.eval()


def found(kind: str) -> Any:
    """A class that transformers exports; else ``<folder>.<class>`` or ``<folder>.<file>.<class>``."""
    import transformers

    *folder, name = kind.split(".")
    if not folder:
        return getattr(transformers, name)
    part = "configuration" if name.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{folder[0]}.{part}_{folder[-1]}"), name)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Reproducible standard normal input."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(size: int = 32, *, frames: int = 0, channels: int = 3, batch: int = 2) -> Tensor:
    """``(sample, channel, y, x)`` or ``(sample, frame, channel, y, x)``."""
    return noise(*((batch, frames) if frames else (batch,)), channels, size, size)


def words(length: int = 9, *, batch: int = 2, start: int = 5, stop: int = 90) -> Tensor:
    """Token ids ``(sample, token)`` away from special ones."""
    return torch.randint(start, stop, (batch, length), generator=torch.Generator().manual_seed(1))


def padded(length: int = 9, *, batch: int = 2, missing: int = 3) -> Tensor:
    """An attention mask ``(sample, token)`` whose last sample ends early."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - missing :] = 0
    return mask


def tower(kind: str, inputs: Callable[[], dict[str, Any]] | None = None, /, cls: str = "", **given: Any) -> Build:
    """``<kind>Model`` (or ``cls``) on a small ``<kind>Config``; by default it sees two pictures of its size."""

    def build() -> tuple[nn.Module, dict[str, Any]]:
        options = dict(given)
        config = small(options.pop("config", f"{kind}Config"), **options)
        seen = {"pixel_values": pixels(_side(config))} if inputs is None else inputs()
        return model(cls or f"{kind}Model", config), seen

    return build


def _side(config: Any) -> int:
    size = getattr(config, "image_size", 32)
    return int(size if isinstance(size, int) else size[0])
