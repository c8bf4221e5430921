"""Published summaries: rows against each other, every inequality, and the joint bound on the means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from foveate.metrics.audit import bounds
from foveate.metrics.audit.bounds import Array
from foveate.metrics.audit.relations import SLACK, Relation, relations
from foveate.metrics.audit.tables import Reported, SummaryTable
from foveate.metrics.audit.verdict import Finding

Rows = Mapping[str, Reported]


def summary_findings(table: SummaryTable, K: int) -> Iterator[Finding]:
    """Everything that speaks against the table on K keys, the costly linear programme last."""
    for name, rows in table.statistics.items():
        yield from _order(name, rows)
        yield from _bhatia_davis(name, rows)
        yield from _whole_counts(name, rows)
    for relation in relations(K):
        for row, other in _linked_rows(relation):
            yield from _by_relation(table, relation, row, other)
    yield from _joint_means(table, K)


def _linked_rows(relation: Relation) -> Iterator[tuple[str, str]]:
    """Which rows of the two statistics a monotone bound links."""
    yield "mean", "mean"
    yield from (("min", "min"), ("max", "max")) if relation.rises else (("max", "min"), ("min", "max"))


def _by_relation(table: SummaryTable, relation: Relation, row: str, other: str) -> Iterator[Finding]:
    value = table.statistics.get(relation.statistic, {}).get(row)
    given = table.statistics.get(relation.given, {}).get(other) if relation.given else value
    if value is None or given is None:
        return
    upper = relation.side == "<="
    lenient = given.high if relation.rises == upper else given.low
    limit = np.asarray(relation.bound(np.asarray(lenient)))
    if not relation.broken(np.asarray(value.low if upper else value.high), limit):
        return
    condition = f" (given the {other} {relation.given} {given.value:.4g})" if relation.given else ""
    formula = relation.formula + condition
    yield Finding(relation.statistic, row, value.value, relation.side, float(limit), formula, relation.severity)


def _order(name: str, rows: Rows) -> Iterator[Finding]:
    """min <= mean <= max, and no negative standard deviation."""
    for smaller, larger in (("min", "mean"), ("mean", "max"), ("min", "max")):
        if smaller in rows and larger in rows and rows[smaller].low > rows[larger].high + SLACK[name]:
            yield Finding(name, smaller, rows[smaller].value, "<=", rows[larger].value, f"{smaller} <= {larger}")
    if "std" in rows and rows["std"].high < 0:
        yield Finding(name, "std", rows["std"].value, ">=", 0.0, "a standard deviation is >= 0")


def _bhatia_davis(name: str, rows: Rows) -> Iterator[Finding]:
    """std <= sqrt((max - mean)(mean - min)), Bhatia and Davis 2000, Am. Math. Mon. 107, 353-357.

    With n - 1 in the denominator (pandas) it may exceed that by sqrt(n / (n - 1)), at most sqrt 2.
    """
    if not {"mean", "std", "min", "max"} <= set(rows):
        return
    above = max(rows["max"].high - rows["mean"].low, 0.0)
    below = max(rows["mean"].high - rows["min"].low, 0.0)
    limit = float(np.sqrt(above * below)) * (1 + 1e-6) + SLACK[name]
    n = max(rows["count"].value if "count" in rows else 2.0, 2.0)
    if rows["std"].low <= limit:
        return
    formula = "std <= sqrt((max - mean)(mean - min)) (Bhatia & Davis 2000)"
    sure = rows["std"].low > limit * float(np.sqrt(n / (n - 1)))
    yield Finding(name, "std", rows["std"].value, "<=", limit, formula, "impossible" if sure else "suspicious")


def _whole_counts(name: str, rows: Rows) -> Iterator[Finding]:
    formula = "one row's count is a whole number (unless it is a mean over heads)"
    for row in ("min", "max"):
        if name == "count" and row in rows and rows[row].value != np.floor(rows[row].value):
            yield Finding(
                name, row, rows[row].value, "<=", float(np.floor(rows[row].value)), formula, "suspicious"
            )


def _joint_means(table: SummaryTable, K: int) -> Iterator[Finding]:
    """The mean entropy against the means of concentration and count together, by linear programming."""
    k = bounds.taken(K, 0.1)
    entropy, top, count = (table.statistics.get(name, {}) for name in ("entropy", "top10", "count"))
    if k == 0 or not all("mean" in rows for rows in (entropy, top, count)):
        return
    at_means = bounds.entropy_given_top_and_count(max(top["mean"].value, k / K), count["mean"].value, K, k)
    if entropy["mean"].low <= at_means:
        return  # images that are all alike would do
    points = _points(top, count, K, k)
    ceiling = bounds.mean_ceiling(
        points,
        bounds.entropy_given_top_and_count(points[:, 0], points[:, 1], K, k),
        [top["mean"].low, count["mean"].low],
        [top["mean"].high, count["mean"].high],
    )
    given = f"the mean top-10% mass {top['mean'].value:.4g} and the mean count {count['mean'].value:.4g}"
    if np.isnan(ceiling):
        return  # the means of concentration and count contradict each other: said by their own relation
    if entropy["mean"].low > ceiling + SLACK["entropy"]:
        formula = f"largest mean entropy given {given} (linear programme over images)"
        yield Finding("entropy", "mean", entropy["mean"].value, "<=", ceiling, formula)


def _points(top: Rows, count: Rows, K: int, k: int) -> Array:
    """(concentration, count) that single images may have, dense enough for the programme above.

    120 x 81 points: linear interpolation between them is within 5e-4 nats of the concave bound.
    """
    least, most = (top["min"].low if "min" in top else 0.0), (top["max"].high if "max" in top else 1.0)
    few = max(count["min"].low if "min" in count else 0.0, 0.0)
    many = min(count["max"].high if "max" in count else float(K), float(K))
    masses = np.linspace(max(least, k / K), max(min(most, 1.0), k / K), 120)
    counts = np.unique(np.append(np.linspace(few, max(few, many), 80), np.clip(k, few, max(few, many))))
    mesh = np.meshgrid(masses, counts, indexing="ij")
    return np.stack([axis.ravel() for axis in mesh], axis=1)
