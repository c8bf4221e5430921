"""One clip before anything is changed: what the model answers, what is scored, and under which masks.

The target is bound once, to the intact clip: class, object, identity and masks are held, whatever the model
answers afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.objects import own_prediction
from foveate.errors import SampleError, UsageError
from foveate.interfaces import BoundTarget, Sample, Target
from foveate.temporal import cues
from foveate.temporal.coalitions import Removal

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, Outputs, Prediction

    Scores = dict[str, NDArray[np.float64]]

ANSWER = "answer"
"""Scale: 1 where the model's first answer is the bound class, else 0."""


@dataclass(frozen=True)
class Settings:
    """What a job does to every video.

    ``target`` is what is scored; ``truth`` names a manifest column whose value is the class instead.
    ``batch_size`` clips run together. ``edges`` also cuts attention between frames.
    """

    removal: Removal = field(default_factory=Removal)
    target: Target = field(default_factory=Target)
    truth: str | None = None
    batch_size: int = 8
    edges: bool = True


@dataclass(frozen=True, eq=False)
class Intact:
    """A clip, what the model answered to it, and the target bound to that.

    ``held`` is the batch on which a tracker keeps its decisions (which rows are tracks); where there are none to
    keep it is ``batch`` itself. ``whole`` are all frames of the clip where ``sample`` was cut down to those read.
    """

    source: AttentionSource
    sample: Sample
    whole: NDArray[np.uint8]
    batch: Batch
    held: Batch
    answers: Sequence[Prediction]
    bound: BoundTarget
    scales: tuple[Any, ...]
    scores: Scores


@dataclass(frozen=True, eq=False)
class Group:
    """Target rows that share masks ``(frame, y, x)`` over all frames of the sample, or None."""

    rows: tuple[int, ...]
    masks: NDArray[np.bool_] | None
    origin: str


def intact_clip(source: AttentionSource, sample: Sample, settings: Settings) -> Intact:
    """Run the clip as it is and bind the target to the answer. Raises SampleError for an image or no target."""
    if not sample.is_clip:
        raise SampleError(f"{sample.id}: an image, expected a clip", remedy="give a video or a folder of frames")
    every = sample.pixels
    sample, batch = _as_read(source, sample)
    with torch.no_grad():
        outputs = source.forward(batch)
        bound = source.bind(outputs, batch, _target(sample, settings))
        answers = source.predictions(outputs, batch)[0]
    if not len(bound):
        raise SampleError(
            f"{sample.id}: the model finds nothing to score", remedy="another target, or other clips"
        )
    scales = _usable(source, outputs, batch, bound)
    whole = scored(source, outputs, batch, bound, scales)
    return Intact(source, sample, every, batch, source.hold(batch, outputs), answers, bound, scales, whole)


def _as_read(source: AttentionSource, sample: Sample) -> tuple[Sample, Batch]:
    """The sample cut down to the frames that the model reads, where that gives the model the very same input.

    Then every frame that an intervention shows is one whose mask the model gave. Else the sample as it is.
    """
    batch = source.encode([sample])
    read = frame_index(batch, len(sample.pixels))
    if read.size >= len(sample.pixels) or (np.diff(read) <= 0).any():
        return sample, batch
    shorter = replace(
        sample,
        pixels=sample.pixels[read],
        times=None if sample.times is None else sample.times[read],
        mask=None if sample.mask is None else sample.mask[read],
    )
    try:
        again = source.encode([shorter])
    except SampleError:
        return sample, batch
    same = again.inputs.shape == batch.inputs.shape and bool(torch.equal(again.inputs, batch.inputs))
    return (shorter, again) if same else (sample, batch)


def _target(sample: Sample, settings: Settings) -> Target:
    if settings.truth is None:
        return settings.target
    label = sample.columns.get(settings.truth)
    if label is None or label == "":
        raise SampleError(f"{sample.id}: no {settings.truth!r} in the manifest", remedy="fill the column")
    return replace(settings.target, label=label if isinstance(label, int) else str(label))


def _usable(source: AttentionSource, outputs: Outputs, batch: Batch, bound: BoundTarget) -> tuple[Any, ...]:
    """Scales on which the source can score this target; "value" where it has neither probability nor logit."""
    found = []
    for scale in ("probability", "logit") if bound.scale != "value" else ():
        try:
            with torch.no_grad():
                source.score(outputs, batch, bound.at(scale))
        except UsageError:
            continue
        found.append(scale)
    return tuple(found) or ("value",)


def groups_of(intact: Intact) -> list[Group]:
    """Given masks serve all rows; else each object has those of its own track; else what moves in the picture."""
    rows = tuple(range(len(intact.bound)))
    if intact.sample.mask is not None:
        return [Group(rows, intact.sample.mask, "given")]
    groups: list[Group] = []
    loose = []
    for row in rows:
        own = own_prediction(intact.answers, intact.bound.rows[row])
        if own is None or own.mask is None or not own.mask.any():
            loose.append(row)
        else:
            groups.append(Group((row,), on_all_frames(own.mask, intact), "the model's own track"))
    return [*groups, Group(tuple(loose), _moving(intact), "pixels that move")] if loose else groups


def _moving(intact: Intact) -> NDArray[np.bool_]:
    """What moves in the frames that are read, against the background of all frames."""
    return cues.moving_masks(intact.sample.pixels, cues.background_of(intact.whole))


def on_all_frames(masks: NDArray[np.bool_], intact: Intact) -> NDArray[np.bool_]:
    """Masks of the frames that the model read on all frames of the sample: each takes the nearest one's."""
    read = frame_index(intact.batch, len(intact.sample.pixels))
    every = np.arange(len(intact.sample.pixels))
    return cues.reorder(masks, np.abs(every[:, None] - read[None, :]).argmin(1))


def frame_index(batch: Batch, frames: int) -> NDArray[np.int64]:
    """Which frame of the (first) sample each frame of the input is."""
    index = batch.per_sample.get("frame_index")
    return np.arange(frames) if index is None else index[0].cpu().numpy()


def scored(
    source: AttentionSource, outputs: Outputs, batch: Batch, bound: BoundTarget, scales: Sequence[Any]
) -> Scores:
    """Scale -> (target row,) float64; "answer" too where the target is a class of the whole clip."""
    with torch.no_grad():
        found = {s: source.score(outputs, batch, bound.at(s)).cpu().numpy().astype(np.float64) for s in scales}
    if all(row.object is None and row.class_index is not None for row in bound.rows):
        best = [answers[0].class_index for answers in source.predictions(outputs, batch)]
        if None not in best:
            found[ANSWER] = np.array([float(best[row.sample] == row.class_index) for row in bound.rows])
    return found
