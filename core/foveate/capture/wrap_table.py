"""The table of sites that a wrapped model prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from foveate.capture.wrap_group import FoundSite

if TYPE_CHECKING:
    from foveate.capture.wrap import Wrapped

HEADER = ("site", "layers", "calls", "kind", "form", "batch", "heads", "queries x keys", "because")


def table(wrapped: Wrapped) -> str:
    """One line a site, then what is no attention by the tap's word."""
    rows = [HEADER, *(_row(found) for found in wrapped.sites.values())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    lines = [_line(row, widths) for row in rows]
    title = f"{type(wrapped.module).__name__}: {len(wrapped.calls)} attention calls in {len(wrapped.sites)} sites"
    notes = []
    if wrapped.elsewhere:
        softmaxes = ", ".join(f"{path or 'the model'} x {n}" for path, n in wrapped.elsewhere.items())
        notes.append(f"softmaxes that met no values, taken for no attention: {softmaxes}")
    if not wrapped.identical:
        notes.append("outputs differed between two forwards on the same input (is the model random?)")
    return "\n".join([title, *lines, *notes])


def _row(found: FoundSite) -> tuple[str, ...]:
    shape = found.shape
    batch = str(shape.batch) if found.per_sample == 1 else f"{shape.batch} ({found.per_sample} a sample)"
    return (
        found.site.id,
        _ranges(found.site.layers),
        str(len(found.calls)),
        found.site.kind,
        found.site.form,
        batch,
        str(shape.heads),
        f"{shape.queries} x {shape.keys}",
        found.reason,
    )


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])


def _ranges(numbers: Sequence[int]) -> str:
    """``0-11`` or ``0,2,4-6``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
