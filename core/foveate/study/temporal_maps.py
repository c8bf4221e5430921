"""Maps over the frames of a clip for the analyses over time: one row laid on cells, its track, what moves.

The row is that of the surest track, or the row that the answer is read from; of a vision transformer whose rows
are all cells, the mean over them. Sinks are cells that all cells attend to: they are found in the
self-attention of the same cells, where that was stored, and taken out of the map before frames are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.geometry import CellGrid, tokens_to_cells
from foveate.interfaces import TOKEN_KINDS
from foveate.metrics.artefacts import find_artefacts, without_tokens
from foveate.study.temporal_subject import OWN_DIMS, ClipSubject, group_dims
from foveate.study.temporal_tracks import best_track

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

PATCH = TOKEN_KINDS.index("patch")


@dataclass(frozen=True, eq=False)
class ClipMaps:
    """Maps of all clips at one site and layer, mean over heads: ``values (clip, frame cell, y, x)`` on ``grid``.

    NaN where a clip has no such frame, the row does not exist, or a sink was removed. ``removed`` ``(clip,)`` is
    the share of the row's mass that lay on sinks. ``row`` says which row it is.
    """

    values: NDArray[np.float64]
    grid: CellGrid
    site: str
    layer: int
    row: str
    removed: NDArray[np.float64]

    @property
    def flat(self) -> NDArray[np.float64]:
        """``(clip, frame cell, cell)``."""
        return self.values.reshape(*self.values.shape[:2], -1)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the grid."""
        return self.grid.shape


def clip_maps(subject: ClipSubject, *, sinks: bool = False) -> ClipMaps:
    """The last kept layer of the site whose keys are cells, cross-attention first, then the finest.

    Sinks are taken out unless ``sinks``. Raises UsageError where no site keeps rows over cells of one grid.
    """
    name, site = _placed(subject)
    made = [_one(subject, name, site, place, sinks) for place in range(len(subject))]
    grid = made[0].grid
    if any(one.grid != grid for one in made):
        raise UsageError(f"{name}: clips of different sizes have different cells", remedy="capture at one size")
    values = np.full((len(subject), subject.frames, *grid.shape), np.nan)
    for place, one in enumerate(made):
        values[place, : len(one.values)] = one.values
    removed = np.array([one.removed for one in made])
    return ClipMaps(values, grid, name, int(site["layer"].values[-1]), made[0].row, removed)


@dataclass(frozen=True, eq=False)
class _Laid:
    """One clip's map ``(frame cell, y, x)``, the share of mass on sinks that were taken out, which row it is."""

    values: NDArray[np.float64]
    grid: CellGrid
    removed: float
    row: str


def _placed(subject: ClipSubject) -> tuple[str, xr.Dataset]:
    def usable(name: str, site: xr.Dataset) -> bool:
        key = subject.run.tokens(name, "key", subject.positions[0])
        one_level = np.unique(key.level[key.kind == PATCH]).size == 1
        by_frame = group_dims(site) == ["frame"] or (not group_dims(site) and bool((key.frame >= 0).any()))
        return bool((key.kind == PATCH).any()) and one_level and by_frame

    found = [(name, site) for name, site in subject.sites() if usable(name, site)]
    if not found:
        raise UsageError(
            f"{subject.run.path}: no site keeps rows over the cells of every frame",
            remedy="capture again with --rows readout or all",
        )
    return min(found, key=lambda pair: (pair[1].attrs.get("kind") != "cross", -int(pair[1].sizes["key"])))


def _one(subject: ClipSubject, name: str, site: xr.Dataset, place: int, sinks: bool) -> _Laid:
    position, count = subject.positions[place], subject.counts[place]
    key = subject.run.tokens(name, "key", position)
    chosen, words = _row(subject, name, place)
    picked = site["attention"].isel(sample=position, layer=-1, query=chosen)
    stored = np.asarray(picked.transpose(..., "head", "query", "key").values, np.float64).mean(axis=-3)
    weights, removed = np.asarray(stored.mean(axis=-2)), 0.0  # ([frame,] key)
    among = None if sinks else _among_cells(subject, name, site)
    if among is not None:
        received = among["received"].isel(sample=position, layer=-1).transpose(..., "head", "key")
        flagged = find_artefacts(np.asarray(received.values, np.float64).mean(axis=-2), key=key).flagged
        total = np.nansum(weights)
        rows, lost = without_tokens(weights[..., None, :], flagged)
        weights, removed = np.asarray(rows[..., 0, :]), float(lost.sum() / total) if total > 0 else float("nan")
    if weights.ndim == 2:
        laid = [tokens_to_cells(row, key) for row in weights[:count]]
    else:
        parts = [np.flatnonzero((key.kind == PATCH) & (key.frame == cell)) for cell in range(count)]
        laid = [tokens_to_cells(weights[part], key.take(part.tolist())) for part in parts]
    values = np.stack([one for one, _ in laid])
    values[np.nansum(values, axis=(1, 2)) <= 0] = np.nan  # the row is not there in this frame
    return _Laid(values, laid[0][1], removed, words)


def _among_cells(subject: ClipSubject, name: str, site: xr.Dataset) -> xr.Dataset | None:
    """The self-attention of a site's own keys, where what they receive was stored.

    A cell that a few object queries look at is an object; a sink is what all cells look at.
    """
    stream = site.attrs.get("key_stream")
    for other in (name, *subject.run.site_ids):
        found = subject.run.site(other)
        same = found.attrs.get("key_stream") == stream and found.sizes["key"] == site.sizes["key"]
        alike = same and group_dims_of(found, "received") == group_dims_of(site, "attention")
        if alike and found.attrs.get("kind") == "self" and "received" in found:
            return found
    return None


def group_dims_of(site: xr.Dataset, variable: str) -> list[str]:
    """Axes of a variable of a site besides those that every site has."""
    return [str(dim) for dim in site[variable].dims if dim not in OWN_DIMS] if variable in site else []


def _row(subject: ClipSubject, name: str, place: int) -> tuple[list[int], str]:
    """Kept rows whose mean is the map: the surest track's, else all."""
    tokens = subject.run.tokens(name, "query", subject.positions[place])
    track = best_track(subject, place)
    if track and tokens.label is not None and track in tokens.label:
        return [tokens.label.index(track)], "row of the surest track"
    rule = str(subject.run.site(name).attrs.get("rows", ""))
    return list(range(len(tokens))), f"mean of the kept rows ({rule})" if len(tokens) > 1 else f"row {rule}"
