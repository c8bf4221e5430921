"""Self, cross or temporal? A guess with its reason, from where q and k come from."""

from __future__ import annotations

import re
from typing import NamedTuple

from foveate.capture.guess_sources import Reading, Root, Roots
from foveate.capture.records import Shape
from foveate.interfaces import SiteKind


class Guess(NamedTuple):
    """What was guessed, and why."""

    kind: SiteKind
    reason: str


def guess_kind(path: str, shape: Shape, reading: Reading | None) -> Guess:
    """Self-attention where q and k are made from the same tokens, cross-attention where they are not.

    Where no data flow is known (sampling points, weights from elsewhere) the lengths decide.
    """
    guess = _by_sources(shape, reading) or _by_length(shape)
    if guess.kind == "self" and re.search(r"tempor|(^|[._])time([._]|$)", path):
        return Guess("temporal", f"{guess.reason}; the module's name speaks of time")
    return guess


def tokens_only(roots: Roots) -> Roots:
    """Roots without parameters, unless there is nothing else (learned queries)."""
    return frozenset(root for root in roots if root.kind != "parameter") or roots


def _by_sources(shape: Shape, reading: Reading | None) -> Guess | None:
    if reading is None or not (reading.query and reading.key):
        return None
    query, key = tokens_only(reading.query), tokens_only(reading.key)
    if query == key:
        fewer = "" if shape.queries == shape.keys else f", {shape.queries} queries over {shape.keys} keys"
        return Guess("self", f"q and k come from the same tokens ({describe(query)}{fewer})")
    more = " (they share sources, but not all)" if query & key else ""
    return Guess("cross", f"q comes from {describe(query)}, k from {describe(key)}{more}")


def _by_length(shape: Shape) -> Guess:
    if shape.queries == shape.keys:
        return Guess("self", f"as many queries as keys ({shape.keys}); where they come from was not seen")
    return Guess("cross", f"{shape.queries} queries, {shape.keys} keys; where they come from was not seen")


def describe(roots: Roots) -> str:
    """The latest of some roots in words."""
    latest = max(roots, key=_order)
    return {"input": f"input {latest.name}", "call": f"the output of {latest.name}"}.get(
        latest.kind, "learned parameters"
    )


def _order(root: Root) -> tuple[int, int]:
    return ("parameter", "input", "call").index(root.kind), root.number
