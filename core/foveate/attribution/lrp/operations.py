"""Which rule serves which torch operation, and a clear end where none does.

A rule is chosen by the operation's name and by which of its operands were computed from the model's input. The
others are constants (weights, biases, masks, scales) and take no relevance: a product with one is a linear
layer, a sum with one is a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from foveate.attribution.lrp import rules
from foveate.attribution.lrp.recording import Operation
from foveate.errors import UsageError

Depends = Callable[[Any], bool]
Given = Iterator[tuple[Tensor, Tensor]]
"""Operands with the relevance that each gets."""

# fmt: off
MOVES = frozenset((
    "view", "_unsafe_view", "_reshape_alias", "reshape", "transpose", "permute", "t", "unsqueeze", "squeeze",
    "expand", "slice", "select", "split", "split_with_sizes", "unbind", "cat", "stack", "index", "index_select",
    "gather", "clone", "constant_pad_nd", "flip", "roll", "repeat", "masked_fill", "where",
))
"""Entries are moved, repeated, dropped or filled with constants: relevance goes with them."""
UNCHANGED = frozenset((
    "_softmax", "_safe_softmax", "native_layer_norm", "gelu", "relu", "silu", "sigmoid", "tanh", "leaky_relu",
    "elu", "hardswish", "mish", "_to_copy", "neg", "detach", "alias",
))
"""One entry in, one out: relevance stays where it is (softmax, activations and LayerNorm: as the authors')."""
# fmt: on
POOLS = frozenset({"mean", "sum"})
SOFTMAXES = frozenset({"_softmax", "_safe_softmax"})
"""What attention weights come out of."""


def give(operation: Operation, relevance: list[Tensor], depends: Depends) -> Given:
    """Relevance of the operands, from one float64 tensor for each result. UsageError where there is no rule."""
    name, arguments = operation.name, operation.arguments
    if operation.in_place:
        raise _no_rule(operation, "overwrites its operand, which the rules would need")
    if name in MOVES:
        return _move(operation, relevance, depends)
    if name in UNCHANGED:
        return iter([(arguments[0], relevance[0])])
    if name in POOLS:
        return _pool(operation, relevance[0])
    if name in ("mm", "bmm"):
        return _multiply(arguments[0], arguments[1], relevance[0], depends)
    if name in ("addmm", "baddbmm") and not depends(arguments[0]):
        return _multiply(arguments[1], arguments[2], relevance[0], depends)
    if name in ("add", "sub"):
        sign = operation.options.get("alpha", 1) * (1 if name == "add" else -1)
        return _add(arguments[0], arguments[1], sign, relevance[0], depends)
    if name == "mul":
        return _scale(arguments[0], arguments[1], relevance[0], depends)
    if name == "div" and depends(arguments[0]):
        # A divisor scales as LayerNorm's does, x / |x| for one: it takes none.
        return iter([(arguments[0], relevance[0].sum_to_size(arguments[0].shape))])
    raise _no_rule(operation, "has no relevance rule")


def _move(operation: Operation, relevance: list[Tensor], depends: Depends) -> Given:
    """Autograd of the same move."""
    operands: list[Tensor] = []
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not depends(value):
            return value
        operands.append(value)
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    with torch.enable_grad():
        arguments, options = tree_map(leaf, (operation.arguments, operation.options))
        moved = operation.function(*arguments, **options)
        results = [moved] if isinstance(moved, Tensor) else list(moved)
        found = torch.autograd.grad(results, leaves, relevance)
    return zip(operands, found, strict=True)


def _pool(operation: Operation, relevance: Tensor) -> Given:
    x, *where = operation.arguments
    yield x, rules.generic(lambda value: operation.function(value, *where, **operation.options), x, relevance)


def _multiply(left: Tensor, right: Tensor, relevance: Tensor, depends: Depends) -> Given:
    if not depends(right):
        yield left, rules.positive(left, right, relevance)
    elif not depends(left):
        yield right, rules.positive(right.mT, left.mT, relevance.mT).mT
    else:
        yield from zip((left, right), rules.product(left, right, relevance), strict=True)


def _add(left: Any, right: Any, sign: float, relevance: Tensor, depends: Depends) -> Given:
    if depends(left) and depends(right):
        yield from zip((left, right), rules.addition(left, sign * right, relevance), strict=True)
    else:
        yield _to_the_computed(left, right, relevance, depends)


def _scale(left: Any, right: Any, relevance: Tensor, depends: Depends) -> Given:
    if depends(left) and depends(right):
        yield from zip((left, right), rules.gated(left, right, relevance), strict=True)
    else:
        yield _to_the_computed(left, right, relevance, depends)


def _to_the_computed(left: Any, right: Any, relevance: Tensor, depends: Depends) -> tuple[Tensor, Tensor]:
    computed: Tensor = left if depends(left) else right
    return computed, relevance.sum_to_size(computed.shape)


def _no_rule(operation: Operation, why: str) -> UsageError:
    shapes = " ".join(str(tuple(a.shape)) for a in operation.arguments if isinstance(a, Tensor))
    return UsageError(
        f"chefer_cvpr21: {operation.function} of {shapes} in module {operation.owner or '(the source)'!r} {why}",
        remedy="the method is defined for plain ViTs; use chefer_iccv21, which follows attention alone",
    )
