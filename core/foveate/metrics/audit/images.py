"""Per-image tables: every image against every inequality."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from foveate.metrics.audit import bounds
from foveate.metrics.audit.bounds import Array
from foveate.metrics.audit.relations import Relation, relations
from foveate.metrics.audit.tables import ImageTable
from foveate.metrics.audit.verdict import Finding


def image_findings(table: ImageTable, K: int) -> list[Finding]:
    """One finding an inequality that is broken, with the worst image as example and the number of images."""
    empty = _rows_of_zeros(table)
    columns = {name: np.where(empty, np.nan, values) for name, values in table.columns.items()}
    found = [_zeros(table, empty)] if empty.any() else []
    for relation in relations(K):
        given = relation.given or relation.statistic
        if relation.statistic in columns and given in columns:
            limit = relation.bound(_lenient(table, relation, columns[given]))
            found += _worst(table, relation, columns[relation.statistic], limit)
    return found + _joint(table, columns, K)


def _rows_of_zeros(table: ImageTable) -> Array:
    """Rows without any attention: a fully masked or failed image gives zeros in every column."""
    return np.asarray(np.all([np.abs(values) < 1e-12 for values in table.columns.values()], axis=0))


def _zeros(table: ImageTable, empty: Array) -> Finding:
    first, count = str(table.ids[int(np.argmax(empty))]), int(empty.sum())
    formula = "every statistic is 0: there was no attention"
    return Finding("row", first, 0.0, ">=", 0.0, formula, "suspicious", count)


def _lenient(table: ImageTable, relation: Relation, given: Array) -> Array:
    """The other statistic as far as its rounding allows in the table's favour."""
    half = table.half.get(relation.given or "", 0.0)
    return given + half if relation.rises == (relation.side == "<=") else given - half


def _worst(table: ImageTable, relation: Relation, value: Array, limit: Array) -> list[Finding]:
    half = table.half.get(relation.statistic, 0.0)
    broken = relation.broken(value - half if relation.side == "<=" else value + half, limit)
    if not broken.any():
        return []
    worst = int(np.argmax(np.where(broken, np.abs(value - limit), -1.0)))
    return [
        Finding(
            relation.statistic,
            str(table.ids[worst]),
            float(value[worst]),
            relation.side,
            float(limit[worst]),
            relation.formula,
            relation.severity,
            int(broken.sum()),
        )
    ]


def _joint(table: ImageTable, columns: Mapping[str, Array], K: int) -> list[Finding]:
    """Entropy against concentration and count together."""
    k = bounds.taken(K, 0.1)
    if k == 0 or not {"entropy", "top10", "count"} <= set(columns):
        return []
    top = np.maximum(columns["top10"] - table.half.get("top10", 0.0), k / K)
    limit = bounds.entropy_given_top_and_count(top, columns["count"], K, k)
    relation = Relation("entropy", "<=", np.asarray, f"largest entropy with this top-{k} mass and count together")
    return _worst(table, relation, columns["entropy"], limit)
