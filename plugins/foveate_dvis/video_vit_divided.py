"""TimeSformer: attention divided into time and space (Bertasius et al. 2021, arXiv:2102.05095, section 3).

In each layer a patch first attends to its own place in all frames (site ``encoder.time``), then to the class token
and all patches of its own frame (site ``encoder.space``). The class token takes no part in the attention
over time; a copy of it enters every frame, and the copies are averaged afterwards.

The flow says exactly that. Its main stream holds the tokens frame by frame, each frame with its copy of the class
token; patches and copies part for the attention over time and come together again, and after each layer every copy
becomes the mean of all. So rollout and relevance need no matrix over space and time.
:meth:`DividedSource.composed` gives that matrix where somebody wants to look at it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.errors import ModelError, UsageError
from foveate.interfaces import (
    AttentionStep,
    Batch,
    CallKey,
    CallLabels,
    MergeStep,
    Readout,
    Step,
    TokenAxis,
)
from foveate_dvis.video_vit import ENCODER, TOKENS, VideoSource
from foveate_dvis.video_vit_composed import compose

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from foveate.capture.trace import Trace
    from foveate.pretrained.loading import Loaded

TIME, SPACE = "encoder.time", "encoder.space"
PLACES, FRAMES, COPIES = "time.tokens", "space.tokens", "cls.copies"


class DividedSource(VideoSource):
    """TimeSformer; options as :class:`~foveate_dvis.video_vit.VideoSource`.

    A TimeSformer trained with ``joint_space_time`` has the one site ``encoder.self``. ``space_only`` models are
    refused: as transformers runs them they answer about single frames.
    """

    def __init__(self, loaded: Loaded, family: Any, *, frames: int | None = None) -> None:
        super().__init__(loaded, family, frames=frames)
        kind = str(self._module.config.attention_type)
        if kind == "space_only":
            raise ModelError(
                f"{self.card.id}: attention_type 'space_only' gives one answer a frame and none about the clip",
                remedy="open a checkpoint with divided_space_time or joint_space_time",
            )
        self.divided = kind == "divided_space_time"
        if not self.divided:
            (space,) = self._sites
            summary = "every patch of every frame, and the class token"
            self._sites = (replace(space, id=ENCODER, query=TOKENS, key=TOKENS, group=(), summary=summary),)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """Time: the frames at one place. Space: class token and patches of one frame."""
        frames, places = self.frames, self._places
        if call.site == TIME:
            axis = TokenAxis.of_kind("frame", frames)
            axis = replace(axis, frame=np.arange(frames, dtype=np.int32))
            return CallLabels((("sample", len(batch)), ("position", places)), axis, axis)
        if call.site == SPACE:
            picture = self.layout.picture()
            return CallLabels((("sample", len(batch)), ("frame", frames)), picture, picture)
        return super().label(call, batch, outputs)

    @property
    def _places(self) -> int:
        rows, columns = self.layout.grid
        return rows * columns

    def _tokens(self, batch: Batch) -> TokenAxis:
        """Joint attention: class token, then the frames of each place in turn, as the model lays them out."""
        axis = super()._tokens(batch)
        order = 1 + np.arange(self.frames * self._places).reshape(self.frames, self._places).T.ravel()
        return axis.take([0, *order.tolist()])

    def _readout(self, batch: Batch, rows: int) -> Mapping[str, Readout]:
        """The class token's row of every frame: the answer is read from the mean of its copies."""
        if not self.divided:
            return super()._readout(batch, rows)
        weights = torch.zeros(rows, 1 + self._places, device=batch.inputs.device)
        weights[:, 0] = 1.0
        return {SPACE: Readout(weights, self.rule)}

    # ------------------------------------------------------------------------- flow

    def stream(self, batch: Batch) -> str:
        """Class token's copy and patches, frame by frame; of joint attention all tokens."""
        return FRAMES if self.divided else TOKENS

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Patches apart from the copies of the class token, time, together again, space, the copies averaged."""
        if not self.divided:
            return super().flow(batch, outputs)
        ways = _Ways.of(self.frames, self._places, batch.inputs.device)
        steps: list[Step] = []
        for layer in next(site for site in self._sites if site.id == SPACE).layers:
            steps += [
                MergeStep(FRAMES, PLACES, ways.patches, "patches, place by place"),
                MergeStep(FRAMES, COPIES, ways.copies, "the class token's copies pass by"),
                AttentionStep(CallKey(TIME, layer), PLACES, PLACES),
                MergeStep(
                    PLACES,
                    FRAMES,
                    ways.patches.t().coalesce(),
                    "frame by frame",
                    ((COPIES, ways.copies.t().coalesce()),),
                ),
                AttentionStep(CallKey(SPACE, layer), FRAMES, FRAMES),
                MergeStep(FRAMES, FRAMES, ways.averaged, "the class token is the mean of its copies"),
            ]
        return steps

    # ------------------------------------------------------------------------- space-time matrix

    def composed(self, trace: Trace, layer: int, *, residual: float = 0.0) -> tuple[Tensor, TokenAxis]:
        """One layer's attention over space and time, float32 ``(sample, token, token)``, and its tokens.

        Means over heads of both attentions, put together by :func:`~foveate_dvis.video_vit_composed.compose`; the
        tokens are the class token, then patches frame by frame. It is a full matrix: 10 MB a sample for eight
        frames of 14 x 14 patches. Raises UsageError for joint attention and for a layer that was not traced.
        """
        if not self.divided:
            raise UsageError(f"{self.card.id}: its attention is joint already", remedy="capture site encoder.self")
        time, space = (self._means(trace, CallKey(site, layer)) for site in (TIME, SPACE))
        samples = len(trace.batch)
        matrix = compose(
            time.unflatten(0, (samples, self._places)),
            space.unflatten(0, (samples, self.frames)),
            residual=residual,
        )
        return matrix, self.layout.tokens(self.frames)

    @staticmethod
    def _means(trace: Trace, call: CallKey) -> Tensor:
        """Mean over heads of one call's rows, ``(batch, query, key)``."""
        record = trace.record(call)
        return record.rows(list(range(record.shape.queries))).mean(1)


class _Ways:
    """Where the tokens of the main stream go: sparse matrices of zeros and ones, and one of means."""

    def __init__(self, patches: Tensor, copies: Tensor, averaged: Tensor) -> None:
        self.patches, self.copies, self.averaged = patches, copies, averaged

    @classmethod
    def of(cls, frames: int, places: int, device: torch.device) -> _Ways:
        """For ``frames`` frames of ``places`` patches, each frame with a copy of the class token in front."""
        number = np.arange(frames * (1 + places)).reshape(frames, 1 + places)
        size = number.size
        copies = number[:, 0]
        rest = number[:, 1:].ravel()
        return cls(
            patches=_sparse(np.arange(frames * places), number[:, 1:].T.ravel(), (frames * places, size), device),
            copies=_sparse(np.arange(frames), copies, (frames, size), device),
            averaged=_sparse(
                np.concatenate([rest, np.repeat(copies, frames)]),
                np.concatenate([rest, np.tile(copies, frames)]),
                (size, size),
                device,
                np.concatenate([np.ones(rest.size), np.full(frames * frames, 1 / frames)]),
            ),
        )


def _sparse(
    row: NDArray[np.int64],
    column: NDArray[np.int64],
    shape: tuple[int, int],
    device: torch.device,
    value: NDArray[np.float64] | None = None,
) -> Tensor:
    values = torch.ones(len(row)) if value is None else torch.from_numpy(value).float()
    index = torch.from_numpy(np.stack([row, column]))
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True, device=device).coalesce()
