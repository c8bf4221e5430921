"""A comparison in words and numbers: text for a terminal, rows for CSV, a dictionary for JSON."""

from __future__ import annotations

import csv
import io
import math
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from foveate.compare.agreement import Measured, Result
    from foveate.compare.shape import ShapeRow
    from foveate.stats.intervals import Interval

WIDTH = 120
FEW_IMAGES = 20
_DIRECTION = {
    "spearman": "1 = same order, 0 = unrelated",
    "top_overlap": "share of the top 10 % of cells in common",
    "js_divergence": "bits, 0 = same, 1 = disjoint",
}


def to_text(result: Result, shapes: Sequence[ShapeRow] = ()) -> str:
    """Everything, for people."""
    lines = [f"{result.models[0]} (A) and {result.models[1]} (B): {result.rule}", ""]
    if result.reasons:
        lines += ["No score: " + "; ".join(result.reasons) + ".", *_wrapped(result.notes)]
        return "\n".join(lines) + "\n"
    lines += _table(
        ("measure", "same image", "other images", "excess [95 %]", "verdict", "meaning"),
        [_measure_line(name, one) for name, one in result.measures.items()],
    )
    if shapes:
        lines += ["", *_table(("shape", "A", "B", "A - B [95 %]", "higher", "meaning"), map(_shape_line, shapes))]
    return "\n".join([*lines, "", *_wrapped(caption(result))]) + "\n"


def caption(result: Result) -> list[str]:
    """n, canvas, what was lost, what the null is, and what the numbers do not say."""
    meeting = result.meeting
    if meeting is None:
        return list(result.notes)
    lost = [float(np.nanmean(values)) if np.isfinite(values).any() else float("nan") for values in _lost(result)]
    n = len(result.kept)
    lines = [
        f"n = {n} image{'s' * (n != 1)}. Maps laid by area on the grid of {meeting.coarser.upper()} "
        f"({meeting.shape[0]} x {meeting.shape[1]}, the coarser), where both models saw the picture "
        f"({float(np.mean(meeting.shared)):.0%} of its area on average). Mass lost outside: A {lost[0]:.1%}, "
        f"B {lost[1]:.1%}.",
        "Other images: mean agreement of A's map of one image with B's map of another, the share that habits "
        "explain. Excess: same minus other (sign turned for a divergence), 95 % bootstrap interval over images; "
        "verdict by the interval and Wilcoxon's test with Holm's correction.",
        "Agreement between models does not say that either is right, or that either map explains its model.",
        *result.notes,
    ]
    if n < 2:
        lines.insert(1, "One image: no null, no interval, no verdict.")
    elif n < FEW_IMAGES:
        lines.insert(1, f"Only {n} images: intervals are rough.")
    return lines


def to_dict(result: Result, shapes: Sequence[ShapeRow] = ()) -> dict[str, Any]:
    """Everything, for JSON."""
    meeting = result.meeting
    data: dict[str, Any] = {
        "models": list(result.models),
        "rule": str(result.rule),
        "reasons": list(result.reasons),
        "n": len(result.kept),
        "measures": {name: _measure_dict(one) for name, one in result.measures.items()},
        "shapes": [_shape_dict(row) for row in shapes],
        "caption": caption(result),
    }
    if meeting is not None:
        data["canvas"] = {
            "coarser": meeting.coarser,
            "rows": meeting.shape[0],
            "columns": meeting.shape[1],
            "shared_area": float(np.mean(meeting.shared)),
            "lost_a": float(np.nanmean(meeting.lost_a)),
            "lost_b": float(np.nanmean(meeting.lost_b)),
        }
    return data


def to_csv(result: Result, ids: Sequence[str]) -> str:
    """One line an image: shared area, lost mass, each measure beside its null. ``ids`` of the matched images."""
    buffer = io.StringIO()
    names = [f"{name}{part}" for name in result.measures for part in ("", "_null")]
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "shared_area", "lost_a", "lost_b", *names])
    if result.meeting is None:
        return buffer.getvalue()
    for row, image in enumerate(result.kept):
        meeting = result.meeting
        numbers = [meeting.shared[row], meeting.lost_a[row], meeting.lost_b[row]]
        for one in result.measures.values():
            numbers += [one.per_image.own[row], one.per_image.null[row]]
        writer.writerow([ids[image], *("" if math.isnan(x) else repr(float(x)) for x in numbers)])
    return buffer.getvalue()


def _lost(result: Result) -> tuple[np.ndarray, np.ndarray]:
    assert result.meeting is not None
    return result.meeting.lost_a, result.meeting.lost_b


def _measure_line(name: str, one: Measured) -> tuple[str, ...]:
    d = one.excess.difference
    return (
        name,
        _interval(one.own),
        _number(one.null.estimate),
        _interval(d, sign="+"),
        one.verdict,
        _DIRECTION.get(name, ""),
    )


def _shape_line(row: ShapeRow) -> tuple[str, ...]:
    return (
        row.name,
        _number(row.a.estimate),
        _number(row.b.estimate),
        _interval(row.difference.difference, sign="+"),
        {"a": "A", "b": "B"}.get(row.higher, row.higher),
        row.summary,
    )


def _measure_dict(one: Measured) -> dict[str, Any]:
    return {
        "own": one.own._asdict(),
        "null": one.null._asdict(),
        "excess": one.excess.difference._asdict(),
        "p_holm": one.excess.p_holm,
        "superiority": one.excess.superiority,
        "verdict": one.verdict,
    }


def _shape_dict(row: ShapeRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "a": row.a._asdict(),
        "b": row.b._asdict(),
        "difference": row.difference.difference._asdict(),
        "p_holm": row.difference.p_holm,
        "higher": row.higher,
    }


def _table(header: Sequence[str], rows: Any) -> list[str]:
    cells = [tuple(header), *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _wrapped(lines: Sequence[str]) -> list[str]:
    return [fill(line, WIDTH, subsequent_indent="  ") for line in lines]


def _interval(one: Interval, sign: str = "") -> str:
    bounds = f" [{_number(one.low, sign)}, {_number(one.high, sign)}]" if math.isfinite(one.low) else ""
    return f"{_number(one.estimate, sign)}{bounds}"


def _number(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}" if math.isfinite(value) else "n/a"
