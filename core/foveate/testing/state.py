"""What a model is made of, so that a test can say that nothing of it has changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack  # the only way to see a mode left behind

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def module_state(module: nn.Module) -> dict[str, Any]:
    """Hooks, patched methods, modes, attention implementation and a checksum of every tensor, by name.

    Compare two with ``==``. Parameters are summarised by their sum and a weighted sum in float64: an exact
    copy would double the memory of a large model.
    """
    state: dict[str, Any] = {
        "grad enabled": torch.is_grad_enabled(),
        "function modes": len(_get_current_function_mode_stack()),
    }
    for name, part in module.named_modules():
        state[f"{name} hooks"] = tuple(len(getattr(part, kind)) for kind in HOOKS)
        state[f"{name} training"] = part.training
        state[f"{name} patched"] = tuple(sorted(key for key in vars(part) if callable(vars(part)[key])))
        state[f"{name} attention"] = getattr(getattr(part, "config", None), "_attn_implementation", None)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        state[name] = (tensor.requires_grad, tensor.grad is None, *_checksum(tensor))
    return state


def tensors_of(outputs: Any) -> list[torch.Tensor]:
    """Every tensor inside whatever a model returned, in a fixed order."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts: Iterable[Any] = ()
    if isinstance(outputs, Mapping):
        parts = outputs.values()
    elif isinstance(outputs, list | tuple):
        parts = outputs
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        parts = [getattr(outputs, field.name) for field in fields(outputs)]
    elif hasattr(outputs, "__dict__"):
        parts = vars(outputs).values()
    return [tensor for part in parts for tensor in tensors_of(part)]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit (NaN equals NaN). Two empty lists raise ValueError."""
    if not left:
        raise ValueError("no tensor was found in the outputs: use a tensor, mapping, sequence or dataclass")
    return len(left) == len(right) and all(map(_equal, left, right))


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    unknown = (
        left.isnan() & right.isnan() if left.is_floating_point() else torch.zeros_like(left, dtype=torch.bool)
    )
    return bool(((left == right) | unknown).all())


def _checksum(tensor: torch.Tensor) -> tuple[float, float]:
    plain = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = plain.double().flatten().nan_to_num(nan=-1.0)
    return float(flat.sum()), float((flat * torch.arange(1, flat.numel() + 1, device=flat.device)).sum())
