"""Proof that what was captured is what the model used.

Every call is checked on a few rows spread over its queries: P V must equal the module's own output and rows
must sum to one. A swapped head, a lost scale, mask or bias, a transposed matrix or active dropout fails.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from foveate.capture.records import Check, Record
from foveate.errors import CaptureError
from foveate.interfaces import CallKey

CHECKED_ROWS = 8

TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 4e-2,
}
"""Largest relative P V error by the model's dtype: several times the rounding of its own kernel (measured:
2e-7 in float32, 2e-3 in bfloat16), far below any mistake (0.1 and more)."""
ROW_TOLERANCE: dict[torch.dtype, float] = {**TOLERANCE, torch.float32: 1e-5}


def spread(queries: int, count: int = CHECKED_ROWS) -> list[int]:
    """Up to ``count`` positions over ``queries``, the first and the last among them."""
    if queries <= count:
        return list(range(queries))
    return [round(i * (queries - 1) / (count - 1)) for i in range(count)]


def check_record(record: Record) -> Check:
    """Check a record on rows spread over its queries."""
    return record.certificate(spread(record.shape.queries))


@dataclass(frozen=True)
class Certificate:
    """What was proved about one forward.

    ``checks`` holds one :class:`~foveate.capture.records.Check` a call; ``undeclared`` counts attention
    calls of modules that no site declares and the source does not ignore.
    """

    checks: Mapping[CallKey, Check]
    undeclared: Mapping[str, int] = field(default_factory=dict)

    @property
    def value_error(self) -> float:
        """Worst relative difference between P V and a module's own output; NaN where none could be compared."""
        known = [check.value_error for check in self.checks.values() if not math.isnan(check.value_error)]
        return max(known, default=math.nan)

    @property
    def row_error(self) -> float:
        """Worst |row sum - 1|."""
        errors = [check.row_error for check in self.checks.values()]
        return math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)

    @property
    def unverified(self) -> tuple[CallKey, ...]:
        """Calls whose product with values the tap did not see."""
        return tuple(call for call, check in self.checks.items() if math.isnan(check.value_error))

    @property
    def masked_rows(self) -> int:
        """Rows among those checked that see no key; they are zero."""
        return sum(check.masked_rows for check in self.checks.values())

    @property
    def failures(self) -> tuple[str, ...]:
        """One line for each call that is not exact."""
        return tuple(line for call, check in self.checks.items() if (line := _failure(call, check)))

    @property
    def passed(self) -> bool:
        """Whether every call is exact."""
        return not self.failures

    def require(self) -> None:
        """Raise CaptureError where a call failed."""
        if self.failures:
            shown = self.failures[:6]
            more = len(self.failures) - len(shown)
            lines = [*shown, f"and {more} more calls"] if more else shown
            raise CaptureError(
                "capture: recorded attention does not reproduce the model's output\n  " + "\n  ".join(lines),
                remedy="put the model in eval mode (no dropout); check for NaN weights and for a wrong site",
            )

    def summary(self) -> dict[str, float | int | bool | list[str]]:
        """The certificate as plain values, for a store's attributes."""
        return {
            "passed": self.passed,
            "calls": len(self.checks),
            "value_error": self.value_error,
            "row_error": self.row_error,
            "masked_rows": self.masked_rows,
            "unverified_calls": len(self.unverified),
            "undeclared_modules": sorted(self.undeclared),
        }


def _failure(call: CallKey, check: Check) -> str:
    where = f"{call.site} layer {call.layer} call {call.number}"
    if check.value_error > TOLERANCE.get(check.dtype, 1e-4):
        return f"{where}: P V differs from the output by {check.value_error:.1e} of its maximum ({check.dtype})"
    if not check.row_error <= ROW_TOLERANCE.get(check.dtype, 1e-5):
        return f"{where}: rows sum to 1 only within {check.row_error:.1e} ({check.dtype})"
    return ""
