"""What an audit says: findings, a verdict for each number of keys, and whether any fits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from foveate.metrics.audit.relations import Severity

NAMES = {
    "entropy": "entropy",
    "entropy_normalised": "entropy / ln K",
    "top10": "top-10% concentration",
    "top25": "top-25% concentration",
    "count": "high-attention count",
    "spread": "spread (std)",
    "max": "largest weight",
}
"""How findings call the statistics."""


@dataclass(frozen=True)
class Finding:
    """One number that cannot be, or hardly.

    ``where`` is the row of a summary ("mean", "max") or an example image; ``rows`` counts the images.
    ``bound`` is what the number would have to satisfy, by ``formula``.
    """

    statistic: str
    where: str
    reported: float
    side: str
    bound: float
    formula: str
    severity: Severity = "impossible"
    rows: int = 1

    def __str__(self) -> str:
        crowd = f" ({self.rows} rows)" if self.rows > 1 else ""
        opposite = ">" if self.side == "<=" else "<"
        return (
            f"{self.severity}: {self.where} {NAMES.get(self.statistic, self.statistic)}{crowd} "
            f"= {self.reported:.5g} {opposite} {self.bound:.5g}; {self.formula}"
        )


@dataclass(frozen=True)
class Verdict:
    """What holds if rows have ``tokens`` keys."""

    tokens: int
    findings: tuple[Finding, ...]

    @property
    def possible(self) -> bool:
        """Whether nothing rules it out."""
        return not any(finding.severity == "impossible" for finding in self.findings)


@dataclass(frozen=True)
class Audit:
    """One table's audit. ``stated`` is the number of keys that its source gives, if it does."""

    title: str
    kind: str
    statistics: tuple[str, ...]
    rows: int
    stated: int | None
    verdicts: tuple[Verdict, ...]
    fitting: tuple[int, ...]
    """Square grids (their number of keys) on which nothing rules the table out."""
    notes: tuple[str, ...] = ()

    @property
    def possible(self) -> bool:
        """Whether the table can be true: on the stated number of keys, or on any of those tried."""
        return any(verdict.possible for verdict in self.verdicts)

    def as_dict(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        plain = asdict(self)
        plain["possible"] = self.possible
        for row, verdict in zip(plain["verdicts"], self.verdicts, strict=True):
            row["possible"] = verdict.possible
        return plain
