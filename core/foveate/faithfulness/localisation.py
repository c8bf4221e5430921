"""Where the evidence is known: does a map point at it?

A map on cells is a map on pixels that is constant on each cell, and every score here is that pixel map's
exact value, computed from each cell's area and the share of it that the mask covers. No resizing, no
threshold on half-covered cells, and tied pixels count by their expectation, so a uniform map scores the
mask's share of the area (pointing, masses) or one half (ROC-AUC).

Localisation is not faithfulness: a model may use what lies outside the mask, and then a faithful map
points there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.stats.ranks import tie_spans

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

LOCALISATION = ("pointing", "roc_auc", "rank_accuracy", "mass_accuracy", "area_share")
"""What :func:`localisation` returns, in order. The last is the mask's share of the area: chance level."""


def localisation(values: ArrayLike, share: ArrayLike, area: ArrayLike) -> NDArray[np.float64]:
    """All scores of :data:`LOCALISATION` for maps ``(..., cell)``, float64 ``(..., 5)``.

    ``share`` (cell,) is the part of each cell under the mask
    (:func:`foveate.attribution.reference.mask_share`) and ``area`` (cell,) its size. NaN cells of
    map or share do not count. All NaN where the mask covers nothing or everything that counts.
    """
    maps = np.atleast_2d(np.asarray(values, dtype=np.float64))
    lead = maps.shape[:-1]
    flat = maps.reshape(-1, maps.shape[-1])
    scores = [_scores(row, np.asarray(share, np.float64), np.asarray(area, np.float64)) for row in flat]
    shaped = np.asarray(scores).reshape(*lead, len(LOCALISATION))
    return shaped[0] if np.ndim(values) == 1 else shaped


def _scores(values: NDArray[np.float64], share: NDArray[np.float64], area: NDArray[np.float64]) -> list[float]:
    known = np.isfinite(values) & np.isfinite(share)
    values, inside, size = values[known], (share * area)[known], area[known]
    total, found = size.sum(), inside.sum()
    if found <= 0.0 or found >= total:
        return [float("nan")] * len(LOCALISATION)
    levels = _levels(values, inside, size)
    return [
        float(levels[0, 0] / levels[0, 1]),
        _roc_auc(levels),
        _rank_accuracy(levels, float(found)),
        _mass_accuracy(values, inside, size),
        float(found / total),
    ]


def _levels(
    values: NDArray[np.float64], inside: NDArray[np.float64], size: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Areas (under the mask, in all) of each group of tied cells, highest value first: ``(level, 2)``."""
    first, _ = tie_spans(values)
    _, group = np.unique(-first, return_inverse=True)
    return np.stack([np.bincount(group, inside), np.bincount(group, size)], axis=1)


def _roc_auc(levels: NDArray[np.float64]) -> float:
    """Chance that a pixel of the mask has a higher value than one outside, ties half (Fawcett 2006)."""
    inside, outside = levels[:, 0], levels[:, 1] - levels[:, 0]
    lower = outside.sum() - np.cumsum(outside)
    return float((inside * (lower + outside / 2)).sum() / (inside.sum() * outside.sum()))


def _rank_accuracy(levels: NDArray[np.float64], found: float) -> float:
    """Relevance rank accuracy: the mask's share of the top |mask| pixels (Arras, Osman, Samek 2022, eq. 2)."""
    before = np.cumsum(levels[:, 1]) - levels[:, 1]
    taken = np.clip(found - before, 0.0, levels[:, 1])
    return float((levels[:, 0] * taken / levels[:, 1]).sum() / found)


def _mass_accuracy(values: NDArray[np.float64], inside: NDArray[np.float64], size: NDArray[np.float64]) -> float:
    """Relevance mass accuracy: the mask's share of positive relevance (ibid., eq. 1); negative is cut first.

    Values are taken as densities. NaN where no value is positive.
    """
    positive = np.clip(values, 0.0, None)
    mass = (positive * size).sum()
    return float((positive * inside).sum() / mass) if mass > 0.0 else float("nan")
