"""Do object queries specialise: does a query's number say which class, or which place, it will answer for?

Carion et al. 2020 (ECCV, arXiv:2005.12872, figure 7) show that the slots of DETR favour places and sizes, and
(figure 5) find no strong sign of a class. Both are measured here, each beside what queries
without a preference would give: an estimate of mutual information is positive for independent variables, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

PERMUTATIONS = 1000
_NAN = float("nan")


class Information(NamedTuple):
    """``value`` nats, beside its mean under permutation and the share of permutations that reach it (+1 rule).

    ``largest`` is the entropy of the second variable, which no mutual information exceeds. ``n`` pairs.
    """

    value: float
    null: float
    p: float
    largest: float
    n: int


def mutual_information(first: ArrayLike, second: ArrayLike) -> float:
    """Plug-in mutual information of two label columns ``(pair,)``, in nats; NaN without pairs.

    I(X; Y) = sum p(x, y) ln p(x, y) / (p(x) p(y)) (Cover and Thomas, Elements of Information Theory, eq. 2.28).
    """
    joint = _table(_codes(first), _codes(second))
    return _information(joint)


def query_information(
    query: ArrayLike, label: ArrayLike, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Information:
    """What a query's number says about the class it answers: one pair ``(query, label)`` an object found.

    The null permutes classes over all objects, so both frequencies stay. p counts permutations that reach the
    value, and the observed order as one of them (Phipson and Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9:39).
    Raises UsageError where the columns differ in length.
    """
    x, y = _codes(query), _codes(label)
    if x.size != y.size:
        raise UsageError(f"query_information: {x.size} queries but {y.size} labels")
    if not x.size:
        return Information(_NAN, _NAN, _NAN, _NAN, 0)
    value = _information(_table(x, y))
    rng = np.random.default_rng(seed)
    null = np.array([_information(_table(x, rng.permutation(y))) for _ in range(permutations)])
    reached = int((null >= value - 1e-12).sum())
    share = np.bincount(y) / y.size
    largest = float(-(share * np.log(share)).sum())
    return Information(value, float(null.mean()), (reached + 1) / (permutations + 1), largest, x.size)


class Dispersion(NamedTuple):
    """``by_query``: query -> RMS distance of its box centres to their mean, queries with two boxes or more.

    ``within`` is their mean weighted by boxes; ``null`` the same with boxes permuted over queries, ``p`` the share
    of permutations that are as tight (+1 rule). Distances are in the units of the centres.
    """

    by_query: dict[int, float]
    within: float
    null: float
    p: float


def centre_dispersion(
    query: ArrayLike, centres: ArrayLike, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> Dispersion:
    """How tightly each query's boxes lie: ``query (box,)`` and ``centres (box, [y, x])``.

    Give centres as shares of the image's height and width, so that images of all sizes count alike. Boxes with a
    NaN centre do not count. Queries with one box have no dispersion; without any other, all is NaN.
    """
    places = np.asarray(centres, np.float64).reshape(-1, 2)
    numbers = np.asarray(query, np.int64).reshape(-1)
    if numbers.size != len(places):
        raise UsageError(f"centre_dispersion: {numbers.size} queries but {len(places)} centres")
    known = np.isfinite(places).all(1)
    numbers, places = numbers[known], places[known]
    names, code = np.unique(numbers, return_inverse=True)
    count = np.bincount(code, minlength=names.size)
    if not (count > 1).any():
        return Dispersion({}, _NAN, _NAN, _NAN)
    spread = _spread(code, places, count)
    within = _weighted(spread, count)
    rng = np.random.default_rng(seed)
    null = np.array([_weighted(_spread(code, rng.permutation(places), count), count) for _ in range(permutations)])
    p = (int((null <= within + 1e-12).sum()) + 1) / (permutations + 1)
    found = {int(name): float(spread[i]) for i, name in enumerate(names) if count[i] > 1}
    return Dispersion(found, within, float(null.mean()), p)


def _spread(code: NDArray[np.intp], places: NDArray[np.float64], count: NDArray[np.intp]) -> NDArray[np.float64]:
    """RMS distance to the mean of each group, ``(group,)``."""
    mean = np.stack([np.bincount(code, axis, count.size) / count for axis in places.T], -1)
    away = ((places - mean[code]) ** 2).sum(1)
    return np.asarray(np.sqrt(np.bincount(code, away, count.size) / count))


def _weighted(spread: NDArray[np.float64], count: NDArray[np.intp]) -> float:
    some = count > 1
    return float((spread * count)[some].sum() / count[some].sum())


def _codes(labels: ArrayLike) -> NDArray[np.intp]:
    return np.asarray(np.unique(np.asarray(labels).reshape(-1), return_inverse=True)[1].reshape(-1))


def _table(x: NDArray[np.intp], y: NDArray[np.intp]) -> NDArray[np.float64]:
    """How often each pair occurs, ``(x, y)``."""
    rows, columns = (int(code.max()) + 1 if code.size else 0 for code in (x, y))
    flat = np.bincount(x * columns + y, minlength=rows * columns) if x.size else np.zeros(0)
    return np.asarray(flat.reshape(rows, columns), np.float64)


def _information(joint: NDArray[np.float64]) -> float:
    total = joint.sum()
    if not total:
        return float("nan")
    p = joint / total
    expected = np.outer(p.sum(1), p.sum(0))
    some = p > 0
    return max(0.0, float((p[some] * np.log(p[some] / expected[some])).sum()))
