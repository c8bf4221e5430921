"""How much of a row its strongest keys hold.

The number of keys in "the top 10 %" is ``ceil(K / 10)``, computed in integers, and the lift divides the mass by
the share of keys that were really taken: a uniform row has lift 1 on every grid. Counts above the mean are
given as shares of K, with stricter thresholds beside it, since the share above c/K is below 1/c for any row.
"""

from __future__ import annotations

from typing import Any, ClassVar

from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import TIE, descending, namespace, normalise, ranks

LORENZ = "Lorenz 1905, Publ. Am. Stat. Assoc. 9, 209-219 (a point of the concentration curve)"
LIFT = "Brin et al. 1997, SIGMOD, sec. 3 (lift: share observed over share expected by chance)"


def top_count(count: Any, percent: int) -> Any:
    """ceil(percent K / 100), exact: ``ceil(0.1 * 30)`` in floating point is 4."""
    xp = namespace(count)
    return xp.floor((count * percent + 99) / 100)


def top_mass(p: Any, taken: Any) -> Any:
    """Mass of the ``taken`` largest of each row, ``(..., key)`` and ``(...)`` to ``(...)``."""
    xp = namespace(p)
    strongest = descending(p)
    inside = ranks(p) <= taken[..., None]
    mass = xp.sum(xp.where(inside, strongest, xp.zeros_like(p)), axis=-1)
    return xp.where(xp.isnan(p[..., 0]), p[..., 0], mass)


class _TopMass(Metric):
    percent: ClassVar[int]

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to the mass of the top keys, ``(..., query)``."""
        p, count = normalise(rows)
        return top_mass(p, top_count(count, self.percent))


class _TopLift(Metric):
    percent: ClassVar[int]

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to mass over share of keys, ``(..., query)``."""
        p, count = normalise(rows)
        taken = top_count(count, self.percent)
        return top_mass(p, taken) * count / taken


class Top10Mass(_TopMass):
    """Mass of the strongest tenth of the keys."""

    percent = 10
    info = MetricInfo(
        name="top10_mass",
        summary="mass of the ceil(K/10) strongest keys",
        unit="1",
        citation=LORENZ,
        bounds=(0.1, 1.0),
    )


class Top25Mass(_TopMass):
    """Mass of the strongest quarter of the keys."""

    percent = 25
    info = MetricInfo(
        name="top25_mass",
        summary="mass of the ceil(K/4) strongest keys",
        unit="1",
        citation=LORENZ,
        bounds=(0.25, 1.0),
    )


class Top10Lift(_TopLift):
    """Mass of the strongest tenth over what a uniform row would give it."""

    percent = 10
    info = MetricInfo(
        name="top10_lift",
        summary="mass of the ceil(K/10) strongest keys over their share of the keys; 1 = uniform",
        unit="x uniform",
        citation=LIFT,
        bounds=(1.0, 10.0),
    )


class Top25Lift(_TopLift):
    """Mass of the strongest quarter over what a uniform row would give it."""

    percent = 25
    info = MetricInfo(
        name="top25_lift",
        summary="mass of the ceil(K/4) strongest keys over their share of the keys; 1 = uniform",
        unit="x uniform",
        citation=LIFT,
        bounds=(1.0, 4.0),
    )


class _Above(Metric):
    times: ClassVar[int]

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to the share of keys above ``times / K``, ``(..., query)``."""
        p, count = normalise(rows)
        xp = namespace(p)
        above = p * count[..., None] > self.times * (1 + TIE)
        share = xp.sum(above, axis=-1) / count
        return xp.where(xp.isnan(p[..., 0]), p[..., 0], share)


class Above1x(_Above):
    """Share of keys with more than the uniform weight."""

    times = 1
    info = MetricInfo(
        name="above_1x",
        summary="share of keys with p > 1/K",
        unit="1",
        citation=LIFT,
        bounds=(0.0, 1.0),
    )


class Above2x(_Above):
    """Share of keys with more than twice the uniform weight."""

    times = 2
    info = MetricInfo(
        name="above_2x",
        summary="share of keys with p > 2/K, below 1/2",
        unit="1",
        citation=LIFT,
        bounds=(0.0, 0.5),
    )


class Above5x(_Above):
    """Share of keys with more than five times the uniform weight."""

    times = 5
    info = MetricInfo(
        name="above_5x",
        summary="share of keys with p > 5/K, below 1/5",
        unit="1",
        citation=LIFT,
        bounds=(0.0, 0.2),
    )


class MaxWeight(Metric):
    """The strongest key's weight."""

    info = MetricInfo(
        name="max_weight",
        summary="largest weight of the row, max p, at least 1/K",
        unit="1",
        citation="Berger and Parker 1970, Science 168, 1345-1347 (dominance)",
        bounds=(0.0, 1.0),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to max p, ``(..., query)``."""
        p = normalise(rows).p
        return namespace(p).amax(p, axis=-1)


class MaxLift(Metric):
    """The strongest key's weight over the uniform weight."""

    info = MetricInfo(
        name="max_lift",
        summary="largest weight over the uniform weight, K max p; 1 = uniform",
        unit="x uniform",
        citation=LIFT,
        bounds=(1.0, float("inf")),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to K max p, ``(..., query)``."""
        p, count = normalise(rows)
        return namespace(p).amax(p, axis=-1) * count
