"""Pictures of runs of clips for ``foveate plot``: where in time a row looks, frame to frame, film strips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import Renderer
from foveate.render import clip_run
from foveate.render import selection as pick
from foveate.render.clip_time import film_strip, frame_matrices, ribbon
from foveate.temporal.frame_mass import frame_mass

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.run import Run


class Ribbon(Renderer):
    """Mass of a row on each frame, layer by layer, below the frames."""

    name: ClassVar[str] = "ribbon"
    draws: ClassVar[str] = "one clip: how much of a row lies on each frame, layer by layer"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, site, head, track, query. The scale is always lift."""
        given = pick.options_for(("sample", "site", "head", "track", "query"), options, self.name)
        run, position = _clip(selection, given.pop("sample", None))
        site, dataset = clip_run.site_of(run, given.pop("site", None))
        layers = [int(number) for number in dataset["layer"].values]
        rows = [clip_run.attention_over_time(run, position, site=site, layer=n, **given) for n in layers]
        lifts = np.stack([_lift(row) for row in rows])
        frames = _one_a_cell(run, position)
        what = rows[-1].rule.what.replace(f", layer {layers[-1]}", "")
        return ribbon(
            lifts,
            [f"layer {number}" for number in layers],
            frames,
            title=f"{pick.title_of(run, position)}: where in time it looks",
            source=f"{run.model_id} · {what} · K = {rows[-1].rule.keys}",
            times=_times(run, position),
        ).save(out)


class Frames(Renderer):
    """Mass between frames, layer by layer, mean over clips."""

    name: ClassVar[str] = "frames"
    draws: ClassVar[str] = "all clips: attention from each frame to each frame, against uniform attention"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: site, head. Needs rows of all queries of a site over space and time."""
        given = pick.options_for(("site", "head"), options, self.name)
        run = _run(selection)
        site = given.get("site") or _site_of_frames(run)
        dataset = run.site(site)
        tables, used = _matrices(run, site, given.get("head", "mean"))
        layers = [int(number) for number in dataset["layer"].values]
        found = {f"layer {n}": table for n, table in zip(layers, tables, strict=True)}
        return frame_matrices(
            found,
            title=f"{run.model_id}: attention from frame to frame",
            source=f"{site} · K = {pick.count_keys(run.tokens(site, 'key', used[0]))}",
            n=len(used),
        ).save(out)


class Strip(Renderer):
    """Frames of a clip with the map of a row, and the tracks."""

    name: ClassVar[str] = "strip"
    draws: ClassVar[str] = "one clip: its frames with a track's map and outline, on one scale"

    def render(self, selection: Any, *, out: Path, scale: str = "lift", **options: Any) -> Path:
        """Options: sample, track, site, layer, head, query, method, target."""
        names = ("sample", "track", "site", "layer", "head", "query", "method", "target")
        given = pick.options_for(names, options, self.name)
        run, position = _clip(selection, given.pop("sample", None))
        tracks = clip_run.tracks_of(run, position, given.get("track"))
        target, method = int(given.pop("target", 0)), given.pop("method", None)
        if method is not None:
            chosen = clip_run.attribution_over_time(run, position, method, target=target, track=given.get("track"))
        else:
            chosen = clip_run.attention_over_time(run, position, **given)
        overlay = clip_run.overlay_of(run, position, chosen, tracks, scale=scale)
        labels = clip_run.frame_labels(run, position)
        title, source = pick.title_of(run, position), str(chosen.rule)
        frames = list(clip_run.shown_frames(run, position))
        return film_strip(frames, overlay, title=title, source=source, labels=labels).save(out)


def _run(selection: Any) -> Run:
    run: Run = selection
    if run.media != "clip":
        raise UsageError(f"{run.path}: a run of images has no frames", remedy="foveate plot --list")
    run.check_captured()
    return run


def _clip(selection: Any, sample: Any) -> tuple[Run, int]:
    run = _run(selection)
    return run, pick.position_of(run, int(run.ok[0]) if sample is None else sample)


def _lift(row: clip_run.Chosen) -> NDArray[np.float64]:
    """Mass over what a uniform row gives, (frame cell,); NaN where the row does not exist in that frame."""
    there = np.isfinite(row.laid.values).any(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(there & (row.uniform > 0), row.mass / row.uniform, np.nan))


def _one_a_cell(run: Run, position: int) -> list[NDArray[np.uint8]]:
    """The first frame of each frame cell."""
    cells = run.frame_cells(position)
    first = {int(cell): i for i, cell in reversed(list(enumerate(cells)))}
    return [frame for i, frame in enumerate(clip_run.shown_frames(run, position)) if first[int(cells[i])] == i]


def _times(run: Run, position: int) -> list[float]:
    cells, times = run.frame_cells(position), run.times(position)
    return [float(times[cells == cell][0]) for cell in range(int(cells.max()) + 1)]


def _site_of_frames(run: Run) -> str:
    """A site that keeps rows of patches of several frames."""
    for name in run.site_ids:
        site = run.site(name)
        if "attention" in site and "query_frame" in site and site["query_frame"].values.max() > 0:
            return name
    raise UsageError(
        f"{run.path}: no site keeps the rows of all frames",
        remedy="capture a model with attention over space and time again with --rows all (or use ribbon)",
    )


def _matrices(run: Run, site: str, head: pick.Head) -> tuple[NDArray[np.float64], list[int]]:
    """Lift between frames, ``(layer, frame, frame)``, mean over clips; and the clips."""
    dataset = run.site(site)
    total, used = [], []
    for position in map(int, run.ok):
        query, key = run.tokens(site, "query", position), run.tokens(site, "key", position)
        rows = np.asarray(dataset["attention"].isel(sample=position).values, np.float64)
        if rows.ndim != 4:
            raise UsageError(
                f"site {site}: its rows lie within frames", remedy="choose a site over space and time"
            )
        rows = rows.mean(axis=1) if head == "mean" else rows[:, int(head)]
        frames = int(max(query.frame.max(), key.frame.max())) + 1
        total.append(frame_mass(rows, query.frame, key.frame, frames).lift)
        used.append(position)
    return np.asarray(np.nanmean(total, axis=0)), used
