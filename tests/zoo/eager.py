"""The other reference: the matrices that a model returns itself when asked for ``output_attentions``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def twin(model: nn.Module) -> nn.Module:
    """A copy with the same weights on eager attention."""
    other = copy.deepcopy(model)
    switch = getattr(other, "set_attn_implementation", None)
    if switch is not None:
        switch("eager")
    for part in other.modules():
        config = getattr(part, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return other


def matrices(model: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Every attention matrix that the eager twin returns, in float32, ``(..., query, key)``.

    Empty where the forward takes no ``output_attentions`` or returns none.
    """
    other = twin(model)
    accepted = inspect.signature(other.forward).parameters
    if "output_attentions" not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        return []
    with torch.no_grad():
        torch.manual_seed(0)
        outputs = other(**inputs, output_attentions=True)
    return [tensor for tensor in _attentions(outputs, False) if tensor.dim() >= 3]


def _attentions(value: Any, inside: bool) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if inside and value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _attentions(part, inside or "attention" in name)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _attentions(part, inside)
