"""From what a user asks for (``--layers -1,6: --rows readout``) to a capture plan for one source."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Literal

from foveate.errors import UsageError
from foveate.interfaces import AttentionSource, CapturePlan, RowRule, Site, SitePlan

Heads = Literal["keep", "mean"]
Dtype = Literal["float16", "float32"]
REDUCTIONS = ("entropy", "received")
"""What is kept of all rows by default: linear in tokens."""


def build_plan(
    source: AttentionSource,
    *,
    sites: Iterable[str] | None = None,
    layers: str | None = None,
    heads: Heads = "keep",
    rows: str | RowRule | Sequence[int] = "readout",
    reductions: Iterable[str] = REDUCTIONS,
    topk: int = 16,
    dtype: Dtype = "float16",
) -> CapturePlan:
    """A plan for the chosen sites (default: all) and layers of a source.

    ``layers`` is a comma-separated list of true layer numbers, of places from the end (``-1``) and of
    ranges (``6:``, ``0:4``, ``-2:``, end excluded). A site without any of the layers is left out. ``points`` among
    the reductions is for deformable sites; the others keep what else is named.
    Raises UsageError naming what exists.
    """
    reductions = tuple(reductions)
    if heads == "mean" and "topk" in reductions:
        raise UsageError("topk has no mean over heads", remedy="--heads keep, or leave topk out of --reductions")
    chosen = [_site(source, name) for name in sites] if sites is not None else list(source.sites)
    kept = {site.id: select_layers(site.layers, layers) for site in chosen}
    if not any(kept.values()):
        have = "; ".join(f"{site.id}: {_ranges(site.layers)}" for site in chosen)
        raise UsageError(
            f"no layer {layers!r} in {source.card.id}", remedy=f"layers that exist: {have or 'none (no site)'}"
        )
    rule = parse_rows(rows)
    if "points" in reductions:
        _check_points(source, chosen, rule)
    plans = [
        SitePlan(
            site.id,
            None if layers is None else kept[site.id],
            heads,
            rule,
            tuple(name for name in reductions if name != "points" or site.form == "deformable"),
            topk,
        )
        for site in chosen
        if kept[site.id]
    ]
    return CapturePlan(tuple(plans), dtype)


def _check_points(source: AttentionSource, chosen: Sequence[Site], rule: RowRule | tuple[int, ...]) -> None:
    """Points are kept of the sites that have some; raise UsageError where none has, or no rows are kept."""
    if not any(site.form == "deformable" for site in chosen):
        raise UsageError(
            f"{source.card.id}: no chosen site attends deformably, so there are no sampling points",
            remedy="leave points out of --reductions",
        )
    if rule == "none":
        raise UsageError("sampling points are those of the rows kept, and --rows is none", remedy="--rows all")


def select_layers(have: Sequence[int], text: str | None) -> tuple[int, ...]:
    """The layers among ``have`` (ascending true numbers) that ``text`` names; None means all.

    A single number that does not exist here, or an empty range, selects nothing.
    """
    if text is None:
        return tuple(have)
    chosen: set[int] = set()
    for part in text.split(","):
        chosen |= set(_part(have, part.strip()))
    return tuple(sorted(chosen))


def _part(have: Sequence[int], part: str) -> list[int]:
    single = re.fullmatch(r"-?\d+", part)
    if single:
        number = int(part)
        if number < 0:
            return [have[number]] if -number <= len(have) else []
        return [number] if number in have else []
    if not re.fullmatch(r"(-?\d+)?:(-?\d+)?", part):
        raise UsageError(
            f"layers {part!r}: not a layer number or range", remedy="for instance --layers -1 or --layers 0,6:"
        )
    start, stop = (int(end) if end else None for end in part.split(":"))
    low = have[0] if start is None else _bound(have, start)
    high = have[-1] + 1 if stop is None else _bound(have, stop)
    return [layer for layer in have if low <= layer < high]


def _bound(have: Sequence[int], number: int) -> int:
    """A range's end as a true layer number; negative ones count from the end, as in Python."""
    return number if number >= 0 else have[max(number, -len(have))]


def parse_rows(rows: str | RowRule | Sequence[int]) -> RowRule | tuple[int, ...]:
    """``readout``, ``all``, ``none``, or query positions such as ``0,5``. Raises UsageError."""
    if not isinstance(rows, str):
        return tuple(int(row) for row in rows)
    if rows in ("readout", "all", "none"):
        return rows  # type: ignore[return-value]  # just checked
    try:
        return tuple(int(part) for part in rows.split(","))
    except ValueError:
        raise UsageError(
            f"rows {rows!r}: not a rule", remedy="readout, all, none, or query positions such as 0,5"
        ) from None


def _site(source: AttentionSource, name: str) -> Site:
    known = {site.id: site for site in source.sites}
    if name not in known:
        near = get_close_matches(name, known, 1)
        raise UsageError(
            f"no site {name!r} in {source.card.id}",
            remedy=f"{f'did you mean {near[0]}? ' if near else ''}Sites: {', '.join(known) or 'none'}",
        )
    return known[name]


def _ranges(layers: Sequence[int]) -> str:
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1)) if layers else False
    return f"{layers[0]} to {layers[-1]}" if consecutive and len(layers) > 2 else ", ".join(map(str, layers))
