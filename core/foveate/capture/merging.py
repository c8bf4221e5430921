"""One linear map of tokens, for vectors over streams; dense or sparse."""

from __future__ import annotations

import torch
from torch import Tensor


def pull_back(vectors: Tensor, matrix: Tensor) -> Tensor:
    """``(sample, slot, target)`` times ``(target, source)``: ``(sample, slot, source)``.

    Where tokens come together differently in each sample (tracks are born in different frames), ``matrix`` is
    ``(sample, target, source)``. torch multiplies a batch by a sparse matrix only where it happens to fold the
    batch; here it always does.
    """
    samples, slots, _ = vectors.shape
    if matrix.dim() == 3:
        matrix = matrix.to(vectors)
        return torch.stack([vectors[i] @ matrix[i] for i in range(samples)])
    moved: Tensor = vectors.flatten(0, 1) @ matrix.to(vectors)
    return moved.reshape(samples, slots, -1)
