"""Analysis ``moving``: does the map lie on what moves, more than elsewhere, and more than a map of the centre?

Things that move are often in the middle, and so are maps. Each frame is held against its own region; the same map
shifted elsewhere, and a bump in the middle of the picture, are what it has to beat.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.stats.known import mean_known
from foveate.study.detection import Finding
from foveate.study.temporal_maps import ClipMaps, clip_maps
from foveate.study.temporal_subject import ClipSubject, Outcome, dataset
from foveate.study.temporal_tracks import moving_cells, origin_of
from foveate.temporal.enrichment import enrichment

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUMBERS = {"lift": ("lift", "ratio"), "auc": ("AUC", "1"), "nss": ("NSS", "standard deviations")}
SPREAD = 0.25
"""Standard deviation of the map of the centre, as a share of the grid's sides."""


def on_what_moves(subject: ClipSubject) -> Outcome:
    """Raises UsageError where nothing moves in any clip, or no row lies on the cells of frames."""
    maps, origin = clip_maps(subject, sinks=True), origin_of(subject)
    shape = (len(subject), subject.frames)
    own, shifted, middle = (np.full((*shape, len(NUMBERS)), np.nan) for _ in range(3))
    centre = centre_map(maps.shape)
    share = np.full(shape, np.nan)
    for place, count in enumerate(subject.counts):
        regions = moving_cells(subject, place, maps.grid, origin)
        for t in range(count):
            seed = subject.seed + place * subject.frames + t
            found = enrichment(maps.values[place, t], regions[t], seed=seed)
            own[place, t] = [getattr(found, name) for name in NUMBERS]
            shifted[place, t] = [getattr(found, f"shifted_{name}") for name in NUMBERS]
            share[place, t] = regions[t].mean()
            if np.isfinite(found.auc):
                there = np.where(np.isfinite(maps.values[place, t]), centre, np.nan)
                known = enrichment(there, regions[t], shifts=0)
                middle[place, t] = [getattr(known, name) for name in NUMBERS]
    if not np.isfinite(own).any():
        raise UsageError(
            f"nothing moves in these clips by their {origin}", remedy="capture clips in which something moves"
        )
    return _outcome(subject, maps, origin, share, own, shifted, middle)


def centre_map(shape: tuple[int, int]) -> NDArray[np.float64]:
    """A Gaussian bump in the middle of the cells, ``(y, x)``."""
    y, x = (np.exp(-((np.arange(n) - (n - 1) / 2) ** 2) / (2 * (SPREAD * n) ** 2)) for n in shape)
    return np.asarray(np.outer(y, x))


def _outcome(
    subject: ClipSubject,
    maps: ClipMaps,
    origin: str,
    share: NDArray[np.float64],
    own: NDArray[np.float64],
    shifted: NDArray[np.float64],
    middle: NDArray[np.float64],
) -> Outcome:
    """Means over the frames of a clip in which something moves."""
    made = Outcome()
    for number, (words, unit) in enumerate(NUMBERS.values()):
        for base, told in ((shifted, "the map shifted"), (middle, "map of the centre")):
            mean, null = (mean_known(table[..., number], 1) for table in (own, base))
            made.findings.append(
                Finding(f"{words} on what moves ({origin})", unit, mean, null, told, maps.site, maps.layer)
            )
    dims = ("sample", "frame")
    tables = {"share": (dims, subject.whole(share), f"share of the cells that move, by {origin}")}
    for number, name in enumerate(NUMBERS):
        for prefix, table, told in (
            ("", own, "of the map"),
            ("shifted_", shifted, "mean over shifted maps"),
            ("centre_", middle, "of a map of the centre"),
        ):
            tables[f"{prefix}{name}"] = (dims, subject.whole(table[..., number]), f"{NUMBERS[name][0]} {told}")
    made.products["temporal/moving"] = dataset(tables).assign_attrs(
        site=maps.site, layer=maps.layer, row=maps.row, moves=origin
    )
    return made
