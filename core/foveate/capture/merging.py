"""One linear map of tokens, for vectors over streams; dense or sparse."""

from __future__ import annotations

from torch import Tensor


def pull_back(vectors: Tensor, matrix: Tensor) -> Tensor:
    """``(sample, slot, target)`` times ``(target, source)``: ``(sample, slot, source)``.

    torch multiplies a batch by a sparse matrix only where it happens to fold the batch; here it always does.
    """
    samples, slots, _ = vectors.shape
    return (vectors.flatten(0, 1) @ matrix.to(vectors)).unflatten(0, (samples, slots))
