"""Where do q and k come from? Data flow of one forward, followed tensor by tensor.

A ``TorchFunctionMode`` under the tap notes for every tensor which *roots* it was made from: inputs of the model,
outputs of earlier attention calls, parameters used as tokens. An attention output is a root of its own, so the
roots of q are what the residual stream of its tokens was summed from. q and k of self-attention share them;
q and k of cross-attention do not. Only references that do not keep tensors alive are held, unless asked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foveate.capture.einsums import einsum_operands, einsum_output
from foveate.capture.follow import MATRIX_PRODUCTS
from foveate.capture.owners import Owners
from foveate.capture.tap import SOFTMAXES

ADDING_PRODUCTS: tuple[Callable[..., Any], ...] = (torch.baddbmm, Tensor.baddbmm, torch.addbmm)
WEIGHTED: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.embedding,
        torch.embedding,
        F.layer_norm,
        torch.layer_norm,
        F.group_norm,
        F.batch_norm,
        *([F.rms_norm] if hasattr(F, "rms_norm") else []),
    }
)
"""Functions whose first argument is data and whose others are weights, which are no tokens."""

SHAPES: frozenset[Callable[..., Any]] = frozenset(
    {Tensor.expand_as, Tensor.view_as, Tensor.reshape_as, Tensor.type_as, Tensor.to}
)
"""Functions that take no more than the shape or dtype of their second argument."""
CONSTANTS: frozenset[Callable[..., Any]] = frozenset(
    {torch.zeros_like, torch.ones_like, torch.full_like, torch.empty_like, torch.randn_like, torch.rand_like}
)
"""Functions whose result is made from nothing that the argument holds."""


class Root(NamedTuple):
    """What tokens are made from: ``kind`` is "input", "call" or "parameter"; ``name`` says which."""

    kind: str
    number: int
    name: str


Roots = frozenset[Root]
NOTHING: Roots = frozenset()


@dataclass(frozen=True, eq=False)
class Reading:
    """One attention call as data flow.

    ``query`` and ``key`` are the roots of q and k, ``out`` the root that the call's output is. ``tensors``
    holds q, k (``(..., token, channel)``) and the raw output, and how to lay the output out like q, where asked.
    """

    query: Roots
    key: Roots
    out: Root
    tensors: Operands | None = None


@dataclass(frozen=True, eq=False)
class Operands:
    """The tensors of one call: q and k ``(..., token, channel)``, ``out`` as it is in the graph.

    ``arranged`` gives a tensor of the shape of ``out`` as ``(..., query, channel)``.
    """

    q: Tensor
    k: Tensor
    out: Tensor
    arranged: Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class _Trail:
    """What is known of one tensor. ``pair`` is set on scores and weights: (roots, roots, q, k)."""

    roots: Roots = NOTHING
    pair: tuple[Roots, Roots, Tensor | None, Tensor | None] | None = None
    weights: bool = False
    equation: str = ""


UNKNOWN = _Trail()


@dataclass(eq=False)
class _Memory:
    """Trails by identity, as long as the tensor lives."""

    trails: dict[int, tuple[weakref.ref[Tensor], _Trail]] = field(default_factory=dict)

    def set(self, tensor: Tensor, trail: _Trail) -> None:
        self.trails[id(tensor)] = (weakref.ref(tensor), trail)

    def get(self, tensor: Tensor) -> _Trail:
        entry = self.trails.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        if isinstance(tensor, nn.Parameter):
            return _Trail(frozenset({Root("parameter", id(tensor), "parameters")}))
        return UNKNOWN


class DataFlow(TorchFunctionMode):
    """Follows roots through a forward; enter it before the tap, so that it sees what the tap lets through.

    A tap's sink asks with :meth:`take` for the call that has just ended. With ``keep`` each reading holds its
    tensors (and their graph).
    """

    def __init__(self, module: nn.Module, inputs: Iterable[tuple[str, Tensor]], *, keep: bool = False) -> None:
        super().__init__()
        self._latest: Reading | None = None
        self._keep = keep
        self._calls = 0
        self._owners = Owners(module)
        self._memory = _Memory()
        for number, (name, tensor) in enumerate(inputs):
            self._memory.set(tensor, _Trail(frozenset({Root("input", number, name)})))

    def take(self) -> Reading | None:
        """The reading of the call that has just ended, once; None where data flow did not see it end."""
        latest, self._latest = self._latest, None
        return latest

    def roots(self, tensor: Tensor) -> Roots:
        """What a tensor was made from."""
        return self._memory.get(tensor).roots

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run, and note what came from what."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is Tensor.__setitem__:
            self._write(args)
        elif isinstance(out, Tensor):
            self._note(func, args, kwargs, out)
        elif isinstance(out, tuple | list):
            for part in out:
                if isinstance(part, Tensor):
                    self._note(func, args, kwargs, part)
        return out

    def _note(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        operands = list(_tensors([*args, *kwargs.values()]))
        if func is F.scaled_dot_product_attention:
            q, k = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self._end(self._pair(q, k), out, lambda t: t)
        elif func in MATRIX_PRODUCTS or func is torch.einsum or func in ADDING_PRODUCTS:
            self._multiply(func, args, operands, out)
        elif func in WEIGHTED:
            self._memory.set(out, _Trail(self._memory.get(operands[0]).roots if operands else NOTHING))
        elif func not in CONSTANTS:
            self._pass_on(func, operands[:1] if func in SHAPES else operands, out)

    def _pass_on(self, func: Any, operands: list[Tensor], out: Tensor) -> None:
        trails = [self._memory.get(tensor) for tensor in operands]
        roots = NOTHING.union(*(trail.roots for trail in trails))
        first = next((trail for trail in trails if trail.pair is not None), UNKNOWN)
        if func in SOFTMAXES:
            pair = first.pair or (roots, NOTHING, None, None)
            self._memory.set(out, _Trail(roots, pair, weights=True))
        else:
            self._memory.set(out, _Trail(roots, first.pair, first.weights))

    def _multiply(self, func: Any, args: Any, operands: list[Tensor], out: Tensor) -> None:
        left, right = operands[-2:] if len(operands) > 1 else (operands[0], operands[0])
        equation = args[0] if func is torch.einsum and isinstance(args[0], str) else ""
        for weights in (left, right):
            trail = self._memory.get(weights)
            if trail.weights and trail.pair is not None:
                arranged = (
                    einsum_output(equation, int(weights is not left), (left.dim(), right.dim()))
                    if equation
                    else _same
                )
                self._end(trail.pair, out, arranged)
                return
        q, k = einsum_operands(equation, left, right) if equation else (left, right.transpose(-1, -2))
        pair = self._pair(left, right, q, k)
        self._memory.set(out, _Trail(pair[0] | pair[1], pair))

    def _pair(
        self, left: Tensor, right: Tensor, q: Tensor | None = None, k: Tensor | None = None
    ) -> tuple[Roots, Roots, Tensor | None, Tensor | None]:
        roots = self._memory.get(left).roots, self._memory.get(right).roots
        if not self._keep:
            return (*roots, None, None)
        return (*roots, left if q is None else q, right if k is None else k)

    def _end(
        self,
        pair: tuple[Roots, Roots, Tensor | None, Tensor | None],
        out: Tensor,
        arranged: Callable[[Tensor], Tensor] | None,
    ) -> None:
        """An attention call is complete: its output is a new root."""
        root = Root("call", self._calls, self._owners.current() or "the model itself")
        self._calls += 1
        query, key, q, k = pair
        known = q is not None and k is not None and arranged is not None
        tensors = Operands(q, k, out, arranged) if known else None  # type: ignore[arg-type]
        self._latest = Reading(query, key, root, tensors)
        self._memory.set(out, _Trail(frozenset({root})))

    def _write(self, args: tuple[Any, ...]) -> None:
        """``x[...] = y``: x is now made from y too."""
        target = args[0]
        before = self._memory.get(target)
        added = NOTHING.union(*(self._memory.get(tensor).roots for tensor in _tensors(args[2:])))
        self._memory.set(target, _Trail(before.roots | added, before.pair, before.weights))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
