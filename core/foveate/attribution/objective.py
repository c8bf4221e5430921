"""The one function that every method explains: inputs in, one score a target row out.

A bound target can have several rows for one sample (objects, classes), and Captum repeats, interpolates
and perturbs inputs in its own order. So each row of ``x`` carries the number of the target row it belongs
to, Captum repeats that number with the input, and the sample's context (geometry, masks, text, frozen
noise) is looked up by it. Nothing of the model is changed: no flags, no hooks, no stored gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from foveate.attribution.clips import Frames, frames_of, map_shape
from foveate.errors import PluginError, UsageError

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource, Batch, BoundTarget

BUDGET_BYTES = 1 << 30
"""Memory that one forward and backward pass may take for activations, unless the caller says otherwise."""
MAX_ROWS = 256
"""More rows a pass gain nothing on any device measured and only delay interruption."""
FORWARD_GAIN = 4
"""Without a graph only a few layers' activations live at once; four times the rows is a cautious guess."""


class Objective:
    """Scores of a bound target as a function of inputs.

    ``batch`` and ``bound`` are expanded to one sample a target row, so that row ``j`` of the target belongs
    to sample ``j``; ``inputs`` is their input ``(target, channel, y, x)`` (``(target, frame, channel, y, x)``
    for clips), detached. Targets whose score differentiates inside (a divergence) must enable gradients
    themselves, because Captum evaluates under ``no_grad`` as well.
    """

    def __init__(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, rows: int | None = None
    ) -> None:
        samples = [row.sample for row in bound.rows]
        if not samples:
            raise UsageError("Objective: the bound target has no rows, there is nothing to explain")
        if rows is not None and rows < 1:
            raise UsageError(f"Objective: rows must be at least 1, got {rows}")
        self.source = source
        self.batch = batch.replace(batch.inputs.detach()[samples], samples)
        self.bound = bound.take(range(len(samples)))
        self._rows = rows

    @property
    def inputs(self) -> torch.Tensor:
        """What the model sees, one row a target, detached."""
        return self.batch.inputs

    @property
    def index(self) -> torch.Tensor:
        """Target row numbers, int64 ``(target,)``, on the inputs' device."""
        return torch.arange(len(self), device=self.inputs.device)

    @property
    def frames(self) -> Frames:
        """The frame cell of each input frame of a clip; empty for images."""
        return frames_of(self.source, self.batch)

    @property
    def map_shape(self) -> tuple[int, ...]:
        """Shape of one target's map: ``([frame cell,] row, column)``."""
        return map_shape(self.source, self.batch)

    def __len__(self) -> int:
        return len(self.bound)

    def __call__(self, x: torch.Tensor, index: torch.Tensor | None = None) -> torch.Tensor:
        """Scores ``(n,)`` of ``x`` ``(n, ...)``; row ``j`` belongs to target row ``index[j]``.

        Without gradients, ``x`` is evaluated in blocks that fit the memory budget.
        """
        index = self.index if index is None else index
        if torch.is_grad_enabled():
            return self._score(x, index)
        size = self.rows(grad=False)
        starts = range(0, len(x), size)
        return torch.cat([self._score(x[i : i + size], index[i : i + size]) for i in starts])

    def rows(self, *, grad: bool) -> int:
        """How many rows one pass takes: what the caller fixed, or what the memory budget allows."""
        if self._rows is None:
            self._rows = min(MAX_ROWS, max(1, BUDGET_BYTES // max(1, self._graph_bytes())))
        return self._rows if grad else min(MAX_ROWS, FORWARD_GAIN * self._rows)

    def limited(self, rows: int | None) -> Objective:
        """The same objective with the rows of a pass fixed; itself where ``rows`` is None."""
        return self if rows is None else Objective(self.source, self.batch, self.bound, rows=rows)

    def take(self, rows: Sequence[int]) -> Objective:
        """The objective of some target rows only."""
        kept = replace(self.bound.take(rows), rows=tuple(self.bound.rows[i] for i in rows))
        return Objective(self.source, self.batch, kept, rows=self._rows)

    def blocks(self) -> Iterator[Objective]:
        """This objective in consecutive parts that one forward and backward pass can hold."""
        size = self.rows(grad=True)
        for start in range(0, len(self), size):
            yield self.take(range(start, min(start + size, len(self))))

    def captum(self) -> tuple[Callable[..., torch.Tensor], dict[str, Any]]:
        """``(forward_func, arguments)`` for any Captum method: ``Method(forward_func).attribute(**arguments)``.

        The inputs are a fresh leaf, so that Captum's switching of ``requires_grad`` touches nobody's tensor.
        """
        leaf = self.inputs.clone().requires_grad_()
        return self, {"inputs": leaf, "additional_forward_args": (self.index,)}

    def _score(self, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        batch = self.batch.replace(x, index)
        outputs = self.source.forward(batch, grad=torch.is_grad_enabled())
        scores = self.source.score(outputs, batch, self.bound.take(index))
        if scores.shape != (len(x),):
            raise PluginError(
                f"{type(self.source).__name__}.score: expected one number a target row, ({len(x)},), "
                f"got {tuple(scores.shape)}",
                remedy="score() must return a tensor (target,), row j for row j of the bound target",
            )
        return scores

    def _graph_bytes(self) -> int:
        """Bytes that autograd keeps for one row, parameters not counted: one forward pass, exact."""
        sizes: dict[int, int] = {}
        known = {p.untyped_storage().data_ptr() for p in self.source.module.parameters()}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        first = self.take([0])
        x = first.inputs.clone().requires_grad_()
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
            first._score(x, first.index)
        return sum(sizes.values())
