"""Chains of segmenter queries through a clip, by likeness alone (MinVIS, Huang et al. 2022, arXiv:2208.02245).

The queries of each frame are put into the order of the frame before by the Hungarian assignment that makes the
sum of cosines greatest. The offline model fills its instances up with such chains where it has few tracks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from torch import Tensor


def link_queries(embeds: Sequence[Tensor]) -> Tensor:
    """For each frame the query that continues chain ``q`` (the query q of the first frame): int64 (frame, query).

    ``embeds``: (query, channel) a frame.
    """
    first = embeds[0]
    chains = [torch.arange(len(first), device=first.device)]
    for before, now in pairwise(embeds):
        chains.append(_follow(before[chains[-1]], now))
    return torch.stack(chains)


def _follow(before: Tensor, now: Tensor) -> Tensor:
    cosine = F.normalize(before.detach(), dim=-1) @ F.normalize(now.detach(), dim=-1).T
    _, query = linear_sum_assignment(cosine.double().cpu().numpy(), maximize=True)
    return torch.as_tensor(query, device=now.device)


def chained(values: Sequence[Tensor], chains: Tensor) -> Tensor:
    """``values`` (query, ...) of each frame in the order of the chains: (chain, frame, ...)."""
    return torch.stack([value[order] for value, order in zip(values, chains, strict=True)], dim=1)
