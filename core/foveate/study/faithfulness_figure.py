"""The leaderboard as a picture: what each method gains over a random order, and how its ranks move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.faithfulness.captions import caption
from foveate.render.leaderboard import Column, Score, leaderboard

if TYPE_CHECKING:
    from pathlib import Path

    from foveate.faithfulness.leaderboard import Leaderboard, Row


def draw(board: Leaderboard, path: Path) -> Path:
    """Differences to random with intervals, rows in the order of the table; PNG, SVG or PDF by suffix."""
    rows = [row for row in board.rows if row.versus_random is not None]
    column = Column(
        f"{board.main} area, minus random",
        [_score(row) for row in rows],
        reference=0.0,
        reference_label="smaller is better" if board.main.lower_is_better else "larger is better",
    )
    title = f"{board.facts.get('model', '')}: {board.main.mode} against a random order"
    words = f"n = {board.n}, target {board.facts.get('target', 'unknown')}. " + " ".join(caption(board)[1:3])
    return leaderboard([column], title=title, caption=words).save(path)


def _score(row: Row) -> Score:
    assert row.versus_random is not None
    one = row.versus_random
    role = "control" if row.is_control else "method" if row.is_ranked else "unranked"
    ranks = f", ranks {row.ranks[0]}-{row.ranks[1]}" if row.ranks else ""
    return Score(
        row.method, one.difference.estimate, one.difference.low, one.difference.high, role, f"{one.verdict}{ranks}"
    )
