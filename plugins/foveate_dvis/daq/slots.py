"""The slot branch: a second reading of the frame that says whether each carried track is still there.

Tracks and a few learned background slots compete for the evidence in the frame by slot attention (Locatello et
al. 2020, arXiv:2006.15055): weights are a softmax over *slots*, renormalised over inputs. Its class score only
gates tracks; nothing of it enters the model's answer, so no gradient passes here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-6
"""Added to each weight before the renormalisation over inputs."""


class SlotAttention(nn.Module):
    """``update_m = sum_n W[n, m] v_n`` with ``W = (softmax_m(k_n q_m / sqrt C) + eps)``, renormalised over n."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_inputs = nn.LayerNorm(width)
        self.project_k = nn.Linear(width, width, bias=False)
        self.project_q = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width, bias=False))

    def forward(self, slots: Tensor, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``slots`` (slot, batch, channel); ``inputs``, ``values`` (input, batch, channel).

        Gives the update (slot, batch, channel) and the weights (batch, input, slot), which sum to 1 over inputs.
        """
        keys = self.project_k(self.norm_inputs(inputs)).transpose(0, 1)
        queries = self.project_q(slots).transpose(0, 1)
        scores = keys @ queries.transpose(1, 2) * keys.shape[-1] ** -0.5
        weights = F.softmax(scores, dim=-1) + EPSILON
        weights = weights / weights.sum(dim=1, keepdim=True)
        update = weights.transpose(1, 2) @ values.transpose(0, 1)
        return update.transpose(0, 1), weights


class SlotLayer(nn.Module):
    """Cross-attention to the frame, then slot attention over what was read: ``LN(s + update)``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(width, heads)
        self.slot_attn = SlotAttention(width)
        self.norm = nn.LayerNorm(width)

    def forward(self, s: Tensor, position: Tensor, slots: Tensor, embeds: Tensor) -> Tensor:
        """``s``, ``position``, ``slots`` (row, batch, channel); ``embeds`` (query, batch, channel)."""
        read = self.multihead_attn(s + position, embeds, embeds, need_weights=False)[0]
        update, _ = self.slot_attn(slots, s + read, read)
        normed: Tensor = self.norm(s + update)
        return normed


def starting_queries(rows: Tensor, queries: Tensor) -> Tensor:
    """For each row the segmenter query it starts from, int64 (row,).

    The query with the greatest cosine; rows that the Hungarian assignment (cost 1 - cosine) reaches take theirs,
    so that as many rows as possible start from different queries. ``rows`` (row, channel), ``queries`` (query,
    channel).
    """
    cosine = F.normalize(rows.detach(), dim=-1) @ F.normalize(queries.detach(), dim=-1).T
    index = cosine.argmax(dim=-1)
    row, query = linear_sum_assignment((1 - cosine).double().cpu().numpy())
    index[torch.as_tensor(row, device=index.device)] = torch.as_tensor(query, device=index.device)
    return index
