"""DVIS-DAQ as one module: frames in, tracks with class scores and masks out, in blocks or the whole clip at once.

Nothing here switches gradients off or names a device: class scores and masks can be followed back to the pixels
in both modes. Decisions (which rows are tracks) are discrete; ``held`` keeps those of an intact run, so that a
score of the same track can be asked of a changed picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from foveate.errors import SampleError, UsageError
from foveate_dvis.daq.config import DaqConfig
from foveate_dvis.daq.offline import gather, nothing_refined
from foveate_dvis.daq.offline import refine as refine_instances
from foveate_dvis.daq.outputs import ABSENT, DaqOutputs, FrameRows, Refined, SegmenterOutputs
from foveate_dvis.daq.refiner import Refiner, masks_of
from foveate_dvis.daq.segmenter import build_segmenter
from foveate_dvis.daq.state import FrameMemory, TrackerState
from foveate_dvis.daq.tracker import FrameInputs, FrameStep, Tracker
from foveate_dvis.daq.tracks import Lived, kept_tracks, live_on

if TYPE_CHECKING:
    from torch import Tensor


class DvisDaq(nn.Module):
    """Segmenter, tracker and, offline, refiner.

    ``upstream_exact`` reproduces the recorded behaviour of the original also where it breaks or leaves an order
    open: the refiner answers nothing when exactly one track enters, and instances stand in the order of an
    unsorted top-k. By default one track is refined like any other number, and instances stand best first.
    """

    def __init__(self, config: DaqConfig, *, upstream_exact: bool = False) -> None:
        super().__init__()
        self.config = config
        self.upstream_exact = upstream_exact
        self.segmenter: Any = build_segmenter(config)
        self.tracker = Tracker(config)
        self.refiner = Refiner(config, config.refiner) if config.refiner is not None else None

    def forward(
        self,
        frames: Tensor,
        *,
        state: TrackerState | None = None,
        held: DaqOutputs | None = None,
        refine: bool = True,
    ) -> DaqOutputs:
        """Read frames that follow those of ``state`` (the ``state`` of the outputs before; None: a clip begins).

        ``frames`` float (frame, 3, y, x): normalised, RGB, padded at the bottom and the right to multiples of
        ``config.divisor``. Blocks of a multiple of ``config.window`` frames give what the whole clip gives at
        once. ``held``: the outputs of another run over these frames, whose decisions are kept. ``refine`` False
        leaves the refiner out (it reads all frames so far: a stream needs it after its last block only).

        Raises SampleError for frames of another shape, UsageError where ``held`` does not fit.
        """
        self._check(frames, held)
        state = TrackerState() if state is None else state
        first = state.next_frame
        query_feat = self.segmenter.model.transformer_module.queries_features.weight
        windows = map(self._segment, frames.split(self.config.window))  # online: segment a window, track it, go on
        parts: list[SegmenterOutputs] = []
        block: list[_Read] = []
        for part in windows if self.refiner is None else list(windows):
            parts.append(part)
            for i in range(len(part.logits)):
                rows = held.rows[len(block)] if held is not None else None
                block.append(self._frame(part, i, state, query_feat, rows))
                state = block[-1].lived.state
        segmented = _joined(parts)
        return self._outputs(first, segmented, block, state, held, refine=refine)

    def refined_masks(self, refined: Refined, frames: Tensor, first_frame: int) -> Tensor:
        """Refined mask logits (instance, frame, y/4, x/4) for ``frames``, which begin at ``first_frame``.

        For streams: the last block's outputs hold the masks of that block's frames only; frames read before are
        segmented again here. Raises SampleError for frames beyond those that were refined.
        """
        self._check(frames, None)
        length = refined.mask_embeds.shape[1]
        if not 0 <= first_frame <= length - len(frames):
            raise SampleError(
                f"frames {first_frame} to {first_frame + len(frames) - 1} of {length} that were refined"
            )
        embeds = refined.mask_embeds[:, first_frame : first_frame + len(frames)]
        return masks_of(embeds, self.segment(frames).features)

    def segment(self, frames: Tensor) -> SegmenterOutputs:
        """The segmenter alone, in batches of ``config.window`` frames."""
        return _joined([self._segment(window) for window in frames.split(self.config.window)])

    def _segment(self, window: Tensor) -> SegmenterOutputs:
        out = self.segmenter(pixel_values=window)
        norm = self.segmenter.model.transformer_module.decoder.layernorm
        return SegmenterOutputs(
            logits=out.class_queries_logits,
            masks=out.masks_queries_logits,
            embeds=norm(out.transformer_decoder_last_hidden_state),
            features=out.pixel_decoder_last_hidden_state,
        )

    # ------------------------------------------------------------------------- one frame

    def _frame(
        self, segmented: SegmenterOutputs, i: int, state: TrackerState, query_feat: Tensor, held: FrameRows | None
    ) -> _Read:
        frame = FrameInputs(segmented.logits[i], segmented.masks[i], segmented.embeds[i], segmented.features[i])
        live = state.live
        empty = frame.embeds[:0]
        states = torch.stack([track.state for track in live]) if live else empty
        positions = torch.stack([track.position for track in live]) if live else empty
        step = self.tracker(frame, states, positions, query_feat, first=state.next_frame == 0)
        offline = self.refiner is not None
        lived = live_on(state, step, self.config.tracker, keep_states=offline, held=held)
        if offline:
            memory = FrameMemory(frame.embeds, frame.logits)
            grown = lived.state.remembering(memory)
            lived = Lived(grown, lived.rows, lived.appended)
        return _Read(step, lived)

    # ------------------------------------------------------------------------- the block's answer

    def _outputs(
        self,
        first: int,
        segmented: SegmenterOutputs,
        block: list[_Read],
        state: TrackerState,
        held: DaqOutputs | None,
        *,
        refine: bool,
    ) -> DaqOutputs:
        tracks = kept_tracks(state, self.config.tracker)
        ids = tuple(track.id for track in tracks)
        masks, logits, alive = _by_track(ids, block)
        means = (
            torch.stack([track.logits for track in tracks]) if tracks else logits.new_zeros(0, logits.shape[-1])
        )
        refined = None
        if self.refiner is not None and refine:
            refined = self._refine(self.refiner, state, segmented.features, held.refined if held else None)
        return DaqOutputs(
            first_frame=first,
            rows=tuple(one.lived.rows for one in block),
            tracks=tuple(track.track for track in state.tracks),
            ids=ids,
            pred_logits=means,
            pred_masks=masks,
            frame_logits=logits,
            alive=alive,
            segmenter=segmented,
            state=state.detached(),
            refined=refined,
        )

    def _refine(self, refiner: Refiner, state: TrackerState, features: Tensor, held: Refined | None) -> Refined:
        config = self.config
        assert config.refiner is not None
        tracks = kept_tracks(state, config.tracker)
        instances = gather(state, tracks, config, config.refiner, exact=self.upstream_exact, held=held)
        refined = refine_instances(refiner, state, instances, features)
        alone = sum(not made for made in instances.linked) == 1
        return nothing_refined(refined) if self.upstream_exact and alone else refined

    def _check(self, frames: Tensor, held: DaqOutputs | None) -> None:
        divisor = self.config.divisor
        if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames) or not frames.is_floating_point():
            raise SampleError(
                f"frames are {tuple(frames.shape)} {frames.dtype}: expected floating (frame, 3, y, x), "
                "at least one frame"
            )
        height, width = frames.shape[-2:]
        if height % divisor or width % divisor or not height or not width:
            raise SampleError(
                f"frames are {height} x {width}: expected multiples of {divisor}",
                remedy="pad with zeros at the bottom and at the right after normalising",
            )
        if held is not None and len(held.rows) != len(frames):
            raise UsageError(f"held decisions cover {len(held.rows)} frames, the block has {len(frames)}")


@dataclass(frozen=True)
class _Read:
    """One frame: what the tracker said and what became of it."""

    step: FrameStep
    lived: Lived


def _joined(parts: list[SegmenterOutputs]) -> SegmenterOutputs:
    return SegmenterOutputs(
        logits=torch.cat([part.logits for part in parts]),
        masks=torch.cat([part.masks for part in parts]),
        embeds=torch.cat([part.embeds for part in parts]),
        features=torch.cat([part.features for part in parts]),
    )


def _by_track(ids: tuple[int, ...], block: list[_Read]) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (track, frame, y/4, x/4), class logits (track, frame, class + 1) and life, bool (track, frame)."""
    masks, logits, alive = [], [], []
    place = {track: i for i, track in enumerate(ids)}
    for read in block:
        present = [(row, place[track]) for row, track in read.lived.appended if track in place]
        rows = torch.tensor([row for row, _ in present], dtype=torch.long, device=read.step.masks.device)
        where = torch.tensor([i for _, i in present], dtype=torch.long, device=rows.device)
        step = read.step
        nothing = step.logits.new_full((len(ids), step.logits.shape[-1]), ABSENT)
        nothing[:, -1] = 1.0
        masks.append(
            step.masks.new_full((len(ids), *step.masks.shape[1:]), ABSENT).index_copy(0, where, step.masks[rows])
        )
        logits.append(nothing.index_copy(0, where, step.logits[rows]))
        lives = torch.zeros(len(ids), dtype=torch.bool, device=rows.device)
        lives[where] = True
        alive.append(lives)
    return torch.stack(masks, dim=1), torch.stack(logits, dim=1), torch.stack(alive, dim=1)
