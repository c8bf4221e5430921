"""What a leaderboard shows and what it does not, in sentences under the table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.faithfulness.leaderboard import ORACLE, RANDOM
from foveate.faithfulness.objects import OWN_PLACE
from foveate.faithfulness.readings import MATCH
from foveate.faithfulness.replacement import FREEZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from foveate.faithfulness.leaderboard import Leaderboard, Row
    from foveate.stats.paired import Comparison

FEW_IMAGES = 20
"""Below this many images (or videos) the caption warns."""


@dataclass(frozen=True)
class Words:
    """How things are called: ``sample`` (image, clip), ``one`` that statistics count (image, video), ``unit``."""

    sample: str = "image"
    one: str = "image"
    unit: str = "cells"

    @property
    def many(self) -> str:
        """Plural of what statistics count."""
        return self.one + "s"

    def counted(self, n: int) -> str:
        """``12 images``; ``3 videos, over tubes``."""
        over = "" if self.one == "image" else f", over {self.unit}"
        return f"{n} {self.one}{'s' * (n != 1)}{over}"


def words_of(board: Leaderboard) -> Words:
    """The words for what was scored."""
    if board.facts.get("unit_of_statistics") != "video":
        return Words()
    return Words("clip", "video", str(board.facts.get("unit", "cells")))


def caption(board: Leaderboard) -> list[str]:
    """What was done, what beats what, and what this does not show: one sentence or two a line."""
    return [*_how(board), *_findings(board), *_unranked(board), *_caveats(board)]


def _how(board: Leaderboard) -> list[str]:
    facts, measure, words = board.facts, board.main.mode, words_of(board)
    better = "smaller" if board.main.lower_is_better else "larger"
    lines = [
        f"Areas: mean score ({board.main.scale}) of the answer to the intact {words.sample} while {words.unit} "
        f"are replaced by the {board.main.baseline} baseline, most important first (deletion, smaller is better), "
        f"or put back (insertion, larger is better). Sorted by {measure}: {better} is better.",
        f"{measure.capitalize()} - random: paired difference to the mean of {facts.get('random_orders', '?')} "
        f"random orders of the same {words.sample}, with its 95 % bootstrap interval over {words.many}. Verdict: "
        "the interval excludes 0 and Wilcoxon's test holds after Holm's correction over all rows; else "
        "inconclusive.",
        f"Rank range, +/-: over {len(board.protocols)} protocols (deletion and insertion x baselines x output "
        "scales): best and worst rank among methods (areas within 0.5 % of the spread tie); in how many the row "
        "is better/worse than random.",
    ]
    if any(row.localisation for row in board.rows):
        own = {"own box": "the object's own predicted box", "own mask": "the track's own predicted mask"}
        place = own.get(_localised(board), "the mask")
        lines.append(
            f"{', '.join(localisation_names(board).values())}: does the map point at {place}? Not faithfulness: "
            "a model may use what lies outside it."
        )
    if any(key.scale.endswith(MATCH) for key in board.protocols):
        lines.append(_match_words(board))
    if any(row.agreement for row in board.rows):
        lines.append(_agreement_words(board))
    return lines


def _localised(board: Leaderboard) -> str:
    """What localisation was measured against."""
    return str(board.facts.get("localisation_of", ""))


def localisation_names(board: Leaderboard) -> dict[str, str]:
    """Column headings by measure."""
    inside = _localised(board) if _localised(board).startswith("own") else "mask"
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
    called = words_of(board)
    words = (
        "Captum rho, top 10 %: Spearman correlation and overlap of the top tenth with Captum's maps of the same "
        f"{called.sample}, minus those with maps of other {called.many}, mean over Captum's methods; never part "
        "of the ranking."
    )
    if "captum" in board.ceilings:
        words += f" Captum's methods among themselves reach rho {number(board.ceilings['captum'].estimate)}"
        words += "." if "seeds" not in board.ceilings else ","
    if "seeds" in board.ceilings:
        words += f" sampled methods with themselves under another seed {number(board.ceilings['seeds'].estimate)}"
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
        + (f" (seed-to-seed Spearman {number(row.seed_spearman)})." if math.isfinite(row.seed_spearman) else ".")
        for row in board.unranked
    ]


def _caveats(board: Leaderboard) -> list[str]:
    words = words_of(board)
    lines = [
        f"Holds for this model (one checkpoint), this target and these {words.many}. Pictures with replaced "
        f"{words.unit} are unlike those the model was trained on; where verdicts change with the baseline, trust "
        "none of them."
    ]
    if words.one == "video":
        lines.insert(0, _video_words(board))
    if board.n < 2:
        lines.insert(0, f"One {words.one}: no interval, no test, no verdict.")
    elif board.n < FEW_IMAGES:
        lines.insert(0, f"Only {board.n} {words.many}: intervals are rough and most differences cannot be seen.")
    return lines


def _video_words(board: Leaderboard) -> str:
    """Of clips: what a unit is, how it ranks, what frozen means, and what n counts."""
    facts, unit = board.facts, str(board.facts.get("unit", "cells"))
    span = int(str(facts.get("unit_span", 0)))
    meaning = {
        "cells": "a patch in one frame cell",
        "tubes": f"a patch through {f'blocks of at most {span} frame cells' if span else 'the whole clip'}",
        "frames": "all of one frame cell",
    }
    words = f"One of the {unit} is {meaning.get(unit, unit)}"
    words += "" if unit == "cells" else f", ranked by the {facts.get('unit_value', 'sum')} of the map over it"
    words += ". n counts videos: windows of one video are averaged first."
    if any(key.baseline == FREEZE for key in board.protocols):
        words += " freeze: the nearest kept frame is repeated; where none is kept, each frame's mean colour."
    return words


def _verdict(row: Row) -> str:
    return row.versus_random.verdict if row.versus_random else ""


def _against(board: Leaderboard, row: Row) -> str:
    return board.pairwise[row.method].verdict if row.method in board.pairwise else ""


def number(value: float) -> str:
    """Three decimals, or n/a."""
    return f"{value:.3f}" if math.isfinite(value) else "n/a"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) if names else "none"
