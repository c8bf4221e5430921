"""Do two maps of the same image agree more than maps of different images do?

Explanations of one method resemble each other whatever the image (centres, sinks, positional habits), so
raw agreement is not evidence. The null is the agreement of the same two methods across *different* images;
what counts is the excess over it, one number an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.stats.ranks import midranks, spearman, top_overlap, top_probability

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

TOP_FRACTION = 0.1
PARTNERS = 20
"""Other images that each image is compared with where all pairs would have to be taken one by one."""


@dataclass(frozen=True)
class Measure:
    """A way to compare maps row by row along the last axis.

    Where a measure of complete maps is an inner product of ``features``, the mean over all other images
    costs one sum instead of all pairs.
    """

    name: str
    score: Callable[[ArrayLike, ArrayLike], NDArray[np.float64]]
    lower_is_closer: bool = False
    features: Callable[[ArrayLike], NDArray[np.float64]] | None = None


@dataclass(frozen=True, eq=False)
class Agreement:
    """``own`` (image,): the two maps of one image; ``null`` (image,): mean over maps of different images."""

    own: NDArray[np.float64]
    null: NDArray[np.float64]
    lower_is_closer: bool = False

    @property
    def excess(self) -> NDArray[np.float64]:
        """How much closer than across images, (image,); positive is closer on every measure."""
        difference = self.own - self.null
        return -difference if self.lower_is_closer else difference


def agreement(
    a: ArrayLike, b: ArrayLike, measure: Measure, *, groups: Sequence[object] | None = None, seed: int = 0
) -> Agreement:
    """Compare maps ``(image, cell)`` of the same images; cells that either map does not know do not count.

    The null of image i is the mean over other images j of (a_i with b_j and a_j with b_i), exact over all
    j for rank measures of complete maps, otherwise over :data:`PARTNERS` seeded partners. NaN with one image.
    ``groups`` (image,) names what images have in common (a video): then j is of another group than i, and the null
    is NaN where there is none.
    """
    one, two = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.shape != two.shape or one.ndim != 2:
        raise ValueError(f"agreement: expected two arrays (image, cell), got {one.shape} and {two.shape}")
    number = _numbers(len(one), groups)
    own = np.asarray(measure.score(one, two))
    if len(one) < 2:
        return Agreement(own, np.full(len(one), np.nan), measure.lower_is_closer)
    nowhere = np.isnan(one).all(axis=0) | np.isnan(two).all(axis=0)
    complete = np.isfinite(one[:, ~nowhere]).all() and np.isfinite(two[:, ~nowhere]).all()
    if measure.features is not None and complete:
        null = _all_others(measure.features(one[:, ~nowhere]), measure.features(two[:, ~nowhere]), number)
    else:
        null = _some_others(one, two, measure, number, seed)
    return Agreement(own, null, measure.lower_is_closer)


def js_divergence(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    """Jensen-Shannon divergence in bits, in [0, 1], of two masses normalised over their common cells.

    Lin, Divergence measures based on the Shannon entropy, IEEE Trans. Inf. Theory 37, 1991. NaN where a
    map has negative values (it is no distribution) or no mass on the common cells.
    """
    from scipy.special import rel_entr

    one, two = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    known = np.isfinite(one) & np.isfinite(two)
    p, q = _distribution(one, known), _distribution(two, known)
    middle = (p + q) / 2.0
    return np.asarray((rel_entr(p, middle) + rel_entr(q, middle)).sum(axis=-1) / (2.0 * np.log(2.0)))


def _distribution(values: NDArray[np.float64], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    mass = np.where(known, values, 0.0)
    total = mass.sum(axis=-1, keepdims=True)
    lawful = (total > 0.0) & (mass >= 0.0).all(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(lawful, mass / total, np.nan))


def _numbers(images: int, groups: Sequence[object] | None) -> NDArray[np.intp]:
    """Number of each image's group, (image,); each its own without ``groups``."""
    if groups is None:
        return np.arange(images)
    order = {name: number for number, name in enumerate(dict.fromkeys(groups))}
    if len(groups) != images:
        raise ValueError(f"agreement: {len(groups)} groups for {images} images")
    return np.array([order[name] for name in groups], np.intp)


def _all_others(a: NDArray[np.float64], b: NDArray[np.float64], group: NDArray[np.intp]) -> NDArray[np.float64]:
    """Mean over j of another group than i of (a_i . b_j + a_j . b_i) / 2."""
    sums_a, sums_b = (_group_sums(m, group) for m in (a, b))
    own = ((a * sums_b[group]).sum(axis=-1) + (b * sums_a[group]).sum(axis=-1)) / 2.0
    with_all = (a @ b.sum(axis=0) + b @ a.sum(axis=0)) / 2.0
    others = len(a) - np.bincount(group)[group]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(others > 0, (with_all - own) / others, np.nan))


def _group_sums(values: NDArray[np.float64], group: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sum of the rows of each group, (group, ...)."""
    sums = np.zeros((int(group.max()) + 1, *values.shape[1:]))
    np.add.at(sums, group, values)
    return sums


def _some_others(
    a: NDArray[np.float64], b: NDArray[np.float64], measure: Measure, group: NDArray[np.intp], seed: int
) -> NDArray[np.float64]:
    """The same over cyclic shifts of one seeded shuffle: every image is a partner equally often."""
    n = len(a)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(n)
    scores = []
    for shift in rng.permutation(np.arange(1, n))[:PARTNERS]:
        partner = np.empty(n, dtype=np.intp)
        partner[shuffled] = np.roll(shuffled, -int(shift))
        pair = [measure.score(a, b[partner]), measure.score(a[partner], b)]
        scores += [np.where(group == group[partner], np.nan, score) for score in pair]
    table = np.asarray(scores)
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0))


def _rank_features(values: ArrayLike) -> NDArray[np.float64]:
    ranks = midranks(values)
    m = ranks.shape[-1]
    return np.asarray((ranks - (m + 1.0) / 2.0) * np.sqrt(12.0 / (m * (m * m - 1.0)))) if m > 1 else ranks * np.nan


def _top_features(values: ArrayLike) -> NDArray[np.float64]:
    array: NDArray[Any] = np.asarray(values)
    count = np.ceil(TOP_FRACTION * array.shape[-1] - 1e-9)
    return np.asarray(top_probability(array, count) / np.sqrt(count))


SPEARMAN = Measure("spearman", spearman, features=_rank_features)
TOP_OVERLAP = Measure("top_overlap", partial(top_overlap, fraction=TOP_FRACTION), features=_top_features)
JS_DIVERGENCE = Measure("js_divergence", js_divergence, lower_is_closer=True)
