"""The audit itself: which numbers of a table cannot be, for each number of keys that it may be about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from foveate.errors import UsageError
from foveate.metrics.audit.images import image_findings
from foveate.metrics.audit.summary import summary_findings
from foveate.metrics.audit.tables import SummaryTable, Table, read_tables
from foveate.metrics.audit.verdict import Audit, Finding, Verdict

CANDIDATES = (49, 196, 256, 576, 729, 1024)
"""Numbers of patches tried where a table does not say: 7, 14, 16, 24, 27 and 32 squared."""
SQUARES = tuple(side * side for side in range(4, 65))
"""Square grids among which :attr:`Audit.fitting` is sought."""

MINMAX_NOTE = (
    "a spread above sqrt(K-1)/K cannot be the standard deviation of attention weights; "
    "that of a map scaled to [0, 1] by its own extremes can (foveate's spread_minmax)"
)


def audit_file(path: Path | str, tokens: Sequence[int] = ()) -> list[Audit]:
    """Audit every table in a CSV, Parquet or Markdown file.

    ``tokens`` are the numbers of keys to try; by default the one that the file (or its provenance sidecar)
    states, else :data:`CANDIDATES`. Raises UsageError where the file holds no such table.
    """
    return [audit(table, tokens) for table in read_tables(Path(path))]


def audit(table: Table, tokens: Sequence[int] = ()) -> Audit:
    """Audit one table. Raises UsageError for fewer than 2 keys."""
    tried = tuple(tokens) or ((table.tokens,) if table.tokens else CANDIDATES)
    if min(tried) < 2:
        raise UsageError(f"audit: {min(tried)} keys, expected at least 2", remedy="--tokens 576")
    verdicts = tuple(Verdict(K, tuple(findings(table, K))) for K in tried)
    summary = isinstance(table, SummaryTable)
    return Audit(
        title=table.title,
        kind="summary" if summary else "per image",
        statistics=tuple(table.statistics if isinstance(table, SummaryTable) else table.columns),
        rows=1 if isinstance(table, SummaryTable) else len(table.ids),
        stated=table.tokens,
        verdicts=verdicts,
        fitting=tuple(K for K in SQUARES if not any(f.severity == "impossible" for f in findings(table, K))),
        notes=(MINMAX_NOTE,) if any(_spread_too_large(verdict) for verdict in verdicts) else (),
    )


def findings(table: Table, K: int) -> Iterable[Finding]:
    """Everything that rules the table out, or makes it doubtful, on K keys."""
    return summary_findings(table, K) if isinstance(table, SummaryTable) else image_findings(table, K)


def _spread_too_large(verdict: Verdict) -> bool:
    return any(f.statistic == "spread" and f.severity == "impossible" and f.side == "<=" for f in verdict.findings)
