"""Analysis ``decision``: from which frame on the answer stays what it is.

Attention on early frames does not say that the answer was decided early. So the model is shown ever longer
beginnings of the clip; the decision time is the first from which on the label never changes again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import SampleError, UsageError
from foveate.study.detection import Finding
from foveate.study.temporal_subject import ClipSubject, Outcome, dataset, there
from foveate.temporal.decision import decision_time
from foveate.temporal.identity import mask_overlap

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from foveate.interfaces import Prediction

OVERLAP = 0.5
"""IoU on the frames shown from which a track of a prefix is the track of the whole clip."""


def decision(subject: ClipSubject) -> Outcome:
    """The first prefix from which on the label never changes, as a share of the clip."""
    labels = np.full((len(subject), subject.frames), -1, np.int64)
    ways = set()
    known: dict[str, int] = {}
    for place, count in enumerate(subject.counts):
        named, way = prefix_labels(subject, place)
        ways.add(way)
        labels[place, :count] = [-1 if name is None else known.setdefault(name, len(known)) for name in named]
    decided = np.array([decision_time(labels[i : i + 1, :n])[0] for i, n in enumerate(subject.counts)])
    answered = np.array([labels[i, n - 1] >= 0 for i, n in enumerate(subject.counts)])
    share = np.where(answered, decided / np.array(subject.counts), np.nan)
    if not answered.any():
        raise UsageError("no clip has an answer", remedy="lower the model's threshold")
    way = " or ".join(sorted(ways))
    null = _of_others(subject, labels)
    words = f"decision time (prefixes {way})"
    made = Outcome([Finding(words, "share of the clip", share, null, "prefixes of other videos")])
    final = labels[np.arange(len(labels)), np.array(subject.counts) - 1][:, None]
    as_final = np.where(there(subject) & answered[:, None], labels == final, np.nan)
    tables = {
        "as_final": (("sample", "frame"), subject.whole(as_final), "1 where this prefix has the final label"),
        "frames": (("sample",), subject.whole(np.where(answered, decided, np.nan)), "frame cells until decided"),
        "share": (("sample",), subject.whole(share), "the same as a share of the clip"),
    }
    made.products["temporal/decision"] = dataset(tables).assign_attrs(prefixes=way)
    return made


def prefix_labels(subject: ClipSubject, place: int) -> tuple[list[str | None], str]:
    """The label from the first 1, 2, ... frame cells, None without an answer; and how prefixes were made.

    *truncated* where the model reads shorter clips as they are; else *frozen*: the last frame shown is repeated.
    Of a tracker it is the label of the track that overlaps the clip's surest track most (IoU of at least .5 on the
    frames shown).
    """
    sample, source = subject.sample(place), subject.source
    members = subject.run.frame_cells(subject.positions[place])
    shown = [int((members <= cell).sum()) for cell in range(subject.counts[place])]
    way = "truncated" if _reads(subject, place, shown[0]) else "frozen"
    answers: list[list[Prediction]] = []
    for count in shown:
        index = np.arange(count) if way == "truncated" else np.minimum(np.arange(len(members)), count - 1)
        times = None if sample.times is None else sample.times[: index.size]
        prefix = replace(sample, pixels=sample.pixels[index], mask=None, times=times)
        batch = source.encode([prefix])
        answers.append(list(source.predictions(source.forward(batch), batch)[0]))
    last = answers[-1]
    if not last:
        return [None] * len(shown), way
    return [_label(some, last[0], count) for some, count in zip(answers, shown, strict=True)], way


def _label(answers: Sequence[Prediction], final: Prediction, count: int) -> str | None:
    if not answers:
        return None
    if final.mask is None or final.mask.ndim != 3:
        return answers[0].label
    masks = [one.mask[:count] for one in answers if one.mask is not None]
    if not masks or not final.mask[:count].any():
        return None
    overlap = mask_overlap(np.stack(masks), final.mask[None, :count])[:, 0]
    return answers[int(overlap.argmax())].label if overlap.max() >= OVERLAP else None


def _reads(subject: ClipSubject, place: int, count: int) -> bool:
    """Whether the model reads the first frames as a clip of their number."""
    sample = subject.sample(place)
    times = None if sample.times is None else sample.times[:count]
    try:
        batch = subject.source.encode([replace(sample, pixels=sample.pixels[:count], mask=None, times=times)])
    except (SampleError, UsageError):
        return False
    return int(batch.inputs.shape[1]) == count


def _of_others(subject: ClipSubject, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Decision time against the own final label of the prefixes of other videos of this length, mean over them."""
    null = np.full(len(labels), np.nan)
    for i, count in enumerate(subject.counts):
        others = [j for j, n in enumerate(subject.counts) if n == count and subject.videos[j] != subject.videos[i]]
        if others:
            mixed = labels[others, :count].copy()
            mixed[:, -1] = labels[i, count - 1]
            null[i] = decision_time(mixed).mean() / count
    return null
