"""From a run of clips to what is drawn over their frames: which map, which tracks, which words.

A map over time is one kept attention row laid on every frame cell, or a stored attribution. Sites with a frame
axis (trackers, per-frame segmenters) have a row a frame; sites over the whole clip have one row whose keys know
their frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.records import EDGES
from foveate.errors import StoreError, UsageError
from foveate.geometry import CellGrid, tokens_to_cells
from foveate.interfaces import TOKEN_KINDS
from foveate.render import selection as pick
from foveate.render.clip_overlay import ClipMap, Overlay, TrackMarks
from foveate.render.panel import Rule
from foveate.render.scale import Scale, check_name, shared

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.interfaces import TokenAxis

BLOCK = 16
"""Frames that are decoded at once."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """A map over the frames of one clip, with the words that say what it is.

    ``mass`` ``(frame cell,)`` is what the row puts on each frame, ``uniform`` what a uniform row would.
    """

    laid: ClipMap
    rule: Rule
    mass: NDArray[np.float64]
    uniform: NDArray[np.float64]


def shown_frames(run: Run, position: int) -> Iterator[NDArray[np.uint8]]:
    """The frames of a clip that the model read, uint8 ``(y, x, 3)``, decoded in blocks and never all at once."""
    wanted = run.frame_index(position)
    for start in range(0, int(wanted.max(initial=-1)) + 1, BLOCK):
        inside = wanted[(wanted >= start) & (wanted < start + BLOCK)]
        if inside.size:
            block = run.load_frames(position, start, int(inside.max()) + 1).pixels
            yield from (block[i - start] for i in inside)


def frame_labels(run: Run, position: int) -> list[str]:
    """The time of each frame that the model read, or its number where the clip has no clock."""
    pairs = zip(run.times(position), run.frame_index(position), strict=True)
    return [f"{time:.2f} s" if time == time else f"frame {number}" for time, number in pairs]


def tracks_of(run: Run, position: int, track: str | None = None, *, least: float = 0.0) -> list[TrackMarks]:
    """The tracks that the model answered for a clip (or one of them), best first, with their stored masks.

    None where the model gives no tracks. ``least`` leaves out answers below a score. Raises UsageError naming the
    tracks that exist where ``track`` is not one of them.
    """
    answers = run.predictions.isel(sample=position)
    if "track" not in answers:
        return []
    names = [str(name) for name in answers["track"].values]
    known = [name for name in names if name]
    if track is not None and track not in known:
        raise UsageError(f"no track {track!r} in this clip", remedy=f"one of {', '.join(known) or 'none'}")
    stored = _stored_tracks(run, position)
    found = []
    for rank, name in enumerate(names):
        score = float(answers["score"].values[rank])
        if name and name == (track or name) and score >= least:
            words = f"{name} {answers['label'].values[rank]} {score:.2f}"
            found.append(replace(_marks(stored, rank), name=words, number=known.index(name)))
    return found


def attention_over_time(
    run: Run,
    position: int,
    *,
    site: str | None = None,
    layer: int = -1,
    head: pick.Head = "mean",
    track: str | None = None,
    query: int | None = None,
) -> Chosen:
    """The kept row of a track (or row ``query``, or the best track's, or the first) on every frame cell.

    Raises UsageError where no site keeps rows over patches, or the track's row was not kept.
    """
    name, dataset = site_of(run, site)
    at = pick.layer_index(dataset, layer)
    row, words = _row_of(run, dataset, name, position, track, query)
    picked = dataset["attention"].isel(sample=position, layer=at, query=row)
    weights = np.asarray(picked.values, np.float64)  # ([frame,] head, key)
    heads = [str(h) for h in dataset["head"].values] if "head" in dataset.coords else []
    weights = weights.mean(axis=-2) if head == "mean" else weights[..., heads.index(str(head)), :]
    tokens = run.tokens(name, "key", position)
    values, grid, mass, uniform = _lay(weights, tokens, run, position)
    what = f"{words}, {name}, layer {int(dataset['layer'].values[at])}, "
    what += f"mean of {dataset.attrs.get('model_heads', len(heads))} heads" if head == "mean" else f"head {head}"
    keys = pick.count_keys(tokens)
    laid = ClipMap(values, grid, run.geometry(position), run.frame_cells(position), 1.0 / keys)
    return Chosen(laid, Rule(run.model_id, what, keys), mass, uniform)


def attribution_over_time(
    run: Run, position: int, method: str, *, target: int = 0, track: str | None = None
) -> Chosen:
    """One stored attribution of a clip: that of ``track``, or of target number ``target`` (the best is 0).

    Raises UsageError naming the methods that were run, or the tracks that were explained.
    """
    known = pick.map_methods(run)
    if method not in known:
        raise UsageError(
            f"{run.path}: no attribution {method!r}",
            remedy=f"one of {', '.join(known)}" if known else f"foveate attribute {run.path} --method {method}",
        )
    dataset = run.product(f"attributions/{method}").isel(sample=position)
    if "target" in dataset.dims:
        dataset = dataset.isel(target=target if track is None else _target_of(dataset, method, track))
    values = np.asarray(dataset["map"].values, np.float64)
    if values.ndim != 3:
        raise UsageError(f"{run.path}: attribution {method} has no frames", remedy="foveate plot draws images")
    known_values = values[np.isfinite(values)]
    uniform = float(known_values.mean()) if known_values.size else float("nan")
    cells = run.frame_cells(position)
    laid = ClipMap(values, run.grid, run.geometry(position), cells, uniform)
    of = [str(dataset[name].item()) for name in ("target_label", "target_track") if name in dataset]
    label = f" of {of[0]}" + (f", track {of[1]}" if of[1:] and of[1] else "") if of else ""
    mass = np.nansum(values, axis=(1, 2))
    even = np.full(mass.size, np.nansum(values) / max(1, int(cells.max()) + 1))
    return Chosen(laid, Rule(run.model_id, f"attribution {method}{label}", values.size), mass, even)


def _target_of(dataset: xr.Dataset, method: str, track: str) -> int:
    """Which of a sample's targets is about a track."""
    known = [str(name) for name in dataset["target_track"].values] if "target_track" in dataset else []
    if track in known:
        return known.index(track)
    explained = ", ".join(name for name in known if name) or "none"
    raise UsageError(
        f"attribution {method} does not explain track {track}; explained: {explained}",
        remedy="foveate attribute again, with room for all tracks (--max-targets)",
    )


def overlay_of(
    run: Run,
    position: int,
    chosen: Chosen | None,
    tracks: list[TrackMarks],
    *,
    scale: str = "lift",
    size: int = 640,
) -> Overlay:
    """How the clip is drawn: one scale over all its frames, the rule and K in the caption."""
    colours = _scale(chosen, scale)
    caption = "" if chosen is None else f"{chosen.rule} · {colours.words} · one scale over the clip"
    caption += _frames_words(run, position)
    return Overlay(
        colours,
        None if chosen is None else chosen.laid,
        tracks,
        title=f"{run.samples['id'].values[position]}",
        caption=caption.strip(" ·"),
        size=size,
    )


def _scale(chosen: Chosen | None, name: str) -> Scale:
    if check_name(name) == "per-image":
        raise UsageError("frames on per-image scales would not compare", remedy="choose lift, linear or signed")
    if chosen is not None and name == "lift" and (chosen.laid.values < 0).any():
        name = "signed"  # times uniform means nothing for values of both signs
    return shared(name, [] if chosen is None else [chosen.laid.values])


def _frames_words(run: Run, position: int) -> str:
    read = run.frame_index(position).size
    there = int(run.samples["frames"].values[position]) if "frames" in run.samples else read
    return "" if there <= read else f" · {read} of {there} frames: those that the model read"


def site_of(run: Run, site: str | None) -> tuple[str, xr.Dataset]:
    """A site by name, or the first that keeps rows over patches; cross-attention before self-attention."""
    if site is not None:
        return pick.site_of(run, site)
    ranked = sorted(sites_over_patches(run), key=lambda name: run.site(name).attrs.get("kind") != "cross")
    if not ranked:
        raise UsageError(
            f"{run.path}: no attention rows over patches were kept",
            remedy="capture again with --rows all, or draw an attribution: foveate attribute, then --method",
        )
    return ranked[0], run.site(ranked[0])


def sites_over_patches(run: Run) -> list[str]:
    """The sites that keep rows over patches. A tracker whose answer is read from object queries may keep none."""
    kept = [name for name in run.site_ids if "attention" in run.site(name)]
    patch = TOKEN_KINDS.index("patch")
    return [name for name in kept if "key_kind" in run.site(name) and (run.site(name)["key_kind"] == patch).any()]


def _row_of(
    run: Run, dataset: xr.Dataset, site: str, position: int, track: str | None, query: int | None
) -> tuple[int, str]:
    """The kept row of a track, and what it is in words."""
    tokens = run.tokens(site, "query", position)
    best = _best_track(run, position)
    if track is None and query is None and tokens.label is not None and best and best in tokens.label:
        track = best if len(tokens) > 1 else None
    if track is None:
        query = query or 0
        if not 0 <= query < len(tokens):
            raise UsageError(f"query row {query}: {len(tokens)} rows were kept", remedy=f"0 to {len(tokens) - 1}")
        rule = str(dataset.attrs.get("rows", ""))
        single = len(tokens) == 1 and rule
        return query, f"attention of the readout row ({rule})" if single else f"attention of row {query}"
    named = [] if tokens.label is None else [i for i, label in enumerate(tokens.label) if label == track]
    if not named:
        if len(tokens) == 1 and track == best:
            return 0, f"attention of track {track}"
        raise UsageError(
            f"site {site}: the row of track {track} was not kept", remedy="capture again with --rows all"
        )
    return named[0], f"attention of track {track}"


def _best_track(run: Run, position: int) -> str:
    """The surest track of a clip; empty where there is none."""
    if "track" not in run.predictions:
        return ""
    return next((str(name) for name in run.predictions["track"].values[position] if str(name)), "")


def _lay(
    weights: NDArray[np.float64], tokens: TokenAxis, run: Run, position: int
) -> tuple[NDArray[np.float64], CellGrid, NDArray[np.float64], NDArray[np.float64]]:
    """Rows on the cells of every frame, mass on each frame, and what a uniform row puts there."""
    cells = int(run.frame_cells(position).max()) + 1
    placed = tokens.kind == TOKEN_KINDS.index("patch")
    if not placed.any():
        raise UsageError("this site's keys have no place in the picture", remedy="choose another --site")
    if weights.ndim == 2:  # a row a frame
        rows = [tokens_to_cells(row, tokens) for row in weights[:cells]]
        values = np.stack(
            [np.where(row.sum() > 0, laid, np.nan) for row, (laid, _) in zip(weights, rows, strict=False)]
        )
        return values, rows[0][1], np.nansum(values, axis=(1, 2)), np.full(cells, placed.sum() / len(tokens))
    if (tokens.frame[placed] < 0).any():
        raise UsageError("this site's keys belong to no frame", remedy="choose another --site")
    parts = [np.flatnonzero(placed & (tokens.frame == cell)) for cell in range(cells)]
    laid = [tokens_to_cells(weights[part], tokens.take(part.tolist())) for part in parts]
    values = np.stack([one for one, _ in laid])
    uniform = np.array([part.size for part in parts]) / pick.count_keys(tokens)
    return values, laid[0][1], np.nansum(values, axis=(1, 2)), uniform


def _stored_tracks(run: Run, position: int) -> xr.Dataset | None:
    try:
        return run.tracks.isel(sample=position)
    except StoreError:
        return None


def _marks(stored: xr.Dataset | None, rank: int) -> TrackMarks:
    if stored is None or rank >= stored.sizes["rank"]:
        return TrackMarks("", rank)
    one = stored.isel(rank=rank)
    boxes = np.stack([np.asarray(one[f"box_{edge}"].values, np.float64) for edge in EDGES], axis=1)
    masks: Any = np.asarray(one["mask"].values)
    return TrackMarks("", rank, masks, boxes)
