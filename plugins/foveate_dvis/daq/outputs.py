"""What a run of DVIS-DAQ gives: per-frame rows, tracks with their births and deaths, class scores and masks.

Frames are numbered through the whole clip, also where it is read in blocks. Tracks are numbered in the order of
their creation. Masks are logits at a quarter of the padded frame, ``ABSENT`` where a track does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from foveate_dvis.daq.state import TrackerState

ABSENT = -1e4
"""Mask logit (and class logit of the real classes) of a track in frames outside its life."""

NEW = -1
"""In ``FrameRows.ids``: a new-instance row, not (yet) a track."""


@dataclass(frozen=True)
class Track:
    """One track: ``appearance[i]`` says whether it was valid in frame ``start + i``; ``dead``: given up since."""

    id: int
    start: int
    appearance: tuple[bool, ...]
    dead: bool

    @property
    def end(self) -> int:
        """The frame after its last."""
        return self.start + len(self.appearance)


@dataclass(frozen=True)
class FrameRows:
    """The tracker's rows in one frame: carried tracks first, then one new-instance row a segmenter query.

    ``ids``: track id, ``NEW`` for new-instance rows; ``anchors``: segmenter query of a new-instance row, -1 for
    tracks; ``valid``: the row passed the rules; ``births``: (row, new track id); ``deaths``: ids given up here.
    ``class_logits`` (row, class + 1); ``slot_scores`` (carried track,): best class score in the gate, empty in
    the clip's first frame.
    """

    frame: int
    ids: tuple[int, ...]
    anchors: tuple[int, ...]
    valid: tuple[bool, ...]
    births: tuple[tuple[int, int], ...]
    deaths: tuple[int, ...]
    class_logits: Tensor
    slot_scores: Tensor

    @property
    def track_rows(self) -> int:
        """How many rows carry a track over from the frame before."""
        return sum(row != NEW for row in self.ids)

    @property
    def born(self) -> tuple[int, ...]:
        """For each row the id of the track that it carries after this frame's decisions; ``NEW`` for none."""
        new = dict(self.births)
        return tuple(new.get(row, track) for row, track in enumerate(self.ids))


@dataclass(frozen=True)
class SegmenterOutputs:
    """Mask2Former's answers to each frame of the block, before any tracking.

    ``logits`` (frame, query, class + 1); ``masks`` (frame, query, y/4, x/4) logits; ``embeds`` (frame, query,
    channel): normalised last query states; ``features`` (frame, channel, y/4, x/4): per-pixel mask features.
    """

    logits: Tensor
    masks: Tensor
    embeds: Tensor
    features: Tensor


@dataclass(frozen=True)
class Refined:
    """The offline refiner's answer over all frames read so far.

    Instance ``i`` is track ``ids[i]``, or, where ``linked[i]``, a MinVIS chain of segmenter queries that begins
    at query ``ids[i]`` of the first frame. ``logits`` (instance, class + 1); ``masks`` (instance, frame, y/4, x/4)
    for the frames of the block; ``mask_embeds`` (instance, clip frame, channel): the product with a frame's mask
    features gives its masks; ``embeds`` (instance, clip frame, channel); ``importance`` (instance, clip frame):
    weights of the frames in the class score, sum 1; ``padding`` bool (instance, clip frame): no track there;
    ``unrefined_logits`` (instance, class + 1): what the tracker said; ``chains`` int64 (clip frame, query): where
    there was need to link, the segmenter query of each frame that continues each chain.
    """

    ids: tuple[int, ...]
    linked: tuple[bool, ...]
    logits: Tensor
    masks: Tensor
    mask_embeds: Tensor
    embeds: Tensor
    importance: Tensor
    padding: Tensor
    unrefined_logits: Tensor
    chains: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Text that names each instance: the track's number, or "linked N"."""
        return tuple(f"linked {i}" if made else str(i) for i, made in zip(self.ids, self.linked, strict=True))


@dataclass(frozen=True)
class DaqOutputs:
    """One block of frames, or a whole clip.

    ``first_frame``: number of the block's first frame in the clip. ``rows``: one :class:`FrameRows` a frame.
    ``tracks``: all tracks so far, those dropped as noise too. ``ids``: the kept ones, in the order of
    ``pred_logits`` (track, class + 1; mean over the frames of the track's life so far) and ``pred_masks``
    (track, frame, y/4, x/4). ``frame_logits`` (track, frame, class + 1) and ``alive`` bool (track, frame): frame
    by frame, within the block. ``segmenter``: the answers before tracking. ``state``: give it to the next block.
    ``refined``: offline mode only.
    """

    first_frame: int
    rows: tuple[FrameRows, ...]
    tracks: tuple[Track, ...]
    ids: tuple[int, ...]
    pred_logits: Tensor
    pred_masks: Tensor
    frame_logits: Tensor
    alive: Tensor
    segmenter: SegmenterOutputs
    state: TrackerState
    refined: Refined | None = None

    @property
    def frames(self) -> range:
        """The numbers of the block's frames in the clip."""
        return range(self.first_frame, self.first_frame + len(self.rows))

    @property
    def births(self) -> tuple[tuple[int, int], ...]:
        """(frame, track id) of each track that began in this block."""
        return tuple((rows.frame, track) for rows in self.rows for _, track in rows.births)

    @property
    def deaths(self) -> tuple[tuple[int, int], ...]:
        """(frame, track id) of each track that was given up in this block."""
        return tuple((rows.frame, track) for rows in self.rows for track in rows.deaths)

    @property
    def final_names(self) -> tuple[str, ...]:
        """Text that names each answer, in the order of ``final_logits``."""
        return self.refined.names if self.refined is not None else tuple(str(track) for track in self.ids)

    @property
    def final_logits(self) -> Tensor:
        """The model's answer: refined where there is a refiner, (instance, class + 1)."""
        return self.refined.logits if self.refined is not None else self.pred_logits

    @property
    def final_masks(self) -> Tensor:
        """The model's answer: refined where there is a refiner, (instance, frame, y/4, x/4) logits."""
        return self.refined.masks if self.refined is not None else self.pred_masks
