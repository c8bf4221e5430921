"""The inequalities that every attention row obeys, as a table: which statistic, given which other.

A bound that depends on another statistic is concave where it is an upper and convex where it is a lower one, so
that by Jensen's inequality it holds between means over images (and heads) too; it is monotone, so that it
links least and largest values. One table therefore judges single images and published summaries alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveate.metrics.audit import bounds
from foveate.metrics.audit.bounds import Array

Severity = Literal["impossible", "suspicious"]
Side = Literal["<=", ">="]


@dataclass(frozen=True)
class Relation:
    """``statistic <= bound(given)`` (or ``>=``) for every row of attention over K keys.

    ``given`` None: the bound is a constant (its argument is ignored). ``rises``: the bound grows with it.
    """

    statistic: str
    side: Side
    bound: Callable[[Array], Array]
    formula: str
    given: str | None = None
    rises: bool = False
    severity: Severity = "impossible"

    def broken(self, value: Array, bound: Array) -> Array:
        """Which values are beyond the bound by more than rounding in single precision explains (bool)."""
        slack = SLACK[self.statistic] + 1e-3 * np.abs(bound) * (self.statistic in ("spread", "max"))
        beyond = value - bound if self.side == "<=" else bound - value
        with np.errstate(invalid="ignore"):
            return np.asarray(beyond > slack)


SLACK = {
    "entropy": 1e-3,
    "entropy_normalised": 1e-3,
    "top10": 1e-4,
    "top25": 1e-4,
    "count": 1e-2,
    "spread": 1e-7,
    "max": 1e-7,
}
"""Absolute slack: float32 sums and the study's 1e-8 and 1e-10 stay far inside."""


def relations(K: int) -> list[Relation]:
    """Every inequality for rows over K >= 2 keys."""
    return (
        _alone(K)
        + _between(K)
        + [r for name, share in (("top10", 0.1), ("top25", 0.25)) for r in _top(K, name, share)]
    )


def _constant(value: float) -> Callable[[Array], Array]:
    return lambda given: np.full(np.shape(given), value)


def _limit(statistic: str, side: Side, value: float, formula: str, severity: Severity = "impossible") -> Relation:
    return Relation(statistic, side, _constant(value), formula, severity=severity)


def _alone(K: int) -> list[Relation]:
    return [
        _limit("entropy", ">=", 0.0, "H >= 0"),
        _limit("entropy", "<=", bounds.entropy_at_most(K), f"H <= ln {K}"),
        _limit("entropy_normalised", ">=", 0.0, "H / ln K >= 0"),
        _limit("entropy_normalised", "<=", 1.0, "H / ln K <= 1"),
        _limit("spread", ">=", 0.0, "std >= 0"),
        _limit("spread", "<=", bounds.spread_at_most(K), f"std <= sqrt({K} - 1)/{K}: one key of weight 1"),
        _limit("count", ">=", 0.0, "count >= 0"),
        _limit("count", "<=", float(K), f"no more than {K} keys exist"),
        _limit("count", "<=", K - 1.0, f"at most {K} - 1 keys can exceed their own mean", "suspicious"),
        _limit("max", ">=", 0.0, "max >= 0"),
        _limit("max", "<=", 1.0, "weights sum to at most 1"),
    ]


def _between(K: int) -> list[Relation]:
    return [
        Relation(
            "entropy",
            "<=",
            lambda s: bounds.entropy_given_spread(s, K),
            "largest entropy at this std: one strong key over a uniform rest (Harremoes & Topsoe 2001)",
            "spread",
        ),
        Relation(
            "entropy",
            "<=",
            lambda m: bounds.spike_entropy(m, K),
            "largest entropy with this strongest key: a uniform rest",
            "max",
        ),
        Relation(
            "max",
            ">=",
            lambda s: bounds.max_at_least(s, K),
            "sum of squares <= max x sum: max >= K std^2 + 1/K (2 std where K std < 1)",
            "spread",
            rises=True,
        ),
    ]


def _top(K: int, name: str, share: float) -> list[Relation]:
    k = bounds.taken(K, share)
    if k == 0:
        return []
    alone = [
        _limit(name, ">=", k / K, f"the {k} strongest of {K} keys hold at least {k}/{K}"),
        _limit(name, "<=", 1.0, "weights sum to 1"),
        Relation(
            "entropy",
            "<=",
            lambda c: bounds.entropy_given_top(c, K, k),
            f"largest entropy with this mass on the {k} strongest of {K} keys: both groups uniform",
            name,
        ),
        Relation(
            "entropy",
            ">=",
            lambda c: bounds.entropy_at_least(c, K, k),
            f"H >= -ln max p, and max p is limited by the mass of the {k} strongest",
            name,
        ),
        Relation(
            "count",
            "<=",
            lambda c: bounds.count_given_top(c, K, k),
            f"count <= {k} + {K} (1 - mass of the {k} strongest)",
            name,
        ),
    ]
    return alone + (_wider(K, k) if name == "top10" else [])


def _wider(K: int, k: int) -> list[Relation]:
    wider = bounds.taken(K, 0.25)
    return [
        Relation("max", "<=", np.asarray, "the strongest key is one of the top 10 %", "top10", rises=True),
        Relation(
            "top25",
            ">=",
            lambda c: bounds.wider_top(c, K, k, wider)[0],
            "top 25 % >= top 10 % + the share that a uniform rest would add",
            "top10",
            rises=True,
        ),
        Relation(
            "top25",
            "<=",
            lambda c: bounds.wider_top(c, K, k, wider)[1],
            "keys after the top 10 % are no stronger than those in it",
            "top10",
            rises=True,
        ),
    ]
