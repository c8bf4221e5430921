"""The leaderboard as text, Markdown, CSV and JSON, with a caption that says what it shows and what it does not."""

from __future__ import annotations

import csv
import io
import math
from textwrap import fill
from typing import TYPE_CHECKING, Any

from foveate.faithfulness.leaderboard import ORACLE, RANDOM
from foveate.faithfulness.objects import OWN_PLACE
from foveate.faithfulness.readings import MATCH

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from foveate.faithfulness.leaderboard import Leaderboard, Row
    from foveate.stats.intervals import Interval
    from foveate.stats.paired import Comparison

WIDTH = 120
"""Characters a line of the caption in a terminal."""
FEW_IMAGES = 20
"""Below this many images the caption warns."""
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
    """Model, target and n in one line."""
    facts = board.facts
    return (
        f"Faithfulness of explanations: {facts.get('model', 'unknown model')}, "
        f"target {facts.get('target', 'unknown')}, {board.n} image{'s' * (board.n != 1)}"
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


def caption(board: Leaderboard) -> list[str]:
    """What was done, what beats what, and what this does not show: one sentence or two a line."""
    return [*_how(board), *_findings(board), *_unranked(board), *_caveats(board)]


def _how(board: Leaderboard) -> list[str]:
    facts, measure = board.facts, board.main.mode
    better = "smaller" if board.main.lower_is_better else "larger"
    lines = [
        f"Areas: mean score ({board.main.scale}) of the answer to the intact image while cells are replaced by "
        f"the {board.main.baseline} baseline, most important first (deletion, smaller is better), or put back "
        f"(insertion, larger is better). Sorted by {measure}: {better} is better.",
        f"{measure.capitalize()} - random: paired difference to the mean of {facts.get('random_orders', '?')} "
        "random orders of the same image, with its 95 % bootstrap interval over images. Verdict: the interval "
        "excludes 0 and Wilcoxon's test holds after Holm's correction over all rows; else inconclusive.",
        f"Rank range, +/-: over {len(board.protocols)} protocols (deletion and insertion x baselines x output "
        "scales): best and worst rank among methods (areas within 0.5 % of the spread tie); in how many the row "
        "is better/worse than random.",
    ]
    if any(row.localisation for row in board.rows):
        place = "the object's own predicted box" if _of_boxes(board) else "the mask"
        lines.append(
            f"{', '.join(_localisation_names(board).values())}: does the map point at {place}? Not faithfulness: "
            "a model may use what lies outside it."
        )
    if any(key.scale.endswith(MATCH) for key in board.protocols):
        lines.append(_match_words(board))
    if any(row.agreement for row in board.rows):
        lines.append(_agreement_words(board))
    return lines


def _of_boxes(board: Leaderboard) -> bool:
    return board.facts.get("localisation_of") == "own box"


def _localisation_names(board: Leaderboard) -> dict[str, str]:
    """Column headings by measure."""
    inside = "own box" if _of_boxes(board) else "mask"
    return {"pointing": "pointing", "roc_auc": "ROC-AUC", "mass_accuracy": f"mass in {inside}"}


def _match_words(board: Leaderboard) -> str:
    share = board.facts.get("vanished_share")
    known = isinstance(share, float) and math.isfinite(share)
    return (
        "Objects are followed by their query (probability, logit) and by best match (probability@match). An "
        "object that no answer matches any more has vanished and scores 0"
        + (f"; so it was in {share:.0%} of the pictures." if known else ".")
    )


def _agreement_words(board: Leaderboard) -> str:
    words = (
        "Captum rho, top 10 %: Spearman correlation and overlap of the top tenth with Captum's maps of the same "
        "image, minus those with maps of other images, mean over Captum's methods; never part of the ranking."
    )
    if "captum" in board.ceilings:
        words += f" Captum's methods among themselves reach rho {_number(board.ceilings['captum'].estimate)}"
        words += "." if "seeds" not in board.ceilings else ","
    if "seeds" in board.ceilings:
        words += f" sampled methods with themselves under another seed {_number(board.ceilings['seeds'].estimate)}"
        words += " (plain correlation)."
    return words


def _findings(board: Leaderboard) -> list[str]:
    named = {v: [row.method for row in board.ranked if _verdict(row) == v] for v in ("better", "worse")}
    open_cases = [row.method for row in board.ranked if _verdict(row) == "inconclusive"]
    lines = [
        f"Better than random: {_list(named['better'])}. Worse: {_list(named['worse'])}. "
        f"Inconclusive: {_list(open_cases)}."
    ]
    if board.pairwise and board.ranked:
        lines.append(_best_words(board))
    lines += [_beyond_words(control, found) for control, found in board.beyond.items()]
    knowing = (ORACLE, RANDOM, *OWN_PLACE)
    control = next((row for row in board.controls if row.method not in knowing), None)
    if control is not None and board.ranked:
        ahead = [row.method for row in board.ranked if board.rows.index(row) < board.rows.index(control)]
        lines.append(
            f"Strongest control that knows nothing of the model's answer: {control.method}; "
            f"methods ahead of it: {_list(ahead)}."
        )
    return lines


def _beyond_words(control: str, found: Mapping[str, Comparison]) -> str:
    named = {v: [name for name, one in found.items() if one.verdict == v] for v in ("better", "worse")}
    rest = [name for name in found if name not in (*named["better"], *named["worse"])]
    words = control.replace("_", " ")
    return (
        f"Better than the object's {words}, filled evenly: {_list(named['better'])}. Worse: "
        f"{_list(named['worse'])}. Inconclusive: {_list(rest)}. Only the first explain more than its place."
    )


def _best_words(board: Leaderboard) -> str:
    best = board.ranked[0].method
    beaten = [name for name, one in board.pairwise.items() if one.verdict == "better"]
    level = [row.method for row in board.rows if _against(board, row) in ("inconclusive", "no interval")]
    return (
        f"{best} is first; it beats {_list(beaten)} in paired tests (Holm), "
        f"and cannot be told from {_list(level)}."
    )


def _unranked(board: Leaderboard) -> list[str]:
    return [
        f"Not ranked: {row.method}, only {row.converged:.0%} of its maps converged"
        + (f" (seed-to-seed Spearman {_number(row.seed_spearman)})." if math.isfinite(row.seed_spearman) else ".")
        for row in board.unranked
    ]


def _caveats(board: Leaderboard) -> list[str]:
    lines = [
        "Holds for this model (one checkpoint), this target and these images. Pictures with replaced cells are "
        "unlike those the model was trained on; where verdicts change with the baseline, trust none of them."
    ]
    if board.n < 2:
        lines.insert(0, "One image: no interval, no test, no verdict.")
    elif board.n < FEW_IMAGES:
        lines.insert(0, f"Only {board.n} images: intervals are rough and most differences cannot be seen.")
    return lines


def _cells(board: Leaderboard) -> list[list[str]]:
    """Header and lines; methods and controls together in the order of the main score, unranked ones last."""
    names = _localisation_names(board)
    localised = [name for name in names if any(name in row.localisation for row in board.rows)]
    agreed = [name for name in _AGREEMENT if any(name in row.agreement for row in board.rows)]
    followed = any(math.isfinite(row.deletion_by_match) for row in board.rows)
    header = [
        "rank",
        "range",
        "method",
        "deletion ↓",
        *(["by match ↓"] * followed),
        "insertion ↑",
        f"{board.main.mode} - random [95 %]",
    ]
    header += ["verdict", "better on", "+/-", *(names[name] for name in localised)]
    header += [_AGREEMENT[name] for name in agreed]
    lines = []
    for row in (*(r for r in board.rows if r.is_ranked or r.is_control), *board.unranked):
        matched = [_number(row.deletion_by_match)] * followed
        line = [*_place(board, row), _name(row), _number(row.deletion), *matched, _number(row.insertion)]
        line += [*_versus(row), _signs(row)]
        line += [_number(row.localisation[m].estimate) if m in row.localisation else "" for m in localised]
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


def _verdict(row: Row) -> str:
    return row.versus_random.verdict if row.versus_random else ""


def _against(board: Leaderboard, row: Row) -> str:
    return board.pairwise[row.method].verdict if row.method in board.pairwise else ""


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


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "n/a"


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else "n/a"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
