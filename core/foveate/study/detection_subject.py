"""What the analyses of detectors look at: a run, its objects with maps on the picture, and the truth if known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.attribution.levels import patches_by_level, tokens_on_cells
from foveate.data.run import Run
from foveate.detection.readouts import LayeredDetector
from foveate.errors import FoveateError, SampleError, UsageError
from foveate.geometry import CellGrid, Geometry, regrid, tokens_to_cells
from foveate.interfaces import TOKEN_KINDS, AttentionSource, Batch, Sample, TokenAxis
from foveate.render.detection_run import answers_of, cross_site, threshold_of

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.render.detection import DetectedObject

BATCH = 8


@dataclass(frozen=True, eq=False)
class Truth:
    """True objects of one image: ``labels``, ``boxes (object, 4)`` and ``masks (object, y, x)`` or None."""

    labels: tuple[str, ...]
    boxes: NDArray[np.float64]
    masks: NDArray[np.bool_] | None


@dataclass(frozen=True, eq=False)
class Map:
    """Masses ``(row, column)`` on ``grid`` in original pixels; NaN where the model saw no picture."""

    values: NDArray[np.float64]
    grid: CellGrid


@dataclass(eq=False)
class Subject:
    """One run of a detector, read once by all analyses.

    ``truth`` is a JSON file as :func:`foveate.testing.shapes.write_dataset` writes it: ``{"images": {sample id:
    [{"label", "box": [top, left, bottom, right], "mask": file}]}}``, files relative to it. ``at_most`` images, the
    first of the run. ``seed`` fixes every draw.
    """

    run: Run
    truth: Path | None = None
    at_most: int | None = None
    seed: int = 0
    overrides: dict[str, Any] = field(default_factory=dict)
    """Options with which the model is opened again, for instance ``device``."""

    def __post_init__(self) -> None:
        if "object" not in self.run.predictions:
            raise UsageError(
                f"{self.run.path}: the answers of {self.run.model_id} belong to no object queries",
                remedy="these analyses are about detectors; foveate metrics measures any model",
            )
        self.positions = [int(i) for i in self.run.ok[: self.at_most]]
        if not self.positions:
            raise UsageError(
                f"{self.run.path}: no sample was captured", remedy="foveate validate says what failed"
            )

    @property
    def ids(self) -> list[str]:
        """Names of the images, in the order of every finding's values."""
        return [str(self.run.samples["id"].values[i]) for i in self.positions]

    @cached_property
    def objects(self) -> list[list[DetectedObject]]:
        """Per image, the stored answers above the threshold, best first.

        Segmenters give no boxes: theirs are the bounds of the masks that they predict, for which the model is run
        again. Where it cannot be opened, or a mask is empty, there is no box.
        """
        threshold = threshold_of(self.run)
        found = [[one for one in answers_of(self.run, i) if one.score > threshold] for i in self.positions]
        listed = [one for objects in found for one in objects]
        if not listed or any(one.box is not None for one in listed):
            return found
        return self._bounded(found)

    def _bounded(self, found: list[list[DetectedObject]]) -> list[list[DetectedObject]]:
        try:
            source = self.source
        except FoveateError:
            return found
        made: list[list[DetectedObject]] = []
        for places, batch in self.batches(source):
            answers = source.predictions(source.forward(batch), batch)
            for place, given in zip(places, answers, strict=True):
                masks = {one.object: one.mask for one in given if one.mask is not None}
                made.append([replace(one, box=mask_bounds(masks.get(one.query))) for one in found[place]])
        return made

    @cached_property
    def source(self) -> AttentionSource:
        """The model, opened again."""
        return self.run.open_source(**self.overrides)

    def batches(self, source: AttentionSource | None = None) -> Iterator[tuple[list[int], Batch]]:
        """(places among ``positions``, batch) of a few images at a time."""
        model = source or self.source
        for start in range(0, len(self.positions), BATCH):
            places = list(range(start, min(start + BATCH, len(self.positions))))
            yield places, model.encode([self.sample(place) for place in places])

    @cached_property
    def layered(self) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Per image, what its decoder layers answer: probabilities (layer, query, class), boxes (layer, query, 4).

        Runs the model. Raises UsageError where its layers cannot be read.
        """
        source = self.source
        if not isinstance(source, LayeredDetector):
            raise UsageError(f"{self.run.model_id}: its decoder layers cannot be read by its own heads")
        found: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        for places, batch in self.batches():
            answers = source.layer_answers(batch)
            p, b = (np.stack([getattr(one, name) for one in answers]) for name in ("probabilities", "boxes"))
            found += [(p[:, row], b[:, row]) for row in range(len(places))]
        return found

    def sample(self, place: int) -> Sample:
        """One image, decoded again."""
        return self.run.load_sample(self.positions[place])

    def size(self, place: int) -> tuple[float, float]:
        """(height, width) of the original image."""
        geometry = self.run.geometry(self.positions[place])
        return float(geometry.original_height), float(geometry.original_width)

    # ------------------------------------------------------------------------------- attention

    @cached_property
    def cross(self) -> tuple[str, xr.Dataset]:
        """The site at which object queries read the picture. Raises UsageError without full rows."""
        return cross_site(self.run)

    def self_site(self, *, objects: bool) -> tuple[str, xr.Dataset]:
        """The self-attention of object queries, or of the picture's cells, with all rows kept."""
        stream = self._object_stream() if objects else ""
        for name in self.run.site_ids:
            site = self.run.site(name)
            if stream and site.attrs.get("query_stream") != stream:
                continue  # queries that are no objects: a segmenter's text or task tokens
            if not is_plain(site) or site.attrs.get("kind") != "self":
                continue
            kinds = self.run.tokens(name, "key", self.positions[0])
            square = site.sizes["query"] == site.sizes["key"]
            if square and bool(len(kinds.where("patch"))) is not objects:
                return name, site
        whose = "object queries" if objects else "the picture's cells"
        raise UsageError(
            f"{self.run.path}: no whole self-attention of {whose} was kept", remedy="capture again with --rows all"
        )

    def _object_stream(self) -> str:
        """The stream of the queries that read the picture; empty where no such rows were kept."""
        try:
            return str(self.cross[1].attrs.get("query_stream", ""))
        except UsageError:
            return ""

    def rows(self, site: xr.Dataset, place: int) -> NDArray[np.float64]:
        """Stored attention of one image, ``(layer, head, query, key)``."""
        stored = site["attention"].isel(sample=self.positions[place])
        return np.asarray(stored.transpose("layer", "head", "query", "key").values, np.float64)

    def visible(self, name: str, axis: str, place: int) -> NDArray[np.intp]:
        """Tokens that are not padding: patches whose centre shows the picture, and all without a place."""
        tokens = self.run.tokens(name, axis, self.positions[place])
        geometry = self.run.geometry(self.positions[place])
        (top, left), (bottom, right) = (
            geometry.to_input(y, x) for y, x in (geometry.visible[:2], geometry.visible[2:])
        )
        inside = (tokens.y > top) & (tokens.y < bottom) & (tokens.x > left) & (tokens.x < right)
        padding = tokens.kind == TOKEN_KINDS.index("padding")
        return np.flatnonzero((inside | ~np.isfinite(tokens.y)) & ~padding)

    def seen(self, name: str, site: xr.Dataset, place: int) -> tuple[NDArray[np.float64], TokenAxis, TokenAxis]:
        """Rows of one image ``(layer, head, query, key)`` without padding on either side, and their tokens."""
        kept = [self.visible(name, axis, place) for axis in ("query", "key")]
        axes = [self.run.tokens(name, axis, self.positions[place]) for axis in ("query", "key")]
        query, key = (tokens.take(index.tolist()) for tokens, index in zip(axes, kept, strict=True))
        return self.rows(site, place)[..., kept[0][:, None], kept[1]], query, key

    def row_numbers(self, site: xr.Dataset, queries: list[int]) -> list[int]:
        """Where the rows of these object queries lie. Raises UsageError where one was not kept."""
        kept = [int(query) for query in site["query_index"].values]
        if any(query not in kept for query in queries):
            raise UsageError("attention rows of object queries were not kept", remedy="capture with --rows all")
        return [kept.index(query) for query in queries]

    def lay(self, name: str, place: int, rows: NDArray[np.float64]) -> Map:
        """Rows over keys ``(..., key)`` as masses on the picture ``(..., row, column)``."""
        tokens = self.run.tokens(name, "key", self.positions[place])
        return lay(rows, tokens, self.run, self.positions[place])

    # ------------------------------------------------------------------------------- truth

    def true_objects(self, place: int) -> Truth | None:
        """What is in the image, if a file says so."""
        if self.truth is None:
            return None
        listed = self._table.get(self.ids[place])
        if listed is None:
            raise UsageError(
                f"{self.truth}: no image {self.ids[place]!r}", remedy="names are sample ids of the run"
            )
        boxes = np.array([one["box"] for one in listed], np.float64).reshape(-1, 4)
        if not np.isfinite(boxes).all():
            raise UsageError(
                f"truth {self.truth}: image {self.ids[place]!r} has a box that is not finite",
                remedy="a box is [top, left, bottom, right] in pixels of the original picture",
            )
        masks = [_mask(self.truth.parent / str(one["mask"])) for one in listed if one.get("mask")]
        whole = np.stack(masks) if masks and len(masks) == len(listed) else None
        return Truth(tuple(str(one["label"]) for one in listed), boxes, whole)

    @cached_property
    def _table(self) -> dict[str, list[dict[str, Any]]]:
        assert self.truth is not None  # asked for only where there is one
        try:
            found = json.loads(self.truth.read_text("utf-8"))["images"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(
                f"truth {self.truth}: {error}", remedy='a JSON object {"images": {id: [{"label", "box", "mask"}]}}'
            ) from None
        table: dict[str, list[dict[str, Any]]] = found
        return table


def is_plain(site: xr.Dataset) -> bool:
    """Whether rows were kept, with no batch axes besides the sample (windows, tracks)."""
    return "attention" in site and set(site["attention"].dims) == {"sample", "layer", "head", "query", "key"}


def lay(
    rows: NDArray[np.float64], tokens: TokenAxis, run: Run, position: int, geometry: Geometry | None = None
) -> Map:
    """Rows over tokens ``(..., key)`` as masses on cells of the original picture, levels added up.

    ``geometry`` where the input is not that of the run (then there must be one level).
    """
    if len(patches_by_level(tokens)) < 2:
        values, grid = tokens_to_cells(rows, tokens)
    else:
        grid = run.grid
        values = tokens_on_cells(rows, tokens, grid)
    return on_picture(values, grid, geometry or run.geometry(position))


def on_picture(values: NDArray[np.float64], grid: CellGrid, geometry: Geometry) -> Map:
    """Masses on cells of the input as masses on the part of those cells that shows the original picture."""
    cells = geometry.grid_to_original(grid)
    seen = cells.clip(*geometry.visible)
    return Map(regrid(values, cells, seen, reduce="sum"), seen)


def mask_bounds(mask: NDArray[np.bool_] | None) -> tuple[float, float, float, float] | None:
    """(top, left, bottom, right) of the smallest box around a mask ``(y, x)``; None where it is empty."""
    if mask is None or not np.any(mask):
        return None
    rows, columns = np.flatnonzero(np.any(mask, axis=1)), np.flatnonzero(np.any(mask, axis=0))
    return float(rows[0]), float(columns[0]), float(rows[-1] + 1), float(columns[-1] + 1)


def _mask(path: Path) -> NDArray[np.bool_]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L")) > 127
    except OSError as error:
        raise SampleError(f"mask {path}: {error}") from None
