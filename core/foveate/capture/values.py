"""What heads put out instead of their own result, by changing the values that their weights are multiplied with.

A head whose values are all the same vector m puts out m, because its weights sum to 1; with m = 0 it is silent.
Its attention stays what q and k make it, so that records still show what the head looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.capture.dense import canonical
from foveate.capture.follow import MATRIX_PRODUCTS, Pending, operands_of
from foveate.errors import CaptureError

HeadValues = Mapping[int, Tensor]
"""Head -> its output, ``(channel)`` or a single number."""


def constant_values(values: Tensor, heads: HeadValues) -> Tensor:
    """Values ``(batch, head, key, channel)`` in which the given heads have one vector for all keys."""
    chosen = torch.zeros(1, values.shape[1], 1, 1, dtype=torch.bool, device=values.device)
    constant = values.new_zeros(1, values.shape[1], 1, values.shape[3])
    for head, output in heads.items():
        chosen[:, head] = True
        constant[:, head] = output.to(values)
    return torch.where(chosen, constant, values)


def changed_product(func: Any, args: tuple[Any, ...], pending: Pending, heads: int, given: HeadValues) -> Any:
    """Arguments of a product of weights and values, with the values changed. Raises CaptureError if it cannot."""
    weights, values = operands_of(args)[:2]
    if len(operands_of(args)) != 2 or id(weights) not in pending.aliases:
        raise _unknown(pending, "the weights are not the first of two operands")
    if func in MATRIX_PRODUCTS:
        return (weights, _by_matrix(weights, values, pending, heads, given))
    if weights.shape != pending.weights.shape:
        raise _unknown(pending, f"the weights were reshaped to {tuple(weights.shape)} before {args[0]!r}")
    return (args[0], weights, _by_einsum(args[0], values, pending, given))


def _by_matrix(weights: Tensor, values: Tensor, pending: Pending, heads: int, given: HeadValues) -> Tensor:
    """Values of ``weights @ values``, whose leading axes are those of the weights."""
    same = weights.shape[-2:] == pending.weights.shape[-2:] and values.shape[:-2] == weights.shape[:-2]
    if not same or math.prod(weights.shape[:-2]) % heads or (weights.dim() > 3 and weights.shape[-3] != heads):
        raise _unknown(pending, f"{tuple(weights.shape)} @ {tuple(values.shape)} has no axis of {heads} heads")
    return constant_values(canonical(values, heads), given).reshape(values.shape)


def _by_einsum(equation: str, values: Tensor, pending: Pending, given: HeadValues) -> Tensor:
    """Values of an einsum such as ``bhqk,bkhd->bqhd``, wherever their head, key and channel axes are."""
    of_weights, of_values = equation.replace(" ", "").split("->")[0].split(",")
    head = of_weights[-3] if len(of_weights) > 2 else ""
    shared = [axis for axis in of_values if axis in of_weights]
    channels = [axis for axis in of_values if axis not in of_weights]
    key = of_weights[-1]
    if "." in equation or not head or head not in shared or key not in shared or len(channels) != 1:
        raise _unknown(
            pending, f"the einsum {equation!r} does not show one head and one channel axis of the values"
        )
    order = [of_values.index(a) for a in of_values if a not in (head, key, channels[0])]
    order += [of_values.index(a) for a in (head, key, channels[0])]
    moved = values.permute(order)
    changed = constant_values(moved.reshape(-1, *moved.shape[-3:]), given).reshape(moved.shape)
    return changed.permute([order.index(axis) for axis in range(len(order))])


def _unknown(pending: Pending, reason: str) -> CaptureError:
    return CaptureError(
        f"AblateHeads: cannot find the heads' values in {pending.name or 'the root module'}: {reason}",
        remedy="use to='mean', which acts on the weights, or switch the model to SDPA",
    )
