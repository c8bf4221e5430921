"""A target for encoders without a head: what sets an input's embedding apart from that of a blank one.

With the blank's embedding ``b`` and the frozen unit direction ``d = (e(x0) - b) / |e(x0) - b|`` the score is
``<e(x) - b, d>``, 0 for the blank and ``|e(x0) - b|`` for the input. The obvious choices are traps: the cosine to
one's own embedding is 1 with zero gradient at x0, and so, nearly, is the dot product, because embeddings leave a
LayerNorm that fixes their length. Every gradient method would explain rounding errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.interfaces import BoundTarget, TargetRow

if TYPE_CHECKING:
    from torch import Tensor

KIND = "feature"


def bind_feature(own: Tensor, blank: Tensor, *, label: str) -> BoundTarget:
    """One row a sample: the direction from ``blank (1, channel)`` to its own embedding, ``(sample, channel)``."""
    import torch

    own = own.detach().float()
    blank = blank.detach().float().expand_as(own)
    direction = torch.nn.functional.normalize(own - blank, dim=-1)
    rows = tuple(TargetRow(i, KIND, label=label) for i in range(len(own)))
    return BoundTarget(rows, "value", {"direction": direction, "blank": blank})


def score_feature(embedding: Tensor, bound: BoundTarget) -> Tensor:
    """How far each row's embedding ``(sample, channel)`` lies along its direction, float32 ``(target,)``."""
    chosen = embedding.float()[[row.sample for row in bound.rows]]
    direction, blank = (bound.context[name].to(chosen) for name in ("direction", "blank"))
    return ((chosen - blank) * direction).sum(-1)
