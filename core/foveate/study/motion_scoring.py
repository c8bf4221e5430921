"""One clip of the test "appearance, motion or both": every changed clip made, run and scored against one target.

Each changed clip goes through the source's own preprocessing, and the target that was bound to the intact clip is
scored (:mod:`foveate.study.motion_subject`). Whether a tracker still follows the object is measured beside the
score and never mixed into it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.objects import own_prediction
from foveate.errors import CaptureError, FoveateError, SampleError, UsageError
from foveate.interfaces import BoundTarget, Sample
from foveate.study.motion_edges import NO_EDGES, Edges, cuts, frame_edges, run_cut
from foveate.study.motion_subject import (
    Group,
    Intact,
    Settings,
    frame_index,
    groups_of,
    intact_clip,
    on_all_frames,
    scored,
)
from foveate.temporal import cues
from foveate.temporal.coalitions import Variant, variants
from foveate.temporal.kept import frames_lost
from foveate.temporal.sham import change_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, Prediction

    Scores = dict[str, NDArray[np.float64]]

__all__ = ["REVERSED", "Settings", "VideoScores", "score_clip"]

REVERSED = "reversed"


@dataclass(frozen=True, eq=False)
class VideoScores:
    """Scores of one class in one clip. ``scores``: scale -> condition -> the mean over its target rows.

    Conditions are ``none``, ``appearance``, ``motion``, ``both``, ``sham none`` ..., ``reversed``, and the cuts
    ``between``, ``within`` ... ``lost``: condition -> share of frames in which the object's track is lost.
    ``sizes``: condition -> share of the pixels that changed, and root mean square change in grey levels. ``masks``
    says where the masks came from, ``apart`` whether all shams kept off them.
    """

    id: str
    video: str
    label: str
    rows: int
    scores: Mapping[str, Mapping[str, float]]
    lost: Mapping[str, float]
    sizes: Mapping[str, tuple[float, float]]
    masks: str
    apart: bool
    mass: float = float("nan")
    uniform: float = float("nan")
    cut_edges: Mapping[str, int] = field(default_factory=dict)
    not_cut: Mapping[str, str] = field(default_factory=dict)
    sha256: str = ""


def score_clip(source: AttentionSource, sample: Sample, settings: Settings, number: int = 0) -> list[VideoScores]:
    """All scores of one clip, one entry a class among its target rows (a tracker may see several).

    ``number`` is its place in the study, from which its draws follow. Raises SampleError for an image, one frame,
    a clip without a target, and where no appearance can be removed.
    """
    intact = intact_clip(source, sample, settings)
    parts = [_score_group(intact, group, settings, number) for group in groups_of(intact)]
    cut = _cut_scores(intact, number) if settings.edges else _Cuts()
    labels = [row.label for row in intact.bound.rows]
    return [_entry(intact, parts, cut, label, labels) for label in dict.fromkeys(labels)]


def _entry(intact: Intact, parts: Sequence[_Part], cut: _Cuts, label: str, labels: Sequence[str]) -> VideoScores:
    """One class: means over its rows."""
    rows = [i for i, name in enumerate(labels) if name == label]
    some = [(part, own) for part in parts if (own := [i for i, r in enumerate(part.group.rows) if r in rows])]
    scores = {
        scale: {
            name: _pooled((part.scores[scale][name], own) for part, own in some)
            for name in some[0][0].scores[scale]
        }
        | {name: float(values[rows].mean()) for name, values in cut.scores.get(scale, {}).items()}
        | {"both": float(whole[rows].mean())}
        for scale, whole in intact.scores.items()
    }
    tracked = [(part, own) for part, own in some if part.lost]
    names = dict.fromkeys(name for part, _ in tracked for name in part.lost)
    return VideoScores(
        id=intact.sample.id,
        video=str(intact.sample.columns.get("video") or intact.sample.path or intact.sample.id),
        label=label,
        rows=len(rows),
        scores=scores,
        lost={name: _pooled((part.lost[name], own) for part, own in tracked) for name in names},
        sizes={
            name: (_mean(part.sizes[name][0] for part, _ in some), _mean(part.sizes[name][1] for part, _ in some))
            for name in some[0][0].sizes
        },
        masks=", ".join(sorted({part.group.origin for part, _ in some})),
        apart=all(part.apart for part, _ in some),
        mass=cut.found.mass,
        uniform=cut.found.uniform,
        cut_edges=cut.counts,
        not_cut=cut.failed,
        sha256=intact.sample.sha256,
    )


# ------------------------------------------------------------------------------------ changed clips


@dataclass(frozen=True, eq=False)
class _Part:
    """Scores of one group: scale -> condition -> (row of the group); ``lost`` is empty without tracks."""

    group: Group
    scores: Mapping[str, Scores]
    lost: Scores
    sizes: Mapping[str, tuple[float, float]]
    apart: bool


def _score_group(intact: Intact, group: Group, settings: Settings, number: int) -> _Part:
    scores: dict[str, dict[str, list[NDArray[np.float64]]]] = defaultdict(lambda: defaultdict(list))
    lost: dict[str, list[NDArray[np.float64]]] = defaultdict(list)
    sizes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    pixels = intact.sample.pixels[..., 0].size
    apart = True
    for some in _blocks(_all_variants(intact, group, settings, number), settings.batch_size):
        for scale, table in _run(intact, group, some, lost).items():
            for (name, _), values in zip(some, table, strict=True):
                scores[scale][name].append(values)
        for name, one in some:
            sizes[name].append((one.change.pixels / pixels, one.change.l2 / pixels**0.5))
            apart &= one.apart
    return _Part(
        group,
        {scale: {name: np.mean(draws, axis=0) for name, draws in by.items()} for scale, by in scores.items()},
        {name: np.mean(draws, axis=0) for name, draws in lost.items()},
        {name: (_mean(one[0] for one in all_), _mean(one[1] for one in all_)) for name, all_ in sizes.items()},
        apart,
    )


def _all_variants(intact: Intact, group: Group, settings: Settings, number: int) -> Iterator[tuple[str, Variant]]:
    pixels = intact.sample.pixels
    try:
        for one in variants(pixels, group.masks, settings.removal, video=number):
            yield (f"sham {one.coalition}" if one.sham else one.coalition), one
    except SampleError as error:
        raise SampleError(f"{intact.sample.id}: {error.message}", remedy=error.remedy) from None
    order = np.arange(len(pixels))[::-1].copy()
    backwards = cues.reorder(pixels, order)
    masks = None if group.masks is None else cues.reorder(group.masks, order)
    yield REVERSED, Variant("both", 0, False, backwards, masks, order, change_of(pixels, backwards))


def _blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while block := list(islice(iterator, size)):
        yield block


def _run(
    intact: Intact, group: Group, some: Sequence[tuple[str, Variant]], lost: dict[str, list[NDArray[np.float64]]]
) -> dict[str, NDArray[np.float64]]:
    """Scores of some changed clips: scale -> (clip, row of the group); what was lost is added to ``lost``."""
    source, sample = intact.source, intact.sample
    samples = [
        replace(sample, id=f"{sample.id}#{i}", pixels=one.clip, mask=None) for i, (_, one) in enumerate(some)
    ]
    batch = source.encode(samples)
    held = intact.held.replace(batch.inputs, [0] * len(some))
    bound = _repeated(intact.bound, group.rows, len(some))
    with torch.no_grad():
        outputs = source.forward(held)
        table = scored(source, outputs, held, bound, intact.scales)
        if group.masks is not None and _of_tracks(intact, group):
            free = outputs if intact.held is intact.batch else source.forward(batch)
            for (name, one), answers in zip(some, source.predictions(free, batch), strict=True):
                lost[name].append(_lost(intact, group, one, answers, batch))
    return {scale: values.reshape(len(some), -1) for scale, values in table.items()}


def _repeated(bound: BoundTarget, rows: Sequence[int], count: int) -> BoundTarget:
    """Chosen rows of a target bound to one sample, for ``count`` samples one after the other."""
    index = [row for _ in range(count) for row in rows]
    kept = tuple(replace(bound.rows[row], sample=i) for i in range(count) for row in rows)
    return replace(bound, rows=kept, context={name: value[index] for name, value in bound.context.items()})


def _of_tracks(intact: Intact, group: Group) -> bool:
    return any(
        own is not None and own.mask is not None
        for own in (own_prediction(intact.answers, intact.bound.rows[row]) for row in group.rows)
    )


def _lost(
    intact: Intact, group: Group, one: Variant, answers: Sequence[Prediction], batch: Batch
) -> NDArray[np.float64]:
    """Share of frames lost, (row of the group): expected are the intact clip's masks, changed as the clip was."""
    read = frame_index(batch, len(one.clip))
    tracks = [answer.mask for answer in answers if answer.mask is not None]
    found = []
    for row in group.rows:
        own = own_prediction(intact.answers, intact.bound.rows[row])
        if own is None or own.mask is None:
            found.append(float("nan"))
            continue
        expected = on_all_frames(own.mask, intact)[one.order][read]
        found.append(frames_lost(expected, tracks))
    return np.array(found)


# -------------------------------------------------------------------------------------------- edges


@dataclass(frozen=True, eq=False)
class _Cuts:
    """Scores under each cut: scale -> cut -> (target row); edges cut by each; what could not be cut, and why."""

    scores: Mapping[str, Scores] = field(default_factory=dict)
    found: Edges = NO_EDGES
    counts: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)


def _cut_scores(intact: Intact, number: int) -> _Cuts:
    try:
        found = frame_edges(intact.source, intact.batch)
    except FoveateError as error:
        return _Cuts(failed={"all": error.message})
    scores: dict[str, Scores] = defaultdict(dict)
    counts: dict[str, int] = {}
    failed = dict(found.left_out)
    for cut in cuts(found, number):
        try:
            outputs = run_cut(intact.source, intact.held, cut)
        except (CaptureError, UsageError) as error:
            failed[cut.name] = error.message
            continue
        counts[cut.name] = cut.edges
        for scale, values in scored(intact.source, outputs, intact.held, intact.bound, intact.scales).items():
            scores[scale][cut.name] = values
    return _Cuts(scores, found, counts, failed)


def _pooled(parts: Iterable[tuple[NDArray[np.float64], Sequence[int]]]) -> float:
    """Mean over chosen rows of several groups; NaN rows do not count."""
    return _mean(float(value) for values, rows in parts for value in values[list(rows)])


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
