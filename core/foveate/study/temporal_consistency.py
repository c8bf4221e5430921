"""Analysis ``consistency``: do the maps of consecutive frames resemble each other more than other videos do?

Compared where they are, and with the motion taken out: along the surest track, or along optical flow where the
model has no tracks. Only the excess over other videos counts (:mod:`foveate.temporal.consistency` says why).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import FoveateError, UsageError
from foveate.geometry import CellGrid, regrid
from foveate.stats.agreement import JS_DIVERGENCE, SPEARMAN
from foveate.study.detection import Finding
from foveate.study.temporal_maps import ClipMaps, clip_maps
from foveate.study.temporal_subject import ClipSubject, Outcome, dataset
from foveate.study.temporal_tracks import has_tracks, path_of
from foveate.temporal.consistency import Consistency, compared, consistency, displaced, measures, warped
from foveate.temporal.enrichment import flow

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

NULL = "next frame of other videos"
UNITS = {
    JS_DIVERGENCE.name: ("Jensen-Shannon divergence", "bit"),
    SPEARMAN.name: ("Spearman's rank correlation", "1"),
    "emd": ("earth mover's distance", "diagonals"),
    "pearson": ("Pearson's r (warning: shared sinks and places alone raise it)", "1"),
}
COMPENSATED = (JS_DIVERGENCE, SPEARMAN)


def agree(subject: ClipSubject) -> Outcome:
    """Raises UsageError where no row lies on cells of frames, or there is only one video to compare."""
    if len(set(subject.videos)) < 2:
        raise UsageError("one video has no other to be compared with", remedy="analyse a run of several videos")
    maps = clip_maps(subject)
    made = Outcome()
    found = {
        measure.name: consistency(maps.flat, measure, videos=subject.videos, seed=subject.seed)
        for measure in measures(maps.shape)
    }
    what = {name: UNITS[name][0] for name in found}
    try:
        along, first, second = _compensated(subject, maps)
        for measure in COMPENSATED:
            key = f"{measure.name}_moved"
            found[key] = compared(first, second, measure, videos=subject.videos, seed=subject.seed)
            what[key] = f"{UNITS[measure.name][0]}, {along}"
    except FoveateError as error:
        made.left_out["motion taken out"] = error.message
    for name, one in found.items():
        unit = UNITS[name.removesuffix("_moved")][1]
        quantity = f"consecutive frames: {what[name]}"
        made.findings.append(Finding(quantity, unit, one.own, one.null, NULL, maps.site, maps.layer))
    removed = Finding("mass on sinks, taken out first", "share", maps.removed, site=maps.site, layer=maps.layer)
    made.findings.append(removed)
    made.products["temporal/consistency"] = _product(subject, found, what).assign_attrs(
        site=maps.site, layer=maps.layer, row=maps.row
    )
    return made


def _compensated(subject: ClipSubject, maps: ClipMaps) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """How, and maps ``(clip, step, cell)`` now and one step later with the motion taken out."""
    if has_tracks(subject):
        moved = np.full_like(maps.values, np.nan)
        for place, count in enumerate(subject.counts):
            path = path_of(subject, place, maps.grid)
            moved[place, :count] = displaced(maps.values[place, :count], path.centre, path.size)
        flat = moved.reshape(*moved.shape[:2], -1)
        return "moved back along the track", flat[:, :-1], flat[:, 1:]
    later = np.full_like(maps.values[:, 1:], np.nan)
    for place, count in enumerate(subject.counts):
        if count > 1:
            later[place, : count - 1] = warped(maps.values[place, 1:count], _flow(subject, place, maps.grid))
    return "moved back along optical flow", maps.flat[:, :-1], later.reshape(*later.shape[:2], -1)


def _flow(subject: ClipSubject, place: int, grid: CellGrid) -> NDArray[np.float64]:
    """Flow from the first frame of each frame cell to that of the next, in cells ``(step, 2, y, x)``."""
    position = subject.positions[place]
    members, pixels = subject.run.frame_cells(position), subject.sample(place).pixels
    first = [int(np.flatnonzero(members == cell)[0]) for cell in range(subject.counts[place])]
    height, width = pixels.shape[1:3]
    cells = subject.run.geometry(position).grid_to_original(grid)
    drawn = CellGrid.regular(height, width, height=height, width=width)
    laid = np.nan_to_num(regrid(flow(pixels[first]), drawn, cells))
    step = np.array([np.diff(cells.y).mean(), np.diff(cells.x).mean()])
    return np.asarray(laid / step[:, None, None])


def _product(subject: ClipSubject, found: dict[str, Consistency], what: dict[str, str]) -> xr.Dataset:
    pairs = np.stack([one.pairs for one in found.values()], axis=1)
    own, null, excess = (
        np.stack([getattr(one, part) for one in found.values()], axis=1) for part in ("own", "null", "excess")
    )
    lead = ("sample", "measure")
    tables = {
        "pairs": ((*lead, "step"), subject.whole(pairs), "frame cell t against t + 1"),
        "own": (lead, subject.whole(own), "mean over steps"),
        "null": (lead, subject.whole(null), f"mean against the {NULL}"),
        "excess": (lead, subject.whole(excess), "how much closer than that; positive is closer on every measure"),
    }
    return dataset(tables, measure=list(found), measure_name=("measure", list(what.values())))
