"""The tracker: one step a frame, in which carried tracks and dynamic anchors read the segmenter's queries.

A frame's rows are the tracks of the frame before (their states as queries, their position memories as positions)
followed by one new-instance row for each segmenter query (one learned embedding; the position of that query's
mask, its *anchor*). All rows read the frame by cross-attention, then one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from foveate_dvis.daq.config import DaqConfig
from foveate_dvis.daq.layers import CrossAttention, FeedForward, Perceptron, SelfAttention, pooled
from foveate_dvis.daq.slots import SlotLayer, starting_queries

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FrameInputs:
    """The segmenter's answer to one frame: ``logits`` (query, class + 1), ``masks`` (query, y/4, x/4), ``embeds``
    (query, channel), ``features`` (channel, y/4, x/4).
    """

    logits: Tensor
    masks: Tensor
    embeds: Tensor
    features: Tensor


@dataclass(frozen=True)
class FrameStep:
    """The tracker's answer, rows as in :class:`~foveate_dvis.daq.outputs.FrameRows`.

    ``states`` (row, channel); ``logits`` (row, class + 1); ``masks`` (row, y/4, x/4); ``positions`` (row,
    channel): position embedding of each row's mask; ``scores``: best class probability of each row; and
    ``slot_scores`` of the carried tracks, empty in the first frame.
    """

    states: Tensor
    logits: Tensor
    masks: Tensor
    positions: Tensor
    scores: Tensor
    slot_scores: Tensor


class Tracker(nn.Module):
    """The tracker's network. It decides nothing: :mod:`foveate_dvis.daq.tracks` holds the rules."""

    def __init__(self, config: DaqConfig) -> None:
        super().__init__()
        width, heads, layers = config.hidden_dim, config.heads, config.tracker.layers
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttention(width, heads) for _ in range(layers)
        )
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttention(width, heads) for _ in range(layers))
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(width, config.ffn_dim) for _ in range(layers))
        self.slot_cross_attention_layers = nn.ModuleList(SlotLayer(width, heads) for _ in range(layers))
        self.slot_ffn_layers = nn.ModuleList(FeedForward(width, config.ffn_dim) for _ in range(layers))
        self.bg_slots = nn.Embedding(config.tracker.slots, width)
        self.new_ins_embeds = nn.Embedding(1, width)
        self.pos_embed = Perceptron(width, width)
        self.decoder_norm = nn.LayerNorm(width)
        self.class_embed = nn.Linear(width, config.num_classes + 1)
        self.mask_embed = Perceptron(width, config.mask_dim)
        self.mask_feature_proj = nn.Conv2d(config.mask_dim, config.mask_dim, 1)

    def forward(
        self, frame: FrameInputs, states: Tensor, positions: Tensor, query_feat: Tensor, *, first: bool
    ) -> FrameStep:
        """One frame. ``states``, ``positions`` (track, channel) of the carried tracks; ``first``: of the clip.

        ``query_feat`` (query, channel): the segmenter's learned query features, where the slot branch starts.
        """
        if first:
            x, scores = self.start(frame.embeds), best_score(frame.logits)
            slot_scores = scores[:0]
        else:
            anchors = self.position(frame.masks, frame.features)
            x = self.read(states, positions, frame.embeds, anchors)
            slot_scores = self.gate(states, positions, frame.embeds, query_feat)
            scores = None
        logits, masks = self.predict(x, frame.features)
        positions = self.position(masks, frame.features)
        scores = best_score(logits) if scores is None else scores
        return FrameStep(x, logits, masks, positions, scores, slot_scores)

    # ------------------------------------------------------------------------- the rows' two ways to read

    def start(self, embeds: Tensor) -> Tensor:
        """The first frame: the segmenter's queries read themselves. ``embeds`` (query, channel), so the result."""
        keys = embeds[:, None]
        x = keys
        for cross, own, ffn in self._layers():
            x = ffn(own(cross(x, keys, keys)))
        return x[:, 0]

    def read(self, states: Tensor, positions: Tensor, embeds: Tensor, anchors: Tensor) -> Tensor:
        """A later frame: tracks, then new-instance rows, (row, channel)."""
        new = self.new_ins_embeds.weight.expand(len(embeds), -1)
        x = torch.cat([states, new])[:, None]
        position = torch.cat([positions, anchors])[:, None]
        values, keys = embeds[:, None], (embeds + anchors)[:, None]
        for cross, own, ffn in self._layers():
            x = ffn(own(cross(x, keys, values, position)))
        return x[:, 0]

    def _layers(self) -> list[tuple[nn.Module, ...]]:
        return list(
            zip(
                self.transformer_cross_attention_layers,
                self.transformer_self_attention_layers,
                self.transformer_ffn_layers,
                strict=True,
            )
        )

    # ------------------------------------------------------------------------- predictions

    def predict(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (row, class + 1) and mask logits (row, y/4, x/4) of states (row, channel)."""
        normed = self.decoder_norm(x)
        projected = self.mask_feature_proj(features[None])[0]
        masks = torch.einsum("rc,cyx->ryx", self.mask_embed(normed), projected)
        return self.class_embed(normed), masks

    def position(self, masks: Tensor, features: Tensor) -> Tensor:
        """Position embedding (row, channel) of masks (row, y/4, x/4): what the frame looks like inside each."""
        embedded: Tensor = self.pos_embed(pooled(masks, features))
        return embedded

    def slot_states(self, states: Tensor, positions: Tensor, embeds: Tensor, query_feat: Tensor) -> Tensor:
        """The slot branch: tracks, then background slots, (row, channel)."""
        background = self.bg_slots.weight
        rows = torch.cat([states, background])
        slots = torch.cat([positions, background])[:, None]
        s = query_feat[starting_queries(rows, query_feat)][:, None]
        for layer, ffn in zip(self.slot_cross_attention_layers, self.slot_ffn_layers, strict=True):
            s = ffn(layer(s, rows[:, None], slots, embeds[:, None]))
        return s[:, 0]

    def gate(self, states: Tensor, positions: Tensor, embeds: Tensor, query_feat: Tensor) -> Tensor:
        """Best class probability of each carried track in the slot branch (track,)."""
        s = self.slot_states(states, positions, embeds, query_feat)
        return best_score(self.class_embed(self.decoder_norm(s[: len(states)])))


def best_score(logits: Tensor) -> Tensor:
    """Greatest class probability, "no object" (last) left out, of logits (..., class + 1)."""
    return logits.softmax(dim=-1)[..., :-1].amax(dim=-1)
