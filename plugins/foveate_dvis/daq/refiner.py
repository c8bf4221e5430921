"""The offline refiner: reads every instance over the whole clip and answers anew.

Per layer (all post-norm): self-attention over time (batch: instances), where configured a temporal convolution,
self-attention over instances (batch: frames), cross-attention to the segmenter's queries of the same frame, and
a feed-forward layer. Frames in which an instance has no track take part like any other: the published model
computes a padding mask and does not use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from foveate_dvis.daq.config import DaqConfig, RefinerConfig
from foveate_dvis.daq.layers import CrossAttention, FeedForward, Perceptron, SelfAttention

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RefinedStates:
    """``embeds``, ``mask_embeds`` (instance, frame, channel), ``logits`` (instance, class + 1) and ``importance``
    (instance, frame): the weight of each frame in the class score, sum 1 over frames.
    """

    embeds: Tensor
    mask_embeds: Tensor
    logits: Tensor
    importance: Tensor


class Refiner(nn.Module):
    """The refiner's network; attribute names are those of the published state dicts."""

    def __init__(self, config: DaqConfig, refiner: RefinerConfig) -> None:
        super().__init__()
        width, heads, layers = config.hidden_dim, config.heads, refiner.layers
        self.transformer_time_self_attention_layers = _several(layers, lambda: SelfAttention(width, heads))
        self.transformer_obj_self_attention_layers = _several(layers, lambda: SelfAttention(width, heads))
        self.transformer_cross_attention_layers = _several(layers, lambda: CrossAttention(width, heads))
        self.transformer_ffn_layers = _several(layers, lambda: FeedForward(width, config.ffn_dim))
        self.local = refiner.local_attention
        if self.local:
            self.conv_short_aggregate_layers = _several(layers, lambda: _short(width))
            self.conv_norms = _several(layers, lambda: nn.LayerNorm(width))
        self.decoder_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, config.num_classes + 1)
        self.mask_embed = Perceptron(width, config.mask_dim)
        self.activation_proj = FramePool(width, 1)

    def forward(self, instances: Tensor, embeds: Tensor) -> RefinedStates:
        """``instances`` (instance, frame, channel); ``embeds`` (frame, query, channel)."""
        x = instances.transpose(0, 1)  # (frame, instance, channel): time first, instances as batch
        keys = embeds.transpose(0, 1)  # (query, frame, channel): frames as batch
        for layer in range(len(self.transformer_ffn_layers)):
            x = self.transformer_time_self_attention_layers[layer](x)
            if self.local:
                x = self._short_term(x, layer)
            y = self.transformer_obj_self_attention_layers[layer](x.transpose(0, 1))
            y = self.transformer_cross_attention_layers[layer](y, keys, keys)
            x = self.transformer_ffn_layers[layer](y).transpose(0, 1)
        return self._answer(x.transpose(0, 1))

    def _short_term(self, x: Tensor, layer: int) -> Tensor:
        """``LN(x + conv(x))`` along time, (frame, instance, channel)."""
        mixed = self.conv_short_aggregate_layers[layer](x.permute(1, 2, 0)).permute(2, 0, 1)
        normed: Tensor = self.conv_norms[layer](x + mixed)
        return normed

    def _answer(self, x: Tensor) -> RefinedStates:
        normed = self.decoder_norm(x)
        pooled, importance = self.activation_proj(normed)
        return RefinedStates(x, self.mask_embed(normed), self.class_embed(pooled), importance)


class FramePool(nn.Linear):
    """Attention pooling over time: ``sum_t softmax_t(w . x_t + b) x_t``."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``x`` (instance, frame, channel): the means (instance, channel), the weights (instance, frame)."""
        importance = F.softmax(super().forward(x).transpose(1, 2), dim=-1)
        return (importance @ x)[:, 0], importance[:, 0]


def _several(count: int, make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList([make() for _ in range(count)])


def _short(width: int) -> nn.Sequential:
    """Two convolutions along time that repeat the first and the last frame at the ends."""
    return nn.Sequential(
        nn.Conv1d(width, width, 5, padding="same", padding_mode="replicate"),
        nn.ReLU(),
        nn.Conv1d(width, width, 3, padding="same", padding_mode="replicate"),
    )


def masks_of(mask_embeds: Tensor, features: Tensor) -> Tensor:
    """Mask logits (instance, frame, y/4, x/4): ``mask_embeds`` (instance, frame, channel) times ``features``
    (frame, channel, y/4, x/4), the segmenter's own, not the tracker's projection of them.
    """
    return torch.einsum("ntc,tcyx->ntyx", mask_embeds, features)
