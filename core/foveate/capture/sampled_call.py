"""A deformable call with its graph, as it passes between the tap, interventions and kernels.

Records hold nothing of the autograd graph; what shall be changed or completed must. A call is said to be complete
by :func:`complete`, a function that does nothing but is seen by every tap of the thread, as torch's own are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from foveate.capture.deformable import DeformableRecord, Gathered, Level, level_values
from foveate.capture.materialised import MaterialisedRecord
from foveate.capture.records import Record

Layout = Literal["channel first", "query first"]
"""How a module's output lies: ``(batch * head, channel, query)`` as a sum over samples leaves it, or ``(batch,
query, head * channel)`` as fused kernels return it."""


@dataclass(frozen=True, eq=False)
class SampledCall:
    """One call of deformable attention.

    ``weights`` ``(batch, query, head, ...)``, levels and points in the remaining axes; ``levels`` as for
    :class:`~foveate.capture.deformable.DeformableRecord`. ``dense`` ``(batch, head, query, key)`` stands instead
    of points where an intervention made the rows anew.
    """

    name: str
    weights: Tensor
    levels: Sequence[Level | Gathered]
    layout: Layout = "channel first"
    dense: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(batch, queries, heads)."""
        batch, queries, heads = self.weights.shape[:3]
        return batch, queries, heads

    def values(self) -> Tensor:
        """V over the cells of all levels, ``(batch, head, key, channel)``, in the graph."""
        batch, _, heads = self.sizes
        return level_values(self.levels, batch, heads)

    def by_head(self, out: Tensor) -> Tensor:
        """The module's output as ``(batch, head, query, channel)``."""
        batch, queries, heads = self.sizes
        if self.layout == "channel first":
            return out.reshape(batch, heads, -1, queries).transpose(-1, -2)
        return out.reshape(batch, queries, heads, -1).transpose(1, 2)

    def as_output(self, out: Tensor, like: torch.Size) -> Tensor:
        """``(batch, head, query, channel)`` in the module's own layout, of shape ``like``."""
        turned = out.transpose(-1, -2) if self.layout == "channel first" else out.transpose(1, 2)
        return turned.contiguous().view(like)  # models view it further

    def record(self, out: Tensor) -> Record:
        """The lazy record of this call, whose output is ``out``."""
        if self.dense is None:
            return DeformableRecord(self.name, self.weights, self.levels, out, layout=self.layout)
        product = (self.dense, self.values(), self.by_head(out))
        return MaterialisedRecord(self.name, self.dense, product=product, linked=True, over_keys=False)


def complete(out: Tensor, call: Callable[[], SampledCall], weights: Tensor) -> Tensor:
    """``out``, with word to every tap: the call whose softmax ``weights`` come from ran as ``call()`` says."""
    if has_torch_function((out,)):
        return handle_torch_function(complete, (out,), out, call, weights)
    return out
