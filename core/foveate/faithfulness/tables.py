"""The leaderboard as text, Markdown, CSV and JSON, with a caption that says what it shows and what it does not."""

from __future__ import annotations

import csv
import io
import math
from textwrap import fill
from typing import TYPE_CHECKING, Any

from foveate.faithfulness.captions import caption, localisation_names, number, words_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foveate.faithfulness.leaderboard import Leaderboard, Row
    from foveate.stats.intervals import Interval
    from foveate.stats.paired import Comparison

WIDTH = 120
"""Characters a line of the caption in a terminal."""
_AGREEMENT = {"spearman": "Captum rho", "top_overlap": "top 10 %"}


def to_text(board: Leaderboard) -> str:
    """The table with its caption, for a terminal."""
    header, *lines = _cells(board)
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    body = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    head = "  ".join(cell.ljust(w) for cell, w in zip(header, widths, strict=True)).rstrip()
    words = [fill(line, WIDTH, subsequent_indent="  ") for line in caption(board)]
    return "\n".join([title(board), "", head, "-" * len(head), *body, "", *words]) + "\n"


def to_markdown(board: Leaderboard) -> str:
    """The same as a Markdown table."""
    header, *lines = _cells(board)
    rows = ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines)]
    return "\n".join([f"**{title(board)}**", "", *rows, "", *(f"- {line}" for line in caption(board))]) + "\n"


def to_csv(board: Leaderboard) -> str:
    """One line a row, numbers in full; intervals as ``_low`` and ``_high`` columns."""
    records = [record(board, row) for row in board.rows]
    names = list(dict.fromkeys(name for one in records for name in one))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: "" if v is None else v for k, v in one.items()} for one in records)
    return buffer.getvalue()


def to_dict(board: Leaderboard) -> dict[str, Any]:
    """Everything, for JSON: facts, caption, rows, comparisons of the best method with each other row."""
    everything = {
        "title": title(board),
        "n": board.n,
        "main_protocol": board.main._asdict(),
        "protocols": [key._asdict() for key in board.protocols],
        "facts": dict(board.facts),
        "caption": caption(board),
        "rows": [record(board, row) for row in board.rows],
        "best_against": {name: _comparison(one) for name, one in board.pairwise.items()},
        "beyond": {c: {name: _comparison(one) for name, one in all_.items()} for c, all_ in board.beyond.items()},
        "agreement_ceilings": {name: interval._asdict() for name, interval in board.ceilings.items()},
    }
    return {key: _finite(value) for key, value in everything.items()}


def title(board: Leaderboard) -> str:
    """Model, target and n in one line; of clips, also what vanishes at once."""
    facts = board.facts
    return (
        f"Faithfulness of explanations: {facts.get('model', 'unknown model')}, "
        f"target {facts.get('target', 'unknown')}, {words_of(board).counted(board.n)}"
    )


def record(board: Leaderboard, row: Row) -> dict[str, Any]:
    """One row as flat names and numbers; None where there is nothing."""
    flat: dict[str, Any] = {
        "method": row.method,
        "role": row.role,
        "rank": _rank(board, row),
        "rank_best": row.ranks[0] if row.ranks else None,
        "rank_worst": row.ranks[1] if row.ranks else None,
        "n": row.n,
        "deletion": row.deletion,
        "insertion": row.insertion,
        "abpc": row.insertion - row.deletion,
    }
    if math.isfinite(row.deletion_by_match):
        flat["deletion_by_match"] = row.deletion_by_match
    flat |= {f"versus_random_{k}": v for k, v in _comparison(row.versus_random).items()}
    flat |= {
        "protocols": len(board.protocols),
        "protocols_better": row.protocols_better,
        "protocols_worse": row.protocols_worse,
    }
    for name, interval in row.localisation.items():
        flat |= _flat(name, interval)
    for name, interval in row.agreement.items():
        flat |= _flat(f"captum_{name}", interval)
    return flat | {"converged": row.converged, "seed_spearman": _or_none(row.seed_spearman)}


def _cells(board: Leaderboard) -> list[list[str]]:
    """Header and lines; methods and controls together in the order of the main score, unranked ones last."""
    names = localisation_names(board)
    localised = [name for name in names if any(name in row.localisation for row in board.rows)]
    agreed = [name for name in _AGREEMENT if any(name in row.agreement for row in board.rows)]
    followed = any(math.isfinite(row.deletion_by_match) for row in board.rows)
    partial = len({row.n for row in board.rows}) > 1  # some methods were cut off before their last image
    header = [
        "rank",
        "range",
        "method",
        *(["n"] * partial),
        "deletion ↓",
        *(["by match ↓"] * followed),
        "insertion ↑",
        f"{board.main.mode} - random [95 %]",
    ]
    header += ["verdict", "better on", "+/-", *(names[name] for name in localised)]
    header += [_AGREEMENT[name] for name in agreed]
    lines = []
    for row in (*(r for r in board.rows if r.is_ranked or r.is_control), *board.unranked):
        matched = [number(row.deletion_by_match)] * followed
        line = [*_place(board, row), _name(row), *([str(row.n)] * partial), number(row.deletion), *matched]
        line += [number(row.insertion)]
        line += [*_versus(row), _signs(row)]
        line += [number(row.localisation[m].estimate) if m in row.localisation else "" for m in localised]
        line += [_signed(row.agreement[m].estimate) if m in row.agreement else "" for m in agreed]
        lines.append(line)
    return [header, *lines]


def _place(board: Leaderboard, row: Row) -> tuple[str, str]:
    rank = _rank(board, row)
    if rank is None:
        return "", ""
    return str(rank), f"{row.ranks[0]}-{row.ranks[1]}" if row.ranks else ""


def _name(row: Row) -> str:
    return (
        f"({row.method})" if row.is_control else row.method if row.is_ranked else f"{row.method} [not converged]"
    )


def _versus(row: Row) -> tuple[str, str, str]:
    one = row.versus_random
    if one is None:
        return "", "", ""
    d = one.difference
    interval = f" [{_signed(d.low)}, {_signed(d.high)}]" if math.isfinite(d.low) else ""
    return f"{_signed(d.estimate)}{interval}", one.verdict, f"{one.superiority:.0%}"


def _signs(row: Row) -> str:
    return "" if row.versus_random is None else f"{row.protocols_better}/{row.protocols_worse}"


def _rank(board: Leaderboard, row: Row) -> int | None:
    return board.ranked.index(row) + 1 if row.is_ranked else None


def _comparison(one: Comparison | None) -> dict[str, Any]:
    if one is None:
        return {}
    return {
        "difference": one.difference.estimate,
        "low": _or_none(one.difference.low),
        "high": _or_none(one.difference.high),
        "p": _or_none(one.p),
        "p_holm": _or_none(one.p_holm),
        "superiority": one.superiority,
        "rank_biserial": one.rank_biserial,
        "verdict": one.verdict,
    }


def _flat(name: str, interval: Interval) -> Mapping[str, float | None]:
    return {
        name: interval.estimate,
        f"{name}_low": _or_none(interval.low),
        f"{name}_high": _or_none(interval.high),
    }


def _finite(value: Any) -> Any:
    """NaN and infinities as None, since JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return _or_none(value) if isinstance(value, float) else value


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "n/a"
