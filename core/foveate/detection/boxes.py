"""Overlap of boxes: IoU and GIoU, element by element, differentiable.

A box is (top, left, bottom, right) in edge coordinates, so its area is (bottom - top)(right - left). Boxes with
bottom <= top or right <= left are empty: area 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-12


def areas(boxes: Tensor) -> Tensor:
    """Areas of boxes ``(..., 4)``, 0 for empty ones."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp_min(0).prod(-1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``(..., 4)``, broadcast; in [0, 1], 0 where both are empty."""
    shared, union = _shared_and_union(a, b)
    return torch.where(union > 0, shared / union.clamp_min(_TINY), torch.zeros_like(shared))


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised IoU of boxes ``(..., 4)``, broadcast: IoU - |C \\ (A u B)| / |C|, C the smallest enclosing box.

    Rezatofighi et al. 2019 (CVPR), Algorithm 1. In (-1, 1]: 1 for equal boxes, negative for boxes far apart, and
    with a gradient where IoU has none. Two empty boxes at one point have no enclosing area: 0.
    """
    shared, union = _shared_and_union(a, b)
    overlap = torch.where(union > 0, shared / union.clamp_min(_TINY), torch.zeros_like(shared))
    start, stop = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = (stop - start).clamp_min(0).prod(-1)
    wasted = torch.where(hull > 0, (hull - union) / hull.clamp_min(_TINY), torch.zeros_like(hull))
    return overlap - wasted


def _shared_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    start, stop = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (stop - start).clamp_min(0).prod(-1)
    return shared, areas(a) + areas(b) - shared
