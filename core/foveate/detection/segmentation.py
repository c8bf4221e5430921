"""Does attention outline the object: masks cut from attention maps, held against true masks.

Two cuts: the smallest set of cells that holds 60 % of a map's mass (Caron et al. 2021, DINO, ICCV, figure 4), and
Otsu's threshold (Otsu 1979, IEEE Trans. SMC 9), with which Chefer, Gur and Wolf 2021 (ICCV) score DETR's maps as
COCO-style masks at IoU 0.2, 0.25, ..., 0.95 instead of COCO's 0.5, ..., 0.95.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.detection.precision import ImageDetections, mean_average_precision
from foveate.errors import MissingDependencyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

MASS = 0.6
THRESHOLDS = tuple(round(0.2 + 0.05 * i, 2) for i in range(16))
"""IoU 0.2 to 0.95, as in Chefer et al. 2021; COCO starts at 0.5, so these figures do not compare with COCO's."""


def mass_mask(values: ArrayLike, share: float = MASS) -> NDArray[np.bool_]:
    """The fewest strongest cells of a map ``(row, column)`` that together hold at least ``share`` of its mass.

    Cells tied with the weakest one taken are taken in reading order. NaN cells are never taken; a map without
    mass gives an empty mask.
    """
    flat = np.nan_to_num(np.asarray(values, np.float64)).ravel()
    total = flat.sum()
    taken = np.zeros(flat.size, np.bool_)
    if total > 0:
        order = np.argsort(-flat, kind="stable")
        reached = np.cumsum(flat[order]) >= share * total * (1 - 1e-12)
        taken[order[: int(reached.argmax()) + 1]] = True
    return taken.reshape(np.shape(values))


def otsu_mask(values: ArrayLike) -> NDArray[np.bool_]:
    """Cells above Otsu's threshold (scikit-image, 256 bins between the map's own extremes).

    The threshold does not change with the scale of the map. A constant map gives an empty mask. Raises
    MissingDependencyError without scikit-image.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise MissingDependencyError(
            "Otsu's threshold needs scikit-image", remedy="pip install 'foveate[demo]'"
        ) from error
    array = np.asarray(values, np.float64)
    known = array[np.isfinite(array)]
    if not known.size or known.min() == known.max():
        return np.zeros(array.shape, np.bool_)
    half_a_bin = (known.max() - known.min()) / 512  # scikit-image names the last bin below by its centre
    return np.asarray(np.nan_to_num(array, nan=-np.inf) > threshold_otsu(known) + half_a_bin)


def jaccard(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks of one shape; NaN where both are empty."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else float("nan")


def jaccard_table(masks: NDArray[np.bool_], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """:func:`jaccard` of masks ``(mask, y, x)`` with true ones ``(object, y, x)``: ``(mask, object)``."""
    own, real = (np.reshape(m, (len(m), -1)).astype(np.float64) for m in (masks, truth))
    shared = own @ real.T
    union = own.sum(1)[:, None] + real.sum(1)[None] - shared
    return np.asarray(np.where(union > 0, shared / np.where(union > 0, union, 1.0), 0.0))


def chance_jaccard(cells: int, mask: NDArray[np.bool_], *, draws: int = 100, seed: int = 0) -> float:
    """Mean :func:`jaccard` of ``mask`` with as many cells drawn at random, without replacement."""
    flat = mask.ravel()
    rng = np.random.default_rng(seed)
    shared = rng.hypergeometric(int(flat.sum()), int((~flat).sum()), cells, size=draws)
    union = cells + int(flat.sum()) - shared
    return float(np.mean(shared / union)) if union.all() else float("nan")


def mask_precision(images: Sequence[ImageDetections], thresholds: Sequence[float] = THRESHOLDS) -> float:
    """Mean average precision over IoU ``thresholds``, of masks whose overlaps come from :func:`jaccard_table`."""
    return float(np.mean([mean_average_precision(images, threshold=t) for t in thresholds]))
