"""Maps that explain nothing, and one that knows the truth: what every score is held against.

A method that does not beat a random order has shown nothing; one that does not beat the centre of the
picture, its edges or its colours has shown that photographs have subjects. All are ordinary attributions
on the model's cells, so they run through the same code as everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from scipy.ndimage import correlate1d

from foveate.attribution.appearance import seen_rgb
from foveate.attribution.clips import Frames, frame_index, frames_of, map_shape, pool_frames
from foveate.attribution.pooling import pixel_grid
from foveate.attribution.seeding import sample_seed
from foveate.errors import UsageError
from foveate.geometry import regrid
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import CellGrid, Geometry
    from foveate.interfaces import AttentionSource, Batch, BoundTarget

RANDOM_SEEDS = 20
"""Random maps an image is compared with, at least: their mean's own error is then a fifth of their spread."""
LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class Uniform(Attribution):
    """Every cell alike; its order is nothing but ties."""

    name: ClassVar[str] = "uniform"
    citation: ClassVar[str] = "control: no information"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Ones."""
        return lay(self, np.ones(shape_of(source, batch)), source, batch, bound)


@dataclass(frozen=True)
class Random(Attribution):
    """Independent uniform numbers, drawn from the seed and the sample's id (the same in any batch)."""

    name: ClassVar[str] = "random"
    citation: ClassVar[str] = "control: a random order"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """One draw; :func:`random_maps` gives the many that a comparison needs."""
        shape = shape_of(source, batch)[1:]
        draws = [np.random.default_rng(sample_seed(seed, sample)).random(shape) for sample in batch.ids]
        return lay(self, np.stack(draws), source, batch, bound, seed=seed)


@dataclass(frozen=True)
class Centre(Attribution):
    """A Gaussian at the middle of the input; ``sigma`` is a share of its height and width.

    People put their subject in the middle: the classic baseline of saliency research.
    """

    name: ClassVar[str] = "centre"
    citation: ClassVar[str] = "control: centre bias; Tatler 2007, J. Vision 7(14):4"
    sigma: float = 0.25

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """exp(-r^2 / 2) with r in units of sigma, at cell centres."""
        if not self.sigma > 0:
            raise UsageError(f"centre: sigma must be positive, got {self.sigma}")
        axes = zip(source.cells(batch).centres, batch.inputs.shape[-2:], strict=True)
        y, x = (np.exp(-(((centres / side - 0.5) / self.sigma) ** 2) / 2) for centres, side in axes)
        values = np.broadcast_to(np.outer(y, x), shape_of(source, batch))
        return lay(self, values, source, batch, bound, sigma=self.sigma)


@dataclass(frozen=True)
class Edge(Attribution):
    """Sobel gradient magnitude of the brightness that the model saw."""

    name: ClassVar[str] = "edge"
    citation: ClassVar[str] = "control: edges; Adebayo et al. 2018, arXiv:1810.03292"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Mean magnitude a cell."""
        return lay(self, pooled(edge_strength(seen_rgb(source, batch)), source, batch), source, batch, bound)


@dataclass(frozen=True)
class Saturation(Attribution):
    """How colourful the picture is: the range of the three channels."""

    name: ClassVar[str] = "saturation"
    citation: ClassVar[str] = "control: colourfulness (chroma, max - min of RGB)"

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Mean chroma a cell."""
        return lay(self, pooled(np.ptp(seen_rgb(source, batch), axis=-3), source, batch), source, batch, bound)


class Untrained(Attribution):
    """The same method on an untrained (or otherwise altered) twin: what comes from architecture and input.

    ``twin`` must take the source's own batches: same preprocessing, same cells, same targets.
    """

    name: ClassVar[str] = "untrained"
    citation: ClassVar[str] = "control: randomised weights; Adebayo et al. 2018, arXiv:1810.03292"

    def __init__(self, method: Attribution, twin: AttentionSource) -> None:
        self.method, self.twin = method, twin

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """The twin's map, for the source's target. Raises UsageError where the two have other cells."""
        same_frames = frames_of(self.twin, batch) == frames_of(source, batch)
        if self.twin.cells(batch) != source.cells(batch) or not same_frames:
            raise UsageError(
                f"untrained: {self.twin.card.id} has other cells than {source.card.id}",
                remedy="open the same architecture with weights='random'",
            )
        made = self.method.attribute(self.twin, batch, bound, seed=seed)
        info = {**made.info, "twin": self.twin.card.id}
        return AttributionMap(
            f"{made.method}@untrained", made.values, made.grid, made.signed, made.converged, info
        )


class Oracle(Attribution):
    """The truth, where it is known: the share of each cell that the mask covers.

    ``masks`` holds one boolean ``(y, x)`` in original pixels per sample of the batch (``(frame, y, x)`` over the
    sample's own frames for clips), or None (its map is NaN). Not a method: the row that says how well an
    explanation could possibly score.
    """

    name: ClassVar[str] = "oracle"
    citation: ClassVar[str] = "control: ground-truth mask"

    def __init__(self, masks: Sequence[NDArray[np.bool_] | None]) -> None:
        self.masks = tuple(masks)

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Area share, NaN for cells outside the image. Raises UsageError where a mask has another size."""
        if len(self.masks) != len(batch):
            raise UsageError(f"oracle: {len(self.masks)} masks for {len(batch)} samples")
        frames, shape = frames_of(source, batch), map_shape(source, batch)
        rows = [
            np.full(shape, np.nan)
            if mask is None
            else sample_share(mask, batch, sample, source.cells(batch), frames)
            for sample, mask in enumerate(self.masks)
        ]
        return lay(self, np.stack(rows), source, batch, bound)


def random_maps(
    source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0, count: int = RANDOM_SEEDS
) -> list[AttributionMap]:
    """``count`` independent random maps: seeds ``seed``, ``seed + 1``, ..."""
    return [Random().attribute(source, batch, bound, seed=seed + draw) for draw in range(count)]


def edge_strength(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sobel magnitude of brightness, ``(..., channel, y, x)`` in [0, 1] to ``(..., y, x)``, per pixel."""
    luma = np.tensordot(np.moveaxis(rgb, -3, -1), LUMA, axes=1)
    # Not scipy's sobel(): that smooths along every other axis, samples and frames included.
    slope, smooth = [-0.5, 0.0, 0.5], [0.25, 0.5, 0.25]
    dy = correlate1d(correlate1d(luma, slope, axis=-2), smooth, axis=-1)
    dx = correlate1d(correlate1d(luma, slope, axis=-1), smooth, axis=-2)
    return np.asarray(np.hypot(dy, dx))


def mask_share(mask: NDArray[np.bool_], geometry: Geometry, grid: CellGrid) -> NDArray[np.float64]:
    """Share of each input cell's visible part that a mask over original pixels covers, ``(..., y, x)``."""
    size = (geometry.original_height, geometry.original_width)
    if mask.shape[-2:] != size:
        raise UsageError(f"oracle: the mask is {mask.shape[-2:]} but the image is {size} pixels")
    return regrid(mask.astype(np.float64), pixel_grid(*size), geometry.grid_to_original(grid))


def clip_share(mask: NDArray[np.bool_], geometry: Geometry, grid: CellGrid, frames: Frames) -> NDArray[np.float64]:
    """Share of each cell that a mask ``(input frame, y, x)`` of original pixels covers, ``(frame cell, y, x)``."""
    if mask.ndim != 3 or len(mask) != len(frames):
        raise UsageError(
            f"oracle: the mask has shape {mask.shape}, but the model reads {len(frames)} frames of the clip",
            remedy="give one mask (y, x) for each of them",
        )
    return pool_frames(mask_share(mask, geometry, grid), frames, reduce="mean")


def sample_share(
    mask: NDArray[np.bool_], batch: Batch, sample: int, grid: CellGrid, frames: Frames
) -> NDArray[np.float64]:
    """Share of each cell under the mask of one sample of a batch, ``([frame cell,] y, x)``.

    Of a clip, ``mask`` is over the sample's own frames, of which the model reads those in ``frame_index``.
    """
    if not frames:
        return mask_share(mask, batch.geometry[sample], grid)
    index = list(frame_index(batch, sample))
    if mask.ndim != 3 or len(mask) <= max(index):
        raise UsageError(
            f"oracle: the mask of clip {batch.ids[sample]!r} has shape {mask.shape}, but the model reads "
            f"its frames up to {max(index)}",
            remedy="give one mask (y, x) for every frame of the clip",
        )
    return clip_share(mask[index], batch.geometry[sample], grid, frames)


def pooled(plane: NDArray[np.float64], source: AttentionSource, batch: Batch) -> NDArray[np.float64]:
    """Pixel values ``(sample, [frame,] y, x)`` averaged over the model's cells (and frame cells)."""
    cells = regrid(plane, pixel_grid(*plane.shape[-2:]), source.cells(batch))
    return pool_frames(cells, frames_of(source, batch), reduce="mean")


def shape_of(source: AttentionSource, batch: Batch) -> tuple[int, ...]:
    """``(sample, [frame cell,] row, column)`` of maps on the model's cells."""
    return (len(batch), *map_shape(source, batch))


def lay(
    method: Attribution,
    values: NDArray[np.float64],
    source: AttentionSource,
    batch: Batch,
    bound: BoundTarget,
    **info: object,
) -> AttributionMap:
    """Values a sample as values a target row."""
    rows = values[[row.sample for row in bound.rows]].astype(np.float32)
    frames = frames_of(source, batch)
    told = {"citation": method.citation, **({"frame_cells": frames} if frames else {}), **info}
    return AttributionMap(method.name, rows, source.cells(batch), info=told)
