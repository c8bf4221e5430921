"""How far back a track's state reaches: what each frame contributed to it, through the online recurrence.

A track's row enters frame t as it left frame t - 1, reads the frame, reads the other rows and goes on. With the
attention weights, the layer norms' deviations and the ReLU gates as they were, each of these steps is linear in
the rows, so a row is the sum of one vector for every frame that it was made of, and one for learned embeddings and
biases: decomposed vectors are propagated as in DecompX (Modarressi et al. 2023, arXiv:2306.02873), which extends
the norm-weighted contributions of Kobayashi et al. (2020; 2021) over layers. Nothing is left over:
:attr:`FrameContributions.error` compares the sums with the model's own class logits.

What a frame does to attention weights, norms and gates is no part of this; :mod:`foveate_dvis.daq_knockout` asks
what the answer depends on instead.

:func:`half_residual` gives what rollout with an even residual says. Of one frame it leaves at most 2^-layers of
the past (every cross-attention halves it, 2^-6 in the published models), whatever the weights and the picture: it
describes the rule, not the model, and is marked as such (``valid`` False).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from foveate.capture.tap import quiet
from foveate.capture.trace import Trace, trace
from foveate.errors import UsageError
from foveate.interfaces import CallKey
from foveate_dvis.daq_sites import ROW_CROSS, ROW_SELF, runs

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import Batch
    from foveate_dvis.daq.outputs import DaqOutputs
    from foveate_dvis.daq.tracker import Tracker
    from foveate_dvis.daq_source import DaqSource


@dataclass(frozen=True, eq=False)
class FrameContributions:
    """One track of one clip. All arrays are float64; ``frame`` is the frame of the row, ``source`` where from.

    ``norms`` (frame, source): norm of what each frame contributed; ``constant`` (frame,): of embeddings and
    biases. ``logits`` (frame, source + 1, class + 1): its part of the row's class logits, the last source being
    the constants; they add up to the logits. NaN outside the track's life. ``error``: largest difference between
    those sums and the model's own logits, relative to the largest logit.
    """

    track: int
    norms: NDArray[np.float64]
    constant: NDArray[np.float64]
    logits: NDArray[np.float64]
    error: float

    @property
    def shares(self) -> NDArray[np.float64]:
        """``norms`` as shares of each row (frame, source), for :func:`foveate.temporal.frame_mass.lag_profile`."""
        total = self.norms.sum(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(self.norms / total)


@dataclass(frozen=True, eq=False)
class HalfResidual:
    """Shares (frame, source) by rollout with an even residual. ``valid`` is False: see the module."""

    track: int
    shares: NDArray[np.float64]
    layers: int
    valid: bool = False

    @property
    def most_of_the_past(self) -> float:
        """What one frame leaves of all that was before, at most."""
        return 0.5**self.layers


def frame_contributions(source: DaqSource, batch: Batch) -> list[list[FrameContributions]]:
    """For every sample its tracks with what each frame contributed, in the order of birth.

    ``batch`` holds whole clips, online. Raises UsageError for an offline model or a block that is not the first.
    """
    traced = _traced(source, batch)
    with quiet():
        return [_decomposed(source, traced, sample) for sample in range(len(batch))]


def half_residual(source: DaqSource, batch: Batch) -> list[list[HalfResidual]]:
    """For every sample its tracks with rollout's shares, to be shown beside; never to be concluded from."""
    traced = _traced(source, batch)
    with quiet():
        return [_halved(source, traced, sample) for sample in range(len(batch))]


def _traced(source: DaqSource, batch: Batch) -> Trace:
    if source.config.mode == "offline":
        raise UsageError(
            "lags of the recurrence are those of the online model",
            remedy="open it with mode='online'; offline, refiner.time holds frame by frame attention",
        )
    with torch.no_grad():
        traced = trace(source, batch, sites=[ROW_CROSS, ROW_SELF])
    if any(clip.first_frame for clip in traced.outputs.clips):
        raise UsageError("lags need the clip from its first frame", remedy="read it whole, not in blocks")
    return traced


# ------------------------------------------------------------------------------- rows frame by frame


def _attention(traced: Trace, sample: int, frame: int, layer: int) -> tuple[Tensor, Tensor]:
    """Cross and self weights of one frame and layer, (head, row, key), float64."""
    number = runs(ROW_CROSS, traced.outputs).index((sample, (frame,)))
    cross, own = (traced.records[CallKey(site, layer, number)] for site in (ROW_CROSS, ROW_SELF))
    return cross.rows(slice(None))[0].double(), own.rows(slice(None))[0].double()


def _carried(clip: DaqOutputs, frame: int, rows: Tensor, fresh: Tensor) -> Tensor:
    """The rows that enter ``frame``: tracks as they left the frame before in ``rows``, the others ``fresh``."""
    if frame == 0:
        return fresh
    left = {track: row for row, track in enumerate(clip.rows[frame - 1].born) if track >= 0}
    tracks = [rows[left[track]] for track in clip.rows[frame].ids if track >= 0]
    return torch.stack([*tracks, *fresh]) if tracks else fresh


def _lives(clip: DaqOutputs) -> list[dict[int, int]]:
    """Of every frame: track -> its row, where the frame is part of the track."""
    return [
        {track: row for row, track in enumerate(rows.born) if track >= 0 and track not in rows.deaths}
        for rows in clip.rows
    ]


def _decomposed(source: DaqSource, traced: Trace, sample: int) -> list[FrameContributions]:
    clip, tracker = traced.outputs.clips[sample], source.model.tracker
    frames, width = len(clip.rows), source.config.hidden_dim
    vectors = clip.segmenter.embeds.new_zeros(0, frames + 1, width, dtype=torch.float64)
    lives, norms, logits, error = _lives(clip), [], [], 0.0
    for frame, rows in enumerate(clip.rows):
        embeds = clip.segmenter.embeds[frame].double()
        fresh = vectors.new_zeros(len(embeds), frames + 1, width)
        fresh[:, 0 if frame == 0 else frames] = embeds if frame == 0 else tracker.new_ins_embeds.weight.double()
        vectors = _carried(clip, frame, vectors, fresh)
        for layer in range(source.config.tracker.layers):
            vectors = _layer(tracker, layer, vectors, embeds, frame, _attention(traced, sample, frame, layer))
        norms.append(vectors.norm(dim=-1))
        logits.append(_answers(tracker, vectors))
        expected = rows.class_logits.double()
        error = max(error, float((logits[-1].sum(1) - expected).abs().max() / expected.abs().max()))
    return [_of_track(track.id, lives, norms, logits, error) for track in clip.tracks]


def _of_track(
    track: int, lives: Sequence[dict[int, int]], norms: list[Tensor], logits: list[Tensor], error: float
) -> FrameContributions:
    empty_norm, empty_logit = (torch.full_like(part[0][0], torch.nan) for part in (norms, logits))
    own = [norms[t][rows[track]] if track in rows else empty_norm for t, rows in enumerate(lives)]
    told = [logits[t][rows[track]] if track in rows else empty_logit for t, rows in enumerate(lives)]
    table = torch.stack(own).cpu().numpy()
    return FrameContributions(track, table[:, :-1], table[:, -1], torch.stack(told).cpu().numpy(), error)


# ------------------------------------------------------------------------------- one layer, linear


def _layer(
    tracker: Tracker, layer: int, vectors: Tensor, embeds: Tensor, frame: int, attention: tuple[Tensor, Tensor]
) -> Tensor:
    """``vectors`` (row, source, channel) through one layer of the tracker, all but the weights being linear."""
    cross: Any = tracker.transformer_cross_attention_layers[layer]
    own: Any = tracker.transformer_self_attention_layers[layer]
    ffn: Any = tracker.transformer_ffn_layers[layer]
    read, constant = _read(cross.multihead_attn, attention[0], embeds[:, None])
    moved = vectors.clone()
    moved[:, frame] += read[:, 0]
    moved[:, -1] += constant
    moved = _normed(cross.norm, moved)
    read, constant = _read(own.self_attn, attention[1], moved)
    moved = moved + read
    moved[:, -1] += constant
    moved = _normed(own.norm, moved)
    hidden = moved @ ffn.linear1.weight.double().T
    hidden[:, -1] += ffn.linear1.bias.double()
    open_gates = hidden.sum(1, keepdim=True) > 0
    moved = moved + (hidden * open_gates) @ ffn.linear2.weight.double().T
    moved[:, -1] += ffn.linear2.bias.double()
    return _normed(ffn.norm, moved)


def _read(module: Any, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """What attention of given weights (head, row, key) reads from ``values`` (key, source, channel).

    (row, source, channel), and the share of the biases (channel,), which rows that sum to 1 take in whole.
    """
    width, heads = module.embed_dim, module.num_heads
    made = values @ module.in_proj_weight[2 * width :].double().T
    read = torch.einsum("hrk,kshc->rshc", weights, made.unflatten(-1, (heads, -1))).flatten(2)
    out = module.out_proj.weight.double()
    constant = out @ module.in_proj_bias[2 * width :].double() + module.out_proj.bias.double()
    return read @ out.T, constant


def _normed(norm: Any, vectors: Tensor) -> Tensor:
    """A layer norm of the sum, by source; its shift is a constant."""
    deviation = (vectors.sum(1).var(-1, correction=0) + norm.eps).sqrt()
    centred: Tensor = (vectors - vectors.mean(-1, keepdim=True)) / deviation[:, None, None] * norm.weight.double()
    centred[:, -1] += norm.bias.double()
    return centred


def _answers(tracker: Tracker, vectors: Tensor) -> Tensor:
    """Parts of the class logits, (row, source, class + 1)."""
    parts = _normed(tracker.decoder_norm, vectors) @ tracker.class_embed.weight.double().T
    parts[:, -1] += tracker.class_embed.bias.double()
    return parts


# ------------------------------------------------------------------------------- rollout beside it


def _halved(source: DaqSource, traced: Trace, sample: int) -> list[HalfResidual]:
    clip, layers = traced.outputs.clips[sample], source.config.tracker.layers
    frames, lives = len(clip.rows), _lives(clip)
    mass = clip.segmenter.embeds.new_zeros(0, frames, dtype=torch.float64)
    table = np.full((len(clip.tracks), frames, frames), np.nan)
    for frame in range(frames):
        fresh = mass.new_zeros(source.config.num_queries, frames)
        fresh[:, 0] = float(frame == 0)
        mass = _carried(clip, frame, mass, fresh)
        for layer in range(layers):
            _, own = _attention(traced, sample, frame, layer)
            mass = 0.5 * mass
            mass[:, frame] += 0.5
            mass = 0.5 * mass + 0.5 * own.mean(0) @ mass
        for track, row in lives[frame].items():
            table[track, frame] = mass[row].cpu().numpy()
    return [HalfResidual(track.id, table[track.id], layers) for track in clip.tracks]
