"""From a softmax to the values it weighs: which softmax is attention, and what did the model do with it?

The tap reports each softmax and the operations after it. Weights are followed by identity through casts,
reshapes and inactive dropout; slot attention renormalises them over another axis first. Ending in a matrix
product makes them materialised attention; ending in a weighted sum of sampled values (``grid_sample``, or whole
cells by index) makes them deformable attention; ending in neither, no attention.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.capture.deformable import DeformableRecord, Gathered, Level, gathered
from foveate.capture.materialised import BLOCKED, MaterialisedRecord
from foveate.capture.records import Record
from foveate.capture.sampled_call import SampledCall

CARRIERS: tuple[Callable[..., Any], ...] = (
    Tensor.to,
    Tensor.type_as,
    Tensor.float,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.double,
    Tensor.clone,
    Tensor.view,
    Tensor.view_as,
    Tensor.reshape_as,
    Tensor.expand_as,
    Tensor.reshape,
    Tensor.flatten,
    Tensor.unflatten,
    Tensor.transpose,
    Tensor.permute,
    Tensor.contiguous,
    Tensor.unsqueeze,
    Tensor.squeeze,
    Tensor.expand,
    Tensor.split,
    torch.reshape,
    torch.flatten,
    torch.transpose,
    torch.permute,
    torch.unsqueeze,
    torch.split,
    F.dropout,
    torch.dropout,
)
"""Operations after which the weights are still the weights."""

ADDITIONS: tuple[Callable[..., Any], ...] = (Tensor.add, Tensor.__add__, torch.add)
DIVISIONS: tuple[Callable[..., Any], ...] = (Tensor.div, Tensor.__truediv__, torch.div)
"""Operations by which weights may be renormalised."""

MATRIX_PRODUCTS = (torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__)
PRODUCTS: tuple[Callable[..., Any], ...] = (*MATRIX_PRODUCTS, torch.einsum)


@dataclass(eq=False)
class Pending:
    """A softmax on its way to its values."""

    name: str
    weights: Tensor
    dim: int
    heads: int
    scores: Tensor | None = None
    levels: list[Level | Gathered] = field(default_factory=list)
    aliases: list[int] = field(default_factory=list)
    weighed: bool = False
    rescaled: bool = False
    ordinal: int = 0


class Follower:
    """Holds the softmaxes that have not met their values yet.

    ``found`` receives finished records; ``unlinked`` the softmaxes that never met values, at the end.
    """

    def __init__(self, found: Callable[[Record], None], unlinked: Callable[[Record], None]) -> None:
        self._found, self._unlinked = found, unlinked
        self._pending: list[Pending] = []
        # Identity is safe only while the tensor lives: ids are reused after it dies.
        self._aliases: dict[int, tuple[weakref.ref[Tensor], Pending]] = {}

    def start(
        self,
        name: str,
        weights: Tensor,
        dim: int,
        heads: int,
        blocked: Tensor | None = None,
        *,
        ordinal: int = 0,
    ) -> Pending:
        """A softmax was taken, the ``ordinal``-th of its module; ``blocked`` says where its scores were masked."""
        pending = Pending(name, weights, dim, heads, blocked, ordinal=ordinal)
        self._pending.append(pending)
        self._remember(weights, pending)
        return pending

    def carry(self, args: tuple[Any, ...], out: Any) -> None:
        """The weights changed their clothes."""
        pending = self.find(args[:1])
        if pending is not None:
            for tensor in (out,) if isinstance(out, Tensor) else out:
                self._remember(tensor, pending)

    def rescale(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        """A constant was added, or the weights were divided by sums over one axis: they are other weights now.

        Slot attention (Locatello et al. 2020, arXiv:2006.15055, algorithm 1) does both.
        """
        pending = self.find(args[:1])
        if pending is None or len(args) != 2 or not isinstance(out, Tensor):
            return
        if func in ADDITIONS:
            same = isinstance(args[1], int | float)
        else:
            same = isinstance(args[1], Tensor) and _is_sum_over_one_axis(args[1].shape, args[0].shape)
        if same and not pending.levels:
            pending.rescaled = True
            self._remember(out, pending)

    def multiply(self, func: Callable[..., Any], args: tuple[Any, ...], out: Any) -> None:
        """A matrix product or einsum: if its operand is weights, they are attention."""
        operands = operands_of(args)
        pending = self.find(operands)
        if pending is None or not isinstance(out, Tensor):
            return
        plain = func in MATRIX_PRODUCTS and self.find(operands[:1]) is pending
        weights, over_keys = pending.weights, pending.dim == pending.weights.dim() - 1
        if pending.rescaled and plain:
            # What multiplies the values is the matrix, whichever way it was turned; which sums are 1 is measured.
            weights = operands[0]
            over_keys = bool(((weights.detach().sum(-1) - 1).abs() < 1e-3).all())
        plain = plain and operands[0].shape[-2:] == weights.shape[-2:]
        product = (operands[0], operands[1], out) if plain else None
        self._forget(pending)
        self._report(
            pending,
            MaterialisedRecord(
                pending.name,
                weights,
                heads=pending.heads,
                product=product,
                linked=True,
                over_keys=over_keys,
                blocked=_blocked(pending.scores),
            ),
        )

    def sample(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """``F.grid_sample`` ran: it belongs to the latest softmax of the same module or of one around it."""
        arguments = {**dict(zip(("input", "grid", "mode", "padding_mode", "align_corners"), args, strict=False))}
        arguments.update(kwargs)
        exact = arguments.get("mode", "bilinear") == "bilinear"
        exact = exact and arguments.get("padding_mode", "zeros") == "zeros"
        values, grid = arguments["input"], arguments["grid"]
        for pending in reversed(self._pending):
            if exact and values.dim() == 4 and _around(pending.name, name):
                pending.levels.append(Level(values, grid, bool(arguments.get("align_corners"))))
                return

    def gather(self, owner: Callable[[], str], args: tuple[Any, ...]) -> None:
        """Values were indexed: with whole cells that is sampling without ``F.grid_sample``."""
        if not self._pending or len(args) != 2 or not isinstance(args[1], tuple):
            return
        level = gathered(args[0], args[1])
        name = owner() if level is not None else ""
        for pending in reversed(self._pending):
            if level is not None and _around(pending.name, name):
                pending.levels.append(level)
                return

    def weigh(self, args: tuple[Any, ...], out: Any) -> None:
        """A product by element: sampled values times weights."""
        pending = self.find(args)
        if pending is not None and pending.levels and isinstance(out, Tensor):
            pending.weighed = True
            self._remember(out, pending)

    def weighed(self, args: tuple[Any, ...]) -> bool:
        """Whether a sum over ``args`` may end a deformable call."""
        pending = self.find(args[:1])
        return pending is not None and pending.weighed

    def add_up(self, args: tuple[Any, ...], out: Tensor) -> None:
        """The weighted samples were summed: a deformable call is complete."""
        pending = self.find(args[:1])
        if pending is not None:
            self._forget(pending)
            self._report(pending, DeformableRecord(pending.name, pending.weights, pending.levels, out))

    def drop(self, pending: Pending) -> None:
        """The call is complete by other means."""
        if pending in self._pending:
            self._forget(pending)

    def completed(self, call: Callable[[], SampledCall], weights: Tensor, out: Tensor, owner: str) -> None:
        """A deformable call whose softmax ``weights`` come from ended in ``out``, by a kernel or an intervention.

        Weights that a kernel was given in another guise belong to the latest softmax of their module and size.
        Without any softmax on its way the call has been recorded already: the kernel ran in plain torch.
        """
        pending = self.find((weights,)) or self.of_size(weights.numel(), owner)
        if pending is not None:
            self._forget(pending)
            self._report(pending, replace(call(), name=pending.name).record(out))

    def of_size(self, count: int, owner: str) -> Pending | None:
        """The latest softmax of ``count`` weights in the module ``owner`` or one around it."""
        for pending in reversed(self._pending):
            if pending.weights.numel() == count and _around(pending.name, owner):
                return pending
        return None

    def finish(self) -> None:
        """The forward is over: what met no values is reported as unlinked."""
        for pending in self._pending:
            record = _unfinished(pending)
            record.ordinal = pending.ordinal
            self._unlinked(record)
        self._pending.clear()
        self._aliases.clear()

    def _report(self, pending: Pending, record: Record) -> None:
        record.ordinal = pending.ordinal
        self._found(record)

    def _remember(self, tensor: Tensor, pending: Pending) -> None:
        self._aliases[id(tensor)] = (weakref.ref(tensor), pending)
        pending.aliases.append(id(tensor))

    def _forget(self, pending: Pending) -> None:
        self._pending.remove(pending)
        for alias in pending.aliases:
            if alias in self._aliases and self._aliases[alias][1] is pending:
                del self._aliases[alias]

    def find(self, candidates: Iterable[Any]) -> Pending | None:
        """The softmax that one of some tensors is, or None."""
        if not self._aliases:
            return None
        for tensor in candidates:
            entry = self._aliases.get(id(tensor))
            if entry is not None and entry[0]() is tensor:
                return entry[1]
        return None


def _blocked(scores: Tensor | None) -> Tensor | None:
    """Where scores are masked; without asking whether any is, which would wait for the device."""
    return None if scores is None or not scores.is_floating_point() else scores.detach() <= BLOCKED


def _is_sum_over_one_axis(shape: torch.Size, whole: torch.Size) -> bool:
    """Whether ``shape`` is ``whole`` with one axis (of more than one entry) kept as a single entry."""
    if len(shape) != len(whole):
        return False
    changed = [axis for axis, (own, full) in enumerate(zip(shape, whole, strict=True)) if own != full]
    return all(shape[axis] == 1 for axis in changed) and len(changed) <= 1


def _unfinished(pending: Pending) -> Record:
    if pending.levels:
        return DeformableRecord(pending.name, pending.weights, pending.levels)
    over_keys = pending.dim == pending.weights.dim() - 1
    return MaterialisedRecord(pending.name, pending.weights, heads=pending.heads, over_keys=over_keys)


def operands_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensor operands of a matrix product or of ``einsum(equation, *operands)``."""
    if args and isinstance(args[0], str):
        rest = args[1:]
        return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest
    return args


def _around(outer: str, inner: str) -> bool:
    return outer == inner or inner.startswith(f"{outer}.") or outer == ""
