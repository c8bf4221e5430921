"""Analyses ``importance`` and ``deletion``: which frames the answer rests on.

The importance of a frame is the weight with which a tracker pools its frames, where the model has such a pooling;
else the mass that the map's row puts on it. That is a description; whether it is faithful is asked by taking the
most important frames away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.known import mean_known
from foveate.study.detection import Finding
from foveate.study.temporal_maps import clip_maps
from foveate.study.temporal_subject import PADDING, ClipSubject, Outcome, dataset, group_dims, there
from foveate.temporal.decision import PHASES, FrameCurve, phase_mass, phases, removal_order
from foveate.temporal.verdict import FEWEST

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.faithfulness.scoring import Scores
    from foveate.render.style import Picture


@dataclass(frozen=True, eq=False)
class Importance:
    """``shares (clip, frame cell)`` sum to 1 over the frames of a clip, NaN behind its end; ``what`` they are."""

    shares: NDArray[np.float64]
    what: str
    site: str
    layer: int


def frame_importance(subject: ClipSubject) -> Importance:
    """Pooling weights of the surest track, else the map's mass on each frame. Raises UsageError without either."""
    pooling = _pooling(subject)
    if pooling is None:
        maps = clip_maps(subject, sinks=True)
        if group_dims(subject.run.site(maps.site)):
            raise UsageError(
                f"{maps.site} attends within each frame: its rows do not weigh frames against each other",
                remedy="a site over space and time, or a pooling over frames, says which frames matter",
            )
        mass = np.where(there(subject), np.nan_to_num(np.nansum(maps.values, axis=(2, 3))), np.nan)
        found = Importance(mass, f"mass, {maps.row}", maps.site, maps.layer)
    else:
        name, site = pooling
        mass = np.full((len(subject), subject.frames), np.nan)
        for place, count in enumerate(subject.counts):
            mass[place, :count] = _weights(subject, name, site, place)[:count]
        found = Importance(mass, "weight of the pooling over frames", name, int(site["layer"].values[-1]))
    total = np.nansum(found.shares, axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return replace(found, shares=np.where(total > 0, found.shares / total, np.nan))


def importance(subject: ClipSubject) -> Outcome:
    """Shares of the thirds of a clip, each beside 1/3, and where the importance lies."""
    found, made = frame_importance(subject), Outcome()
    thirds = np.stack([phase_mass(row[None, :n])[0] for row, n in zip(found.shares, subject.counts, strict=True)])
    verdict = _verdict(subject, thirds)
    for number, name in enumerate(PHASES):
        told = f"{found.what}: {name} third (verdict: {verdict})"
        made.findings.append(
            Finding(told, "share", thirds[:, number], 1 / 3, "even importance", found.site, found.layer)
        )
    counts = np.array(subject.counts)[:, None]
    tables = {
        "share": (("sample", "frame"), subject.whole(found.shares), found.what),
        "lift": (
            ("sample", "frame"),
            subject.whole(found.shares * counts),
            "share over that of an even importance",
        ),
        "thirds": (("sample", "phase"), subject.whole(thirds), "share of each third of the clip"),
    }
    product = dataset(tables, phase=list(PHASES))
    made.products["temporal/importance"] = product.assign_attrs(
        site=found.site, layer=found.layer, verdict=verdict
    )
    made.figures["importance"] = _figure(subject, found)
    return made


def deletion(subject: ClipSubject) -> Outcome:
    """What the answer's score does while the most important frames freeze, beside random orders."""
    found, made = frame_importance(subject), Outcome()
    own, random = (np.full((len(subject), subject.frames + 1), np.nan) for _ in range(2))
    for place, count in enumerate(subject.counts):
        scores = _curves(subject, place, found.shares[place, :count])
        if scores is not None and count > 1:
            own[place, : count + 1], random[place, : count + 1] = scores.curves[0, :, 0, 0, 0]
    order = removal_order(found.shares, seed=subject.seed)
    areas = [
        np.array(
            [FrameCurve(order[i : i + 1], c[i : i + 1, : n + 1]).area[0] for i, n in enumerate(subject.counts)]
        )
        for c in (own, random)
    ]
    words = f"score while frames go by {found.what}, mean over the curve"
    made.findings.append(Finding(words, "score", areas[0], areas[1], "random orders", found.site, found.layer))
    dims = ("sample", "removed")
    tables = {
        "score": (dims, subject.whole(own), "score with the most important frames frozen"),
        "random": (dims, subject.whole(random), "mean over random orders"),
    }
    made.products["temporal/deletion"] = dataset(tables).assign_attrs(
        site=found.site, layer=found.layer, stands_in="the nearest kept frame"
    )
    made.figures["importance_deletion"] = _figure(subject, found, own, random)
    return made


def _pooling(subject: ClipSubject) -> tuple[str, xr.Dataset] | None:
    """A site whose keys are the frames themselves and whose only row pools them."""
    for name, site in subject.sites():
        query, key = (subject.run.tokens(name, axis, subject.positions[0]) for axis in ("query", "key"))
        frames = key.frame[key.kind != PADDING]
        one_each = bool((frames >= 0).all()) and np.unique(frames).size == frames.size > 1
        if one_each and (query.kind != PADDING).sum() == 1 and "frame" not in group_dims(site):
            return name, site
    return None


def _weights(subject: ClipSubject, name: str, site: xr.Dataset, place: int) -> NDArray[np.float64]:
    """Pooling weights by frame, mean over heads, of the surest track (else the mean over tracks)."""
    position = subject.positions[place]
    key = subject.run.tokens(name, "key", position)
    stored = site["attention"].isel(sample=position, layer=-1)
    table = np.asarray(stored.transpose(*group_dims(site), "head", "query", "key").values, np.float64)
    rows = table.mean(axis=-3)[..., 0, :].reshape(-1, table.shape[-1])
    answers = subject.run.predictions
    best = int(answers["object"].values[position, 0]) if "object" in answers else -1
    row = rows[best] if 0 <= best < len(rows) and len(rows) > 1 else mean_known(rows[np.nansum(rows, 1) > 0], 0)
    weights = np.full(subject.frames, np.nan)
    known = np.flatnonzero((key.kind != PADDING) & (key.frame < subject.frames))
    weights[key.frame[known]] = row[known]
    return weights


def _curves(subject: ClipSubject, place: int, shares: NDArray[np.float64]) -> Scores | None:
    """Frame deletion of the answer of one clip; None where it has no answer or no importance."""
    from foveate.faithfulness.frames import FRAME_DELETION, frame_curves
    from foveate.interfaces import Target
    from foveate.study.faithfulness_inputs import bind, usable_scales

    bound = bind(subject.source, [subject.sample(place)], Target())
    if bound is None or not np.isfinite(shares).any():
        return None
    rows = bound.objective.bound.rows
    answers = subject.run.predictions
    best = int(answers["object"].values[subject.positions[place], 0]) if "object" in answers else None
    chosen = next((i for i, row in enumerate(rows) if row.object == best), 0)
    scales = usable_scales(bound, ("probability",))[:1]
    protocol = replace(FRAME_DELETION.protocol, baselines=("freeze",), scales=scales, steps=shares.size)
    scoring = replace(FRAME_DELETION, protocol=protocol, seed=subject.seed)
    return frame_curves(bound.objective.take([chosen]), {"importance": shares[None]}, scoring)


def _by_video(subject: ClipSubject, table: NDArray[np.float64]) -> NDArray[np.float64]:
    names = np.array(subject.videos)
    return np.stack([mean_known(table[names == name], 0) for name in dict.fromkeys(subject.videos)])


def _verdict(subject: ClipSubject, thirds: NDArray[np.float64]) -> str:
    """early, middle, late, even or inconclusive; nothing is said below :data:`FEWEST` videos."""
    by_video = _by_video(subject, thirds)  # an importance of three frames has these thirds
    return phases(by_video, seed=subject.seed).verdict if len(by_video) >= FEWEST else "inconclusive"


def _figure(subject: ClipSubject, found: Importance, *curves: NDArray[np.float64]) -> Picture:
    """Importance over frames and, with ``curves`` (own, random), the deletion curves."""
    from foveate.render.clip_time import Band
    from foveate.render.clip_time import importance as draw

    lift = _by_video(subject, found.shares * np.array(subject.counts)[:, None])
    names = ("by importance", "random orders")
    deleted = [
        Band.over(name, _by_video(subject, curve), control=name != names[0], seed=subject.seed)
        for name, curve in zip(names, curves, strict=False)
        if len(set(subject.counts)) == 1  # steps of clips of different length are different shares
    ]
    shares = [Band.over(found.what, lift, seed=subject.seed)]
    videos = len(set(subject.videos))
    source = f"{subject.run.model_id} · {found.site}, layer {found.layer} · n = {videos}"
    return draw(shares, deleted, title="which frames matter", source=source)
