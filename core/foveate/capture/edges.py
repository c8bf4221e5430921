"""Edges of attention chosen by label: which queries read from which keys.

A choice is written ``query=cls -> key=patch`` or, for one side, ``track & frame:3``. Alternatives are joined by
``|``, conditions by ``&``, and ``!`` negates one condition:

==================  =====================================================================
``patch``           tokens of a kind (:data:`foveate.interfaces.TOKEN_KINDS`)
``all``             every token
``at:0,4-7``        positions on the axis (the last one included)
``frame:3``         tokens of one frame; ``level:1`` of one pyramid level
``label:dog``       tokens with this label (a track id, a word)
``frame:previous``  relative to the query, on the key side only: ``previous``, ``next``, ``same``, ``other``,
                    ``past``, ``future``; ``level:same``, ``level:other``, ``label:same``, ``label:other``
``self``            the query's own position, on the key side only
==================  =====================================================================

A token without a frame (or level, or label) satisfies no condition about it. Positions and boolean arrays
are choices too, where labels are not needed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, TokenAxis

Choice = str | int | Sequence[int] | NDArray[np.bool_]
"""Tokens of one axis: the text above, positions, or a boolean array over the axis."""

_SIDES = re.compile(r"\s*query\s*=(?P<query>[^>]*?)->\s*key\s*=(?P<key>.*)", re.DOTALL)
_REMEDY = (
    "write conditions such as 'patch', 'at:0,4-7', 'frame:3', 'level:1', 'label:dog', and on the key side "
    "'frame:previous' or 'self'; join them with & and |, negate with !"
)
_BETWEEN_FRAMES: dict[str, Callable[[Any, Any], Any]] = {
    "previous": lambda query, key: key == query - 1,
    "next": lambda query, key: key == query + 1,
    "same": operator.eq,
    "other": operator.ne,
    "past": lambda query, key: key < query,
    "future": lambda query, key: key > query,
}
_BETWEEN_NAMES = {"same": operator.eq, "other": operator.ne}
_BETWEEN: dict[str, dict[str, Callable[[Any, Any], Any]]] = {
    "frame": _BETWEEN_FRAMES,
    "level": _BETWEEN_NAMES,
    "label": _BETWEEN_NAMES,
}


class Edges(NamedTuple):
    """The two sides of a choice, ready for ``Knockout(site, *parse_edges(text))`` and the like."""

    query: Choice = "all"
    key: Choice = "all"


def parse_edges(text: str) -> Edges:
    """``"query=cls -> key=patch"`` as its two sides. Raises UsageError where it cannot be understood."""
    found = _SIDES.fullmatch(text)
    if found is None:
        raise UsageError(f"edges: cannot read {text!r}", remedy="write 'query=cls -> key=patch'")
    edges = Edges(found["query"].strip(), found["key"].strip())
    check(edges.query, side="query")
    check(edges.key, side="key")
    return edges


def check(choice: Choice, *, side: str) -> None:
    """Raise UsageError for text that is not a choice of tokens on this ``side`` ("query" or "key")."""
    if isinstance(choice, str):
        for name, value in _conditions(choice):
            _check_condition(name, value, side, choice)


def needs_labels(choice: Choice) -> bool:
    """Whether tokens' labels are needed to choose them; sizes of the axes always are known."""
    return isinstance(choice, str) and any(name not in ("all", "at", "self") for name, _ in _conditions(choice))


def edge_mask(edges: Edges, query: TokenAxis, key: TokenAxis) -> NDArray[np.bool_]:
    """The chosen edges as bool ``(query, key)``.

    Raises UsageError for positions beyond an axis, arrays of another size, and conditions on labels or frames
    that no token of the axis has.
    """
    rows = _side(edges.query, query, query, "query")
    return np.asarray(rows & _side(edges.key, query, key, "key"))


def unlabelled(count: int) -> TokenAxis:
    """An axis whose tokens are known by position only."""
    return TokenAxis.of_kind("padding", count)


def _side(choice: Choice, query: TokenAxis, key: TokenAxis, side: str) -> NDArray[np.bool_]:
    """Tokens chosen on one side, broadcastable to (query, key)."""
    chosen = _matrix(choice, query, key, side) if isinstance(choice, str) else _positions(choice, len(key), side)
    if chosen.ndim == 1:
        return chosen[:, None] if side == "query" else chosen[None, :]
    return chosen


def _positions(choice: int | Sequence[int] | NDArray[np.bool_], count: int, side: str) -> NDArray[np.bool_]:
    given = np.atleast_1d(np.asarray(choice))
    if given.dtype == np.bool_:
        if given.shape != (count,):
            raise UsageError(f"edges: the {side} mask has shape {given.shape}, expected ({count},)")
        return given
    chosen = np.zeros(count, bool)
    if given.size:
        if not np.issubdtype(given.dtype, np.integer) or given.min() < -count or given.max() >= count:
            raise UsageError(f"edges: {side} positions {given.tolist()} on an axis of {count} tokens")
        chosen[given] = True
    return chosen


def _matrix(text: str, query: TokenAxis, key: TokenAxis, side: str) -> NDArray[np.bool_]:
    any_of = []
    for alternative in text.split("|"):
        conditions = [_split(part) for part in alternative.split("&")]
        all_of = [_condition(name, value, query, key, side) ^ negated for negated, name, value in conditions]
        any_of.append(_combined(np.logical_and, all_of))
    return _combined(np.logical_or, any_of)


def _combined(how: Callable[..., Any], parts: list[NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Conditions over tokens ``(token,)`` and over edges ``(query, key)`` together."""
    joined = parts[0]
    for part in parts[1:]:
        joined = how(joined, part)
    return joined


def _condition(name: str, value: str, query: TokenAxis, axis: TokenAxis, side: str) -> NDArray[np.bool_]:
    """Which tokens of ``axis`` satisfy one condition: ``(token,)``, or ``(query, token)`` where it is relative."""
    if name == "all":
        return np.ones(len(axis), bool)
    if name == "self":
        return np.eye(len(query), len(axis), dtype=bool)
    if name == "at":
        return _positions(_ranges(value), len(axis), side)
    if name in TOKEN_KINDS and not value:
        return np.asarray(axis.kind == TOKEN_KINDS.index(name))
    own, known = _attribute(axis, name, side)
    if value in _BETWEEN[name]:
        other, other_known = _attribute(query, name, "query")
        related = _BETWEEN[name][value](other[:, None], own[None, :])
        return np.asarray(related & other_known[:, None] & known[None, :])
    return np.asarray(known & (own == (value if name == "label" else int(value))))


def _attribute(axis: TokenAxis, name: str, side: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Frame, level or label of every token, and which tokens have one."""
    if name == "label":
        values = np.asarray(axis.label or ("",) * len(axis), dtype=object)
        known = np.asarray([bool(value) for value in values], dtype=bool)
    else:
        values = getattr(axis, name)
        known = values >= 0
    if not known.any():
        raise UsageError(
            f"edges: no token on the {side} axis has a {name}",
            remedy="choose by kind or position, or let the source label its tokens",
        )
    return values, known


def _conditions(text: str) -> list[tuple[str, str]]:
    return [_split(part)[1:] for alternative in text.split("|") for part in alternative.split("&")]


def _split(part: str) -> tuple[bool, str, str]:
    """``!frame:3`` as (negated, name, value)."""
    part = part.strip()
    negated = part.startswith("!")
    name, _, value = part.removeprefix("!").partition(":")
    return negated, name.strip(), value.strip()


def _check_condition(name: str, value: str, side: str, text: str) -> None:
    if name in ("all", "self", *TOKEN_KINDS) and not value:
        if name == "self" and side == "query":
            raise UsageError(
                f"edges: 'self' in {text!r} is relative to the query", remedy="use it on the key side"
            )
        return
    if name == "at":
        _ranges(value)
        return
    if name not in _BETWEEN or not value:
        raise UsageError(
            f"edges: no condition {name + (':' + value if value else '')!r} in {text!r}", remedy=_REMEDY
        )
    if value in _BETWEEN[name]:
        if side == "query":
            raise _not_here(f"{name}:{value}", text)
    elif name != "label" and not value.isdigit():
        raise UsageError(f"edges: '{name}:{value}' in {text!r} needs a number", remedy=_REMEDY)


def _not_here(condition: str, text: str) -> UsageError:
    return UsageError(
        f"edges: {condition!r} in {text!r} is relative to the query", remedy="use it on the key side"
    )


def _ranges(text: str) -> list[int]:
    """``0,4-7`` as [0, 4, 5, 6, 7]."""
    positions: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if found is None:
            raise UsageError(f"edges: cannot read positions {text!r}", remedy="write 'at:0,4-7'")
        first = int(found[1])
        positions += range(first, int(found[2] or first) + 1)
    return positions
