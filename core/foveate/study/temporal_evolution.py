"""Analysis ``evolution``: how the map of each frame changes over the clip, in the clip's time and the track's own.

Numbers of one frame's map (how spread it is, how much of it lies on the track), and how much the map flickers for
each unit of change that was there to see in the pictures. Jumps are change points of the series of each clip.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.geometry import CellGrid, regrid
from foveate.stats.known import mean_known
from foveate.study.detection import Finding
from foveate.study.temporal_maps import ClipMaps, clip_maps
from foveate.study.temporal_subject import ClipSubject, Outcome, dataset
from foveate.study.temporal_tracks import has_tracks, track_masks
from foveate.temporal.evolution import LEVEL, Change, aligned, change_points, flicker

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.render.style import Picture

ENTROPY = "entropy of the map in a frame"
ON_TRACK = "mass on the track in a frame"
FLICKER = "flicker"
FEWEST_FRAMES = 8
"""Known frames below which no jump could be significant: 2 of 20 orders split six values as well as two threes."""


def evolution(subject: ClipSubject) -> Outcome:
    """Raises UsageError where no row lies on the cells of frames."""
    maps, made = clip_maps(subject, sinks=True), Outcome()
    series = {ENTROPY: spread(maps)}
    births = np.zeros(len(subject), np.int64)
    if has_tracks(subject):
        series[ON_TRACK], area, births = _on_track(subject, maps)
        values, even = mean_known(series[ON_TRACK], 1), mean_known(area, 1)
        made.findings.append(Finding(ON_TRACK, "share", values, even, "share of the area", maps.site, maps.layer))
    made.findings.append(
        Finding(
            ENTROPY, "share of the largest", mean_known(series[ENTROPY], 1), 1.0, "even map", maps.site, maps.layer
        )
    )
    changes = {name: [change_points(row, seed=subject.seed) for row in table] for name, table in series.items()}
    for name, found in changes.items():
        share = np.array([float(bool(one)) for one in found])
        share[np.isfinite(series[name]).sum(axis=1) < FEWEST_FRAMES] = np.nan
        told = f"clips with a jump in the {name}"
        made.findings.append(Finding(told, "share", share, LEVEL, "level of the test", maps.site, maps.layer))
    own, relative = _flicker(subject, maps)
    made.findings.append(_flicker_finding(subject, maps, own))
    jumps = {name: np.array([len(one) for one in found], np.float64) for name, found in changes.items()}
    made.products["temporal/evolution"] = _product(subject, maps, series, births, jumps, own, relative)
    made.figures["evolution"] = _figure(subject, maps, series[ENTROPY], changes[ENTROPY])
    return made


def spread(maps: ClipMaps) -> NDArray[np.float64]:
    """Shannon entropy of each frame's map over ln of its known cells, ``(clip, frame)``; 1 is even."""
    flat = maps.flat
    known = np.isfinite(flat)
    filled = np.where(known, np.maximum(flat, 0.0), 0.0)
    total = filled.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = filled / np.where(total > 0, total, np.nan)
        entropy = -np.where(share > 0, share * np.log(share), 0.0 * share).sum(axis=-1)
        return np.asarray(np.where(known.sum(-1) > 1, entropy / np.log(known.sum(-1)), np.nan))


def _on_track(
    subject: ClipSubject, maps: ClipMaps
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Share of each frame's map on the surest track, the track's share of the cells, its first frame cell."""
    on, area = (np.full((len(subject), subject.frames), np.nan) for _ in range(2))
    births = np.zeros(len(subject), np.int64)
    for place, count in enumerate(subject.counts):
        position = subject.positions[place]
        cells = subject.run.geometry(position).grid_to_original(maps.grid)
        covered = regrid(np.nan_to_num(track_masks(subject, place, 0)), subject.run.track_canvas(position), cells)
        members = subject.run.frame_cells(position)
        inside = np.stack([np.nan_to_num(covered[members == cell]).mean(axis=0) for cell in range(count)])
        values = maps.values[place, :count]
        there = inside.sum(axis=(1, 2)) > 0
        total = np.nansum(values, axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):
            on[place, :count] = np.where(there, np.nansum(values * inside, axis=(1, 2)) / total, np.nan)
        area[place, :count] = np.where(there, inside.mean(axis=(1, 2)), np.nan)
        births[place] = int(np.flatnonzero(there)[0]) if there.any() else 0
    return on, area, births


def _flicker(subject: ClipSubject, maps: ClipMaps) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Total variation between consecutive maps ``(clip, step)``, and the same over the pictures' change."""
    own, relative = (np.full((len(subject), subject.frames - 1), np.nan) for _ in range(2))
    for place, count in enumerate(subject.counts):
        if count < 2:
            continue
        sample, position = subject.sample(place), subject.positions[place]
        height, width = sample.pixels.shape[1:3]
        cells = subject.run.geometry(position).grid_to_original(maps.grid)
        pixels = CellGrid.regular(height, width, height=height, width=width)
        shown = np.nan_to_num(regrid(sample.pixels.astype(np.float64).mean(axis=-1), pixels, cells))
        members = subject.run.frame_cells(position)
        pictures = np.stack([shown[members == cell].mean(axis=0) for cell in range(count)])
        flat = maps.flat[place, :count]
        own[place, : count - 1] = flicker(flat)
        relative[place, : count - 1] = flicker(flat, pictures.reshape(count, -1))
    return own, relative


def _flicker_finding(subject: ClipSubject, maps: ClipMaps, own: NDArray[np.float64]) -> Finding:
    """Beside the change from a frame to the next frame of other videos."""
    null = np.full(len(subject), np.nan)
    names = np.array(subject.videos)
    for place in range(len(subject)):
        others = np.flatnonzero(names != names[place])
        pairs = [np.stack([maps.flat[place, t], maps.flat[j, t + 1]]) for j in others for t in range(own.shape[1])]
        if pairs:
            null[place] = mean_known(flicker(np.stack(pairs)))
    told = f"{FLICKER}: change of the map from frame to frame"
    return Finding(told, "share", mean_known(own, 1), null, "to frames of other videos", maps.site, maps.layer)


def _product(
    subject: ClipSubject,
    maps: ClipMaps,
    series: dict[str, NDArray[np.float64]],
    births: NDArray[np.int64],
    jumps: dict[str, NDArray[np.float64]],
    own: NDArray[np.float64],
    relative: NDArray[np.float64],
) -> xr.Dataset:
    table = np.stack(list(series.values()), axis=1)
    own_time = np.stack([aligned(one, births, subject.frames) for one in series.values()], axis=1)
    tables = {
        "value": (("sample", "metric", "frame"), subject.whole(table), "number of each frame's map"),
        "by_age": (("sample", "metric", "age"), subject.whole(own_time), "by frames since the track was born"),
        "jumps": (("sample", "metric"), subject.whole(np.stack(list(jumps.values()), 1)), "change points"),
        "flicker": (("sample", "step"), subject.whole(own), "total variation to the next frame's map"),
        "flicker_relative": (("sample", "step"), subject.whole(relative), "over the change of the pictures"),
    }
    return dataset(tables, metric=list(series)).assign_attrs(site=maps.site, layer=maps.layer, row=maps.row)


def _figure(
    subject: ClipSubject, maps: ClipMaps, values: NDArray[np.float64], changes: list[tuple[Change, ...]]
) -> Picture:
    """Spread over frames, mean over videos; jumps of a single clip are drawn where there is one clip."""
    from foveate.render.clip_time import Band
    from foveate.render.clip_time import evolution as draw

    band = Band.over(ENTROPY, values, seed=subject.seed)
    places = [float(one.frame) for one in changes[0]] if len(changes) == 1 else []
    source = f"{subject.run.model_id} · {maps.site}, layer {maps.layer}, {maps.row} · n = {len(subject)} clips"
    return draw([band], title="the map over time", source=source, unit="entropy / largest", changes=places)
