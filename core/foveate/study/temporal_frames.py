"""Analysis ``frames``: how much of the attention of one frame lies on others, by site, layer and head.

A site with rows of the cells of every frame gives a frame by frame matrix. A site whose rows belong to no frame
(object queries, CLS, the pooling row of a tracker) gives the mass on each frame. Both stand beside rows that are
even over the keys they may read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.known import mean_known
from foveate.study.detection import Finding
from foveate.study.temporal_subject import ClipSubject, Outcome, Rows, dataset, refusal
from foveate.temporal.frame_mass import FrameMass, frame_mass, horizon, lag_profile, past_share

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.render.style import Picture

EVEN = "even rows"


@dataclass(frozen=True, eq=False)
class SiteMass:
    """Mass over frames at one site, float64, NaN where a clip has no such frame or row.

    ``mass`` and ``even`` are ``(clip, layer, head, query frame, key frame)``; where rows belong to no frame there
    is one query frame and ``of_rows`` is True. ``elsewhere`` ``(clip, layer, head, query frame)`` lies on keys
    without a frame, ``elsewhere_even`` is what even rows put there.
    """

    mass: NDArray[np.float64]
    even: NDArray[np.float64]
    elsewhere: NDArray[np.float64]
    elsewhere_even: NDArray[np.float64]
    of_rows: bool
    layers: list[int]
    heads: list[int]
    counts: list[int]

    @property
    def lift(self) -> NDArray[np.float64]:
        """Mass over that of even rows; NaN where those have none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.even > 0, self.mass / self.even, np.nan)

    def each(
        self, number: Callable[[NDArray[np.float64]], NDArray[np.float64]], table: str
    ) -> NDArray[np.float64]:
        """``number`` of every clip's own matrix, cut to the frames that it has: ``(clip, ...)``."""
        whole = getattr(self, table)
        cut = [whole[i][..., : 1 if self.of_rows else n, :n] for i, n in enumerate(self.counts)]
        return np.stack([number(one) for one in cut])


def frames(subject: ClipSubject) -> Outcome:
    """Mass between frames at every site that reads more than one. Raises UsageError where there is none."""
    made = Outcome()
    for name, site in subject.sites():
        why = refusal(name, site, subject.run.tokens(name, "key", subject.positions[0]))
        if why:
            made.left_out[name] = why
            continue
        found = site_mass(subject, name, site)
        made.findings += _of_rows(name, found) if found.of_rows else _between(name, found)
        made.products[f"temporal/frames/{name}"] = _product(subject, found)
        if not found.of_rows:
            made.figures[f"frames_{name}"] = _figure(subject, name, found)
    if not made.findings:
        raise UsageError(
            "; ".join(made.left_out.values()),
            remedy="mass between frames is defined for space-time and temporal rows",
        )
    return made


def site_mass(subject: ClipSubject, name: str, site: xr.Dataset) -> SiteMass:
    """Mass over frames of every clip, layer and head; the mean over tracks where a site has rows of each."""
    layers, heads = ([int(v) for v in site[axis].values] for axis in ("layer", "head"))
    query = subject.run.tokens(name, "query", subject.positions[0])
    of_rows = bool((query.frame < 0).all())
    down = 1 if of_rows else subject.frames
    shape = (len(subject), len(layers), len(heads), down, subject.frames)
    mass, even = np.full(shape, np.nan), np.full(shape, np.nan)
    elsewhere, elsewhere_even = np.full(shape[:-1], np.nan), np.full(shape[:-1], np.nan)
    for place, layer, head in np.ndindex(shape[:3]):
        count = subject.counts[place]
        own = [_masses(rows, count, of_rows) for rows in subject.rows(name, site, place, layer, head)]
        if own:
            at = (place, layer, head, slice(min(down, count)))
            mass[(*at, slice(count))] = mean_known([m.mass for m, _ in own], 0)
            even[(*at, slice(count))] = mean_known([e.mass for _, e in own], 0)
            elsewhere[at] = mean_known([m.elsewhere for m, _ in own], 0)
            elsewhere_even[at] = mean_known([e.elsewhere for _, e in own], 0)
    return SiteMass(mass, even, elsewhere, elsewhere_even, of_rows, layers, heads, subject.counts)


def _masses(rows: Rows, count: int, of_rows: bool) -> tuple[FrameMass, FrameMass]:
    """Of the rows and of even rows; only keys of the clip's frames, or of none, are there."""
    query = np.zeros_like(rows.query_frame) if of_rows else rows.query_frame
    made = [frame_mass(table, query, rows.key_frame, count) for table in (rows.weights, rows.even)]
    if of_rows:
        made = [FrameMass(m.mass[..., :1, :], m.uniform, m.elsewhere[..., :1]) for m in made]
    return made[0], made[1]


def _between(name: str, found: SiteMass) -> list[Finding]:
    """Numbers of a frame by frame matrix, means over heads."""
    numbers: dict[str, tuple[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
        "mass on other frames": ("share", _cross),
        "horizon": ("frames", horizon),
        "share of the past in it": ("share", past_share),
        "mass one frame back": ("share", partial(_at_lag, lag=-1)),
        "mass one frame ahead": ("share", partial(_at_lag, lag=1)),
    }
    measured = {
        what: (unit, found.each(number, "mass"), found.each(number, "even"))
        for what, (unit, number) in numbers.items()
    }
    return _findings(name, found, {**measured, **_elsewhere(found)})


def _of_rows(name: str, found: SiteMass) -> list[Finding]:
    """Numbers of rows without a frame, means over heads."""
    own, even = (found.each(_effective, table) for table in ("mass", "even"))
    return _findings(name, found, {"frames read, effective number": ("frames", own, even), **_elsewhere(found)})


def _elsewhere(found: SiteMass) -> dict[str, tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Mass on tokens without a frame, where the site has any."""
    if not np.nan_to_num(found.elsewhere_even).any():
        return {}
    own, even = (mean_known(table, -1) for table in (found.elsewhere, found.elsewhere_even))
    return {"mass on tokens of no frame": ("share", own, even)}


def _findings(
    name: str, found: SiteMass, quantities: dict[str, tuple[str, NDArray[np.float64], NDArray[np.float64]]]
) -> list[Finding]:
    return [
        Finding(quantity, unit, mean_known(own, 2)[:, i], mean_known(even, 2)[:, i], EVEN, name, layer)
        for quantity, (unit, own, even) in quantities.items()
        for i, layer in enumerate(found.layers)
    ]


def _cross(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the mass on frames that lies on other frames, mean over query frames."""
    total = mass.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        own = np.diagonal(mass, axis1=-2, axis2=-1) / np.where(total > 0, total, np.nan)
    return np.asarray(mean_known(1.0 - own, -1))


def _at_lag(mass: NDArray[np.float64], lag: int) -> NDArray[np.float64]:
    if mass.shape[-1] < 2:
        return np.full(mass.shape[:-2], np.nan)
    lags, profile = lag_profile(mass)
    return np.asarray(profile[..., int(np.flatnonzero(lags == lag)[0])])


def _effective(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of the Shannon entropy of the mass ``(..., 1, frame)``: how many frames it could be even over."""
    filled = np.nan_to_num(mass[..., 0, :])
    total = filled.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = filled / np.where(total > 0, total, np.nan)
        entropy = -np.where(share > 0, share * np.log(share), 0.0 * share).sum(axis=-1)
    return np.asarray(np.exp(entropy))


def _product(subject: ClipSubject, found: SiteMass) -> xr.Dataset:
    """Everything by layer and head."""
    lead = ("sample", "layer", "head")
    tables: dict[str, tuple[tuple[str, ...], NDArray[np.float64], str]] = {}
    down: tuple[str, ...] = () if found.of_rows else ("query_frame",)
    told_of = {
        "mass": (found.mass, "mass that rows put on each frame"),
        "even": (found.even, "the same of even rows"),
        "lift": (found.lift, "mass over that of even rows"),
    }
    for key, (table, told) in told_of.items():
        tables[key] = ((*lead, *down, "key_frame"), table[..., 0, :] if found.of_rows else table, told)
    elsewhere = found.elsewhere[..., 0] if found.of_rows else found.elsewhere
    tables["elsewhere"] = ((*lead, *down), elsewhere, "mass on tokens of no frame")
    coords: dict[str, object] = {"layer": found.layers, "head": found.heads}
    if not found.of_rows:
        told = "mean mass at each lag, key frame minus query frame"
        tables["lag_mass"] = ((*lead, "lag"), lag_profile(found.mass)[1], told)
        tables["lag_even"] = ((*lead, "lag"), lag_profile(found.even)[1], "the same of even rows")
        tables["horizon"] = (lead, found.each(horizon, "mass"), "mean distance of the mass, in frames")
        tables["past_share"] = (lead, found.each(past_share, "mass"), "share of the mass on other frames before")
        tables["cross"] = (lead, found.each(_cross, "mass"), "share of the mass on other frames")
        coords["lag"] = lag_profile(found.mass)[0]
    placed = {key: (dims, subject.whole(values), told) for key, (dims, values, told) in tables.items()}
    return dataset(placed, **coords)


def _figure(subject: ClipSubject, name: str, found: SiteMass) -> Picture:
    """Lift of every layer, mean over heads and videos."""
    from foveate.render.clip_time import frame_matrices

    shown = mean_known(found.lift, (0, 2))
    tables = {f"layer {layer}": shown[i] for i, layer in enumerate(found.layers)}
    videos = len(set(subject.videos))
    return frame_matrices(tables, title=f"{name}: frame to frame", source=subject.run.model_id, n=videos)
