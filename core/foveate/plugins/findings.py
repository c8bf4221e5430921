"""What a health check says: one row of ``foveate doctor``.

Plugins return these from their checks, so the word is kept apart from the doctor that prints it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "info", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """``section`` and ``name`` say what was looked at; ``fail`` makes ``foveate doctor`` exit with 3."""

    section: str
    name: str
    status: Status
    detail: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        """The row as plain strings, for ``--json``."""
        return asdict(self)
