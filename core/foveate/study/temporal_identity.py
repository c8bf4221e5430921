"""Analyses ``identity`` and ``recurrence`` of trackers: who becomes whom, and how far back a track reaches.

Both run the model again: they need what is not attention (masks of all queries, the norms of what each frame
contributed). A source offers it by :mod:`foveate.temporal.trackers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.known import mean_known
from foveate.study.detection import Finding
from foveate.study.temporal_subject import ClipSubject, Outcome, dataset
from foveate.temporal.identity import transport
from foveate.temporal.trackers import Carried, CarryingSource, Reach, RecurrentSource

if TYPE_CHECKING:
    from numpy.typing import NDArray


def identity(subject: ClipSubject) -> Outcome:
    """Does a track's row read the query that becomes its mask? Beside uniform attention and a random choice.

    Raises UsageError where the model does not carry tracks, or carries none in these clips.
    """
    source = subject.source
    if not isinstance(source, CarryingSource):
        raise UsageError(f"{source.card.id}: no tracks that read from the queries of each frame")
    shape = (len(subject), subject.frames)
    own, chance, agrees, overlap = (np.full(shape, np.nan) for _ in range(4))
    for place in range(len(subject)):
        for step in source.carried(source.encode([subject.sample(place)]))[0]:
            found = _transported(step)
            own[place, step.frame], chance[place, step.frame] = found[0], found[1]
            agrees[place, step.frame], overlap[place, step.frame] = found[2], found[3]
    if not np.isfinite(own).any():
        raise UsageError(f"{source.card.id}: no track is carried from one frame to the next in these clips")
    uniform = "uniform attention over the frame's queries"
    findings = [
        Finding(
            "mass on the query that becomes the mask", "1", mean_known(own, 1), mean_known(chance, 1), uniform
        ),
        Finding(
            "largest weight is on that query",
            "share",
            mean_known(agrees, 1),
            mean_known(chance, 1),
            "a random query",
        ),
        Finding("overlap of track and that query", "IoU", mean_known(overlap, 1)),
    ]
    dims = ("sample", "frame")
    product = dataset(
        {
            "mass": (dims, own, "of carried tracks on the query whose mask becomes theirs, mean over tracks"),
            "uniform": (dims, chance, "one over the queries"),
            "agrees": (dims, agrees, "share of tracks whose largest weight is on that query"),
            "overlap": (dims, overlap, "IoU of the two masks"),
        },
        sample=subject.ids,
    )
    return Outcome(findings, {"temporal/identity": product})


def recurrence(subject: ClipSubject) -> Outcome:
    """How much of a track was made in earlier frames, by exact contributions, beside the untrained twin.

    Rollout with an even residual stands beside as a line of its own that says it is invalid. Raises UsageError
    where the model has no recurrence, or no track lives for two frames.
    """
    source = subject.source
    if not isinstance(source, RecurrentSource):
        raise UsageError(f"{source.card.id}: no state that is carried from frame to frame")
    shape = (len(subject), subject.frames, subject.frames)
    tables = {name: np.full(shape, np.nan) for name in ("own", "twin", "rule", "twin_rule")}
    for place in range(len(subject)):
        batch = source.encode([subject.sample(place)])
        mine, other = source.reach(batch)[0], source.reach(batch, untrained=True)[0]
        for name, reach, part in (
            ("own", mine, "shares"),
            ("twin", other, "shares"),
            ("rule", mine, "halved"),
            ("twin_rule", other, "halved"),
        ):
            table = _mean_tracks(reach, part)
            if table is not None:
                count = len(table)
                tables[name][place, :count, :count] = table
    past = {name: _past(table) for name, table in tables.items()}
    if not np.isfinite(past["own"]).any():
        raise UsageError(f"{source.card.id}: no track lives for two frames in these clips")
    kind = "the untrained twin"
    findings = [Finding("share of a track made in earlier frames", "share", past["own"], past["twin"], kind)]
    findings += [
        Finding(f"share made {lag} frame{'s' * (lag > 1)} before", "share", _at(tables["own"], lag),
                _at(tables["twin"], lag), kind)
        for lag in range(1, subject.frames)
    ]  # fmt: skip
    invalid = "INVALID: the same by rollout with half residuals (fixed by the rule)"
    findings.append(Finding(invalid, "share", past["rule"], past["twin_rule"], kind))
    dims = ("sample", "frame", "source_frame")
    told = "mean over tracks of what each frame contributed to the row, as a share"
    product = dataset(
        {
            "share": (dims, tables["own"], told),
            "untrained": (dims, tables["twin"], f"{told}; the same network with random weights"),
            "half_residual": (dims, tables["rule"], "rollout with an even residual: not valid, shown beside"),
        },
        sample=subject.ids,
    )
    return Outcome(findings, {"temporal/recurrence": product})


def _transported(step: Carried) -> tuple[float, float, float, float]:
    """Means over a frame's tracks: mass, chance, agreement, overlap."""
    found = transport(step.attention, step.track_masks, step.query_masks)
    means = [float(mean_known(values)) for values in (found.own, found.agrees, found.overlap)]
    return means[0], found.chance if np.isfinite(means[0]) else float("nan"), means[1], means[2]


def _mean_tracks(reach: Sequence[Reach], part: str) -> NDArray[np.float64] | None:
    """(frame, source), the mean over tracks that are there; None without any track."""
    if not reach:
        return None
    return np.asarray(mean_known(np.stack([getattr(one, part) for one in reach]), 0))


def _past(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share on earlier frames, mean over the frames that have any before them: (sample,)."""
    earlier = np.tril(np.ones(table.shape[-2:], bool), -1)
    known = np.isfinite(table).all(-1) | np.isfinite(table).any(-1)
    total = np.where(earlier, np.nan_to_num(table), 0.0).sum(-1)
    return np.asarray(mean_known(np.where(known, total, np.nan)[:, 1:], 1))


def _at(table: NDArray[np.float64], lag: int) -> NDArray[np.float64]:
    """Share at one lag, mean over frames: (sample,)."""
    return np.asarray(mean_known(np.diagonal(table, -lag, 1, 2), 1))
