"""Edges of attention between frames: cut, to see what they are worth, and weighed, as a naive rule would.

Knockouts of one clip (:mod:`foveate.capture.interventions`):

``between``   every edge whose query and key lie in different frames
``within``    the sham: as many edges inside frames, or all there are (never a token's edge to itself)

and where frames have too few edges for that (four frames attended to at once have three edges between for one
within):

``matched``   only as many edges between frames as ``within`` could cut
``anywhere``  as many edges as ``between``, drawn from all

Draws follow from a seed. Tokens without a frame (CLS, queries) keep all they read, and may still carry something
over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.capture.intervening import intervene
from foveate.capture.interventions import Knockout
from foveate.capture.trace import Trace, trace
from foveate.errors import FoveateError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, CallKey, CallLabels, Outputs

CUTS = ("between", "within", "matched", "anywhere")
MASS_RULE = 0.6
"""A rule that is often proposed: more than this share of attention on other frames means that motion decides."""
ROWS = 256
MOST_EDGES = 2**24
"""Of one call; larger sites are left out of the cuts."""


@dataclass(frozen=True, eq=False)
class SiteEdges:
    """Edges of one site, bool ``(query, key)``; ``copies`` is calls x heads x groups that have them."""

    site: str
    between: NDArray[np.bool_]
    within: NDArray[np.bool_]
    copies: int


@dataclass(frozen=True, eq=False)
class Edges:
    """All sites with edges between or within frames.

    ``left_out`` says why others have none. ``mass`` is the mean attention on other frames of the rows that can
    reach them, ``uniform`` what uniform rows give; NaN where there is no such row.
    """

    sites: tuple[SiteEdges, ...]
    mass: float
    uniform: float
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int]:
        """Edges between and within frames, all calls and heads."""
        return (
            sum(int(one.between.sum()) * one.copies for one in self.sites),
            sum(int(one.within.sum()) * one.copies for one in self.sites),
        )


NO_EDGES = Edges((), float("nan"), float("nan"))
"""Nothing looked at."""


@dataclass(frozen=True, eq=False)
class Cut:
    """One knockout and how many edges it cuts."""

    name: str
    interventions: tuple[Knockout, ...]
    edges: int


def frame_edges(source: AttentionSource, batch: Batch) -> Edges:
    """Which edges of a batch of one clip lie between frames and which within, and how much attention they get."""
    with torch.no_grad():
        seen = trace(source, batch)
    calls: dict[str, list[CallKey]] = {}
    for call in seen.records:
        calls.setdefault(call.site, []).append(call)
    sites, left_out, shares, evens = [], dict[str, str](), [], []
    for site, numbers in calls.items():
        try:
            found = _site_edges(source, seen, site, numbers)
        except _LeftOutError as error:
            left_out[site] = error.message
            continue
        if found is None:
            left_out[site] = "its queries or keys have no frame"
            continue
        sites.append(found)
        if found.between.any():
            reach = np.asarray(found.between.any(1))
            shares += [_mass(seen, call, found.between, reach) for call in numbers]
            evens += [float(found.between[reach].mean())] * len(numbers)
    return Edges(tuple(sites), _mean(shares), _mean(evens), left_out)


def cuts(edges: Edges, seed: int) -> list[Cut]:
    """The knockouts that these edges allow: none where no edge lies between frames."""
    between, within = edges.counts
    if not between:
        return []
    made = [_cut("between", edges, 1.0, seed)]
    if within:
        made.append(_cut("within", edges, min(1.0, between / within), seed))
        if within < between:
            made.append(_cut("matched", edges, within / between, seed))
            made.append(_cut("anywhere", edges, between / (between + within), seed))
    return made


def run_cut(source: AttentionSource, batch: Batch, cut: Cut) -> Outputs:
    """The model's outputs under one knockout. Raises CaptureError where a row would keep no key."""
    with torch.no_grad(), intervene(source, cut.interventions):
        return source.forward(batch)


class _LeftOutError(FoveateError):
    """A site whose edges are not cut, and why."""


def _site_edges(source: AttentionSource, seen: Trace, site: str, calls: Sequence[CallKey]) -> SiteEdges | None:
    declared = next(one for one in source.sites if one.id == site)
    if declared.normalised_over != "key" or declared.form != "dense":
        raise _LeftOutError(f"{declared.form}, normalised over its {declared.normalised_over}s")
    found, copies = None, 0
    for call in calls:
        labels, shape = seen.labels(call), seen.record(call).shape
        if len(labels.query) * len(labels.key) > MOST_EDGES:
            raise _LeftOutError(f"more than {MOST_EDGES:,} edges a call")
        pair = _pair(labels)
        if found is not None and any(not np.array_equal(a, b) for a, b in zip(found, pair, strict=True)):
            raise _LeftOutError("its calls have different tokens")
        found = pair
        copies += shape[0] * shape[1]
    if found is None or not (found[0].any() or found[1].any()):
        return None
    return SiteEdges(site, *found, copies)


def _pair(labels: CallLabels) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Edges between frames and within a frame (a token's edge to itself is neither)."""
    query, key = labels.query.frame[:, None], labels.key.frame[None, :]
    known = (query >= 0) & (key >= 0)
    same = known & (query == key)
    if any(name == "frame" for name, _ in labels.leading):  # one call (or group) a frame: nothing leaves it
        known, same = np.zeros_like(known), np.ones_like(same)
    if len(labels.query) == len(labels.key):
        same &= ~np.eye(len(labels.query), dtype=bool)
    return known & (query != key), same


def _mass(seen: Trace, call: CallKey, between: NDArray[np.bool_], reach: NDArray[np.bool_]) -> float:
    """Mean over rows that reach other frames (and samples, heads) of their attention on other frames."""
    record = seen.record(call)
    rows = np.flatnonzero(reach)
    total = 0.0
    for start in range(0, rows.size, ROWS):
        some = rows[start : start + ROWS]
        weights = record.rows([int(i) for i in some])
        chosen = torch.from_numpy(between[some]).to(weights.device)
        total += float((weights * chosen).sum(-1).mean((0, 1)).sum())
    return total / rows.size


def _cut(name: str, edges: Edges, share: float, seed: int) -> Cut:
    rng = np.random.default_rng([seed, CUTS.index(name)])
    knockouts, count = [], 0
    for one in edges.sites:
        pool = {"within": one.within, "anywhere": one.within | one.between}.get(name, one.between)
        mask = _drawn(pool, share, rng)
        if mask.any():
            knockouts.append(Knockout(one.site, mask=mask[None, None]))
            count += int(mask.sum()) * one.copies
    return Cut(name, tuple(knockouts), count)


def _drawn(pool: NDArray[np.bool_], share: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """A share of the edges, spread evenly over rows as far as whole numbers allow."""
    if share >= 1.0:
        return pool
    wanted = pool.sum(1) * share
    take = np.floor(wanted).astype(np.int64)
    take += rng.random(len(pool)) < wanted - take
    order = np.where(pool, rng.random(pool.shape), 2.0).argsort(1).argsort(1)
    return np.asarray(pool & (order < take[:, None]))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
