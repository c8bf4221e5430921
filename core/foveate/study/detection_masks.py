"""Masks cut from stored attention, held against true masks of every object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from foveate.attribution.levels import patches_by_level
from foveate.detection import segmentation
from foveate.detection.mass import box_shares, mask_shares
from foveate.detection.precision import ImageDetections
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.study.detection import Finding
from foveate.study.detection_rows import boxes_of, layers_of, object_maps, with_boxes
from foveate.study.detection_subject import Map, Subject, Truth

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.render.detection import DetectedObject

CANVAS = 256
"""Masks are compared on at most this many pixels a side."""

Maps = Callable[[Subject, str, "xr.Dataset", int, "list[DetectedObject]"], Map]


def segments(subject: Subject) -> Iterator[Finding]:
    """Jaccard of masks cut from attention with true masks, and AP of Otsu masks.

    Maps: each object's cross-attention row, and the encoder row of the cell at the centre of its box; last layer,
    mean over heads. An answer is held against the true object of the same label that its box overlaps most.
    Baselines: as many pixels at random, and the predicted box itself, filled.
    """
    if subject.truth is None:
        raise UsageError(
            "segments: no true masks are known", remedy="--truth objects.json with masks of every object"
        )
    kinds = [_Cut(subject, *subject.cross, "cross-attention", _cross_maps)]
    with suppress(UsageError):  # the decoder's own rows are enough
        encoder = subject.self_site(objects=False)
        kinds.append(_Cut(subject, *encoder, "encoder row at the centre", _centre_maps))
    for kind in kinds:
        yield from kind.findings()


@dataclass
class _Cut:
    """Masks from one kind of map over all images, held against the true ones."""

    subject: Subject
    name: str
    site: xr.Dataset
    what: str
    maps: Maps
    otsu: list[ImageDetections] = field(default_factory=list)
    filled: list[ImageDetections] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)

    def findings(self) -> Iterator[Finding]:
        """Jaccard at 60 % of the mass beside chance and beside the box, and AP of Otsu masks."""
        table = np.full((len(self.subject.positions), 3), np.nan)
        for place, found in with_boxes(self.subject):
            truth = self._truth(place)
            if len(truth.labels):
                table[place] = self._image(place, found, truth)
        layer = layers_of(self.site)[-1]
        what = f"Jaccard of 60 % of the mass, {self.what}"
        for column, baseline in ((1, "as many pixels at random"), (2, "the box, filled")):
            yield Finding(what, "IoU", table[:, 0], table[:, column], baseline, self.name, layer)
        if self.otsu:
            ap, of_box = (segmentation.mask_precision(images) for images in (self.otsu, self.filled))
            what, count = f"AP of Otsu masks at IoU 0.2:0.05:0.95, {self.what}", len(self.otsu)
            yield Finding(
                what, "AP", np.array([ap]), of_box, "the box, filled", self.name, layer, whole=True, n=count
            )

    def _truth(self, place: int) -> Truth:
        truth = self.subject.true_objects(place)
        if truth is None or (truth.masks is None and truth.labels):
            raise UsageError(f"segments: image {self.subject.ids[place]!r} has no mask of every object")
        return truth

    def _image(self, place: int, found: list[DetectedObject], truth: Truth) -> NDArray[np.float64]:
        """Means over objects of the Jaccard index of attention, of chance, and of the box."""
        assert truth.masks is not None  # checked by _truth
        laid = self.maps(self.subject, self.name, self.site, place, found)
        canvas = self.subject.run.geometry(self.subject.positions[place]).canvas(CANVAS)
        real, boxes = mask_shares(canvas, truth.masks) > 0.5, box_shares(canvas, boxes_of(found)) > 0.5
        cut = _on(canvas, laid.grid, [segmentation.mass_mask(one) for one in laid.values])
        otsu = _on(canvas, laid.grid, [segmentation.otsu_mask(one / laid.grid.areas) for one in laid.values])
        for images, masks in ((self.otsu, otsu), (self.filled, boxes)):
            images.append(_detections(found, truth.labels, segmentation.jaccard_table(masks, real), self.classes))
        numbers = [
            (
                segmentation.jaccard(cut[i], real[j]),
                segmentation.chance_jaccard(int(cut[i].sum()), real[j], seed=self.subject.seed),
                segmentation.jaccard(boxes[i], real[j]),
            )
            for i, j in _partners(found, truth.labels, segmentation.jaccard_table(boxes, real))
        ]
        return np.mean(numbers, 0) if numbers else np.full(3, np.nan)


def _cross_maps(subject: Subject, name: str, site: xr.Dataset, place: int, found: list[DetectedObject]) -> Map:
    laid = object_maps(subject, name, site, place, found)
    return Map(laid.values[:, -1], laid.grid)


def _centre_maps(subject: Subject, name: str, site: xr.Dataset, place: int, found: list[DetectedObject]) -> Map:
    """The encoder row of the cell (of the finest level) whose centre is nearest to that of each object's box."""
    tokens = subject.run.tokens(name, "query", subject.positions[place])
    geometry = subject.run.geometry(subject.positions[place])
    finest = max(patches_by_level(tokens), key=len)
    nearest = []
    for top, left, bottom, right in boxes_of(found):
        y, x = geometry.to_input((top + bottom) / 2, (left + right) / 2)
        away = (tokens.y[finest] - y) ** 2 + (tokens.x[finest] - x) ** 2
        nearest.append(int(finest[away.argmin()]))
    return subject.lay(name, place, subject.rows(site, place)[-1].mean(0)[nearest])


def _detections(
    found: list[DetectedObject], labels: Sequence[str], overlap: NDArray[np.float64], numbers: dict[str, int]
) -> ImageDetections:
    """``numbers`` grows by the labels that are new, so that classes mean the same in every image."""
    own, real = (
        np.array([numbers.setdefault(label, len(numbers)) for label in listed], np.int64)
        for listed in ([one.label for one in found], labels)
    )
    return ImageDetections(np.array([one.score for one in found]), own, real, overlap)


def _partners(
    found: list[DetectedObject], labels: Sequence[str], overlap: NDArray[np.float64]
) -> list[tuple[int, int]]:
    """(answer, true object) of the same label with the largest overlap, where they overlap at all."""
    same = np.array([[one.label == label for label in labels] for one in found], np.bool_)
    reach = np.where(same, overlap, 0.0)
    return [(i, int(row.argmax())) for i, row in enumerate(reach) if row.max() > 0]


def _on(canvas: CellGrid, grid: CellGrid, masks: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Masks of cells ``(row, column)`` on pixels of the canvas: each pixel belongs to the cell at its centre."""
    rows, columns = (
        np.clip(np.searchsorted(edges, centre, side="right") - 1, 0, edges.size - 2)
        for edges, centre in zip((grid.y, grid.x), canvas.centres, strict=True)
    )
    return np.stack(masks)[:, rows[:, None], columns[None]]
