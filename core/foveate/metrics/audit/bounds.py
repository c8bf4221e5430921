r"""What the statistics of one attention row over K keys can be, together.

p is the row scaled to sum to 1; H its entropy in nats, c_k the mass of its k strongest keys, n the number of keys
above 1/K, s the standard deviation of the weights, m the largest. The study's s and (perhaps) m are of raw
weights whose sum may be below 1; every bound here holds for raw and for scaled weights alike, so that a row can
never fail by its convention.

Every maximum of H follows from concavity: given the constraints, spread what is left as evenly as they allow
(Cover and Thomas 2006, Elements of Information Theory, ch. 12).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


def xlogx(values: ArrayLike) -> Array:
    """x ln x with 0 ln 0 = 0; NaN below 0."""
    x = np.asarray(values, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.where(x > 0, x * np.log(np.where(x > 0, x, 1.0)), np.where(x == 0, 0.0, np.nan))


def entropy_at_most(K: int) -> float:
    """H <= ln K."""
    return float(np.log(K))


def spread_at_most(K: int) -> float:
    """s <= sqrt(K - 1) / K, reached by a single key of weight 1 (Popoviciu-type bound at fixed sum)."""
    return float(np.sqrt(K - 1) / K)


def taken(K: int, fraction: float) -> int:
    """Keys in the top fraction, as the study counts them: int(fraction K)."""
    return int(K * fraction)


def spike_entropy(m: ArrayLike, K: int) -> Array:
    """Largest H of a row whose strongest key has weight m >= 1/K: the rest uniform. Falls with m."""
    weight = np.clip(np.asarray(m, dtype=np.float64), 1 / K, 1.0)
    return np.asarray(-xlogx(weight) - xlogx(1 - weight) + (1 - weight) * np.log(K - 1))


def spike_of_spread(s: ArrayLike, K: int) -> Array:
    """Weight a of the one strong key over a uniform rest that gives the spread s: a = 1/K + s sqrt(K - 1)."""
    return np.asarray(np.minimum(1 / K + np.asarray(s, dtype=np.float64) * np.sqrt(K - 1), 1.0))


def entropy_given_spread(s: ArrayLike, K: int) -> Array:
    """Largest H given the spread: at fixed sum p^2 it is a spike over a uniform rest.

    Harremoes and Topsoe 2001, IEEE Trans. Inf. Theory 47, 2944-2960.
    """
    return spike_entropy(spike_of_spread(s, K), K)


def entropy_given_top(c: ArrayLike, K: int, k: int) -> Array:
    """Largest H given the mass c of the k strongest keys: both groups uniform. Falls with c >= k/K."""
    mass = np.clip(np.asarray(c, dtype=np.float64), k / K, 1.0)
    return np.asarray(-xlogx(mass) - xlogx(1 - mass) + mass * np.log(k) + (1 - mass) * np.log(K - k))


def entropy_given_top_and_count(c: ArrayLike, n: ArrayLike, K: int, k: int) -> Array:
    """Largest H given c and the number n of keys above 1/K; NaN where no row has both.

    With n > k the n - k keys between are at their least, 1/K; with n < k the k - n weakest of the top are at
    their most, 1/K.
    """
    mass, count = np.broadcast_arrays(np.asarray(c, dtype=np.float64), np.asarray(n, dtype=np.float64))
    between = np.abs(count - k) / K  # mass of the keys held at 1/K
    strong = np.where(count >= k, mass, mass - between)
    weak = np.where(count >= k, 1 - mass - between, 1 - mass)
    with np.errstate(divide="ignore", invalid="ignore"):
        held = between * np.log(K)
        total = held + _group(strong, np.minimum(count, k)) + _group(weak, np.minimum(K - count, K - k))
    return np.where((mass < k / K - 1e-12), np.nan, total)


def _group(mass: Array, keys: Array) -> Array:
    """Entropy share of ``mass`` spread evenly over ``keys``: -mass ln(mass / keys)."""
    empty = (mass <= 1e-12) & (mass >= -1e-12)
    inside = np.where(mass > 0, mass, np.nan)
    return np.where(empty, 0.0, -inside * np.log(inside / np.where(keys > 0, keys, np.nan)))


def count_given_top(c: ArrayLike, K: int, k: int) -> Array:
    """n <= k + K (1 - c): each of the n - k further keys above 1/K needs that much of the rest."""
    return np.asarray(k + K * (1 - np.asarray(c, dtype=np.float64)))


def max_at_least(s: ArrayLike, K: int) -> Array:
    """m >= K s^2 + 1/K where K s >= 1, else 2 s; from sum a^2 <= m sum a, at the sum that needs least."""
    spread = np.asarray(s, dtype=np.float64)
    return np.where(K * spread >= 1, K * spread**2 + 1 / K, 2 * spread)


def entropy_at_least(c: ArrayLike, K: int, k: int) -> Array:
    """H >= -ln max p, and max p <= c - (k - 1)(1 - c)/(K - k), since the top k are no weaker than the rest."""
    mass = np.clip(np.asarray(c, dtype=np.float64), k / K, 1.0)
    return np.asarray(-np.log(mass - (k - 1) * (1 - mass) / (K - k)))


def wider_top(c: ArrayLike, K: int, k: int, wider: int) -> tuple[Array, Array]:
    """Least and most mass of the ``wider`` strongest keys, given the mass c of the k strongest.

    The next keys are no weaker than the mean of the rest, and no stronger than the mean of the top.
    """
    mass = np.asarray(c, dtype=np.float64)
    least = mass + (1 - mass) * (wider - k) / (K - k)
    return np.asarray(least), np.asarray(np.minimum(mass * wider / k, 1.0))


def mean_ceiling(points: Any, values: Any, low: Any, high: Any) -> float:
    """Largest mean of ``values`` over any mixture of ``points`` whose own mean lies in [low, high].

    Each image is one point (n, d) with at most that value (n,); over images any mixture may occur. A linear
    programme over the mixture weights; NaN where no mixture has such a mean.
    """
    from scipy.optimize import linprog

    points, values = np.atleast_2d(np.asarray(points, dtype=np.float64)), np.asarray(values, dtype=np.float64)
    usable = np.isfinite(values)
    points, values = points[usable], values[usable]
    if not len(values):
        return float("nan")
    scale = np.maximum(np.abs(points).max(axis=0), 1e-12)
    limits = np.vstack([points.T / scale[:, None], -points.T / scale[:, None]])
    ends = np.concatenate([np.atleast_1d(high) / scale, -np.atleast_1d(low) / scale])
    answer = linprog(
        -values,
        A_ub=limits,
        b_ub=ends,
        A_eq=np.ones((1, len(values))),
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
    )
    return float(-answer.fun) if answer.success else float("nan")
