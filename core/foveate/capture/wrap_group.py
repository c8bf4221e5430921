"""Layers that repeat become one site: same class, same shape, and paths that differ in one number only."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from foveate.capture.records import Shape
from foveate.capture.wrap_observe import Seen
from foveate.capture.wrap_samples import Order, ratio
from foveate.interfaces import Site, TokenAxis

Call = tuple[str, int]
"""The n-th call of the module at a path."""


@dataclass(frozen=True, eq=False)
class FoundSite:
    """A site that was found, with what is known and guessed of it.

    ``pattern`` is the path with the layer number as ``*``; ``calls`` maps (path, number) to (layer, number of
    the call within the layer). ``per_sample`` calls (windows, frames) belong to a sample, 0 where that is not
    known; ``order`` says how samples lie in the batch. ``query`` and ``key`` are the labels the user gave for
    the tokens of one call (None: not labelled).
    """

    site: Site
    pattern: str
    reason: str
    shape: Shape
    per_sample: int
    calls: Mapping[Call, tuple[int, int]]
    order: Order = ""
    query: TokenAxis | None = None
    key: TokenAxis | None = None

    @property
    def repeats(self) -> int:
        """How often each layer runs in one forward."""
        return 1 + max(number for _, number in self.calls.values())


def group(calls: Iterable[Seen], samples: int, orders: Mapping[Call, Order]) -> dict[str, FoundSite]:
    """Sites by id, in order of first execution. ``orders`` says how samples lie, for grouped calls."""
    calls = list(calls)
    counts = Counter(call.path for call in calls)
    # A module whose calls differ in shape is as many sites as shapes; the others are one signature each.
    signatures = {call: _signature(call, counts[call.path]) for call in calls}
    patterns = _patterns({(call.path, signatures[call]) for call in calls})
    groups: dict[Any, list[Seen]] = defaultdict(list)
    for call in calls:
        groups[patterns[call.path, signatures[call]], signatures[call]].append(call)
    names = list(_names([pattern for pattern, _ in groups], [part[0] for part in groups.values()]))
    return {
        name: _found(name, pattern, part, samples, {orders.get((call.path, call.number), "") for call in part})
        for name, ((pattern, _), part) in zip(names, groups.items(), strict=True)
    }


def _signature(call: Seen, count: int) -> tuple[object, ...]:
    return call.owner, call.shape, call.form, call.guess.kind, count


def _patterns(paths: set[tuple[str, tuple[object, ...]]]) -> dict[tuple[str, tuple[object, ...]], str]:
    """The path of each with that number starred which most others share; without numbers, the path."""
    shared = Counter((star, signature) for path, signature in paths for star in _stars(path))
    return {
        (path, signature): max(_stars(path), key=lambda star: shared[star, signature], default=path)
        for path, signature in paths
    }


def _stars(path: str) -> list[str]:
    """Last number first, so that it wins where nothing repeats."""
    parts = path.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    return [".".join([*parts[:i], "*", *parts[i + 1 :]]) for i in reversed(places)]


def _names(patterns: list[str], firsts: list[Seen]) -> Iterator[str]:
    """Patterns without their star; the class where the model itself attends; numbered where two are alike."""
    used: Counter[str] = Counter()
    for pattern, first in zip(patterns, firsts, strict=True):
        name = ".".join(part for part in pattern.split(".") if part != "*") or first.owner
        used[name] += 1
        yield name if used[name] == 1 else f"{name}-{used[name]}"


def _found(name: str, pattern: str, calls: list[Seen], samples: int, orders: set[Order]) -> FoundSite:
    layers = {call.path: _layer(call.path, pattern) for call in calls}
    numbers: Counter[str] = Counter()
    places = {}
    for call in calls:
        places[call.path, call.number] = (layers[call.path], numbers[call.path])
        numbers[call.path] += 1
    first = calls[0]
    shape = first.shape
    groups, order = ratio(shape.batch, samples), orders.pop() if len(orders) == 1 else ""
    if groups > 1 and samples > 1 and not order:
        groups = 0
    site = Site(
        name,
        layers,
        shape.heads,
        query=f"{name} queries",
        key=f"{name} {'queries' if first.guess.kind != 'cross' and shape.queries == shape.keys else 'keys'}",
        kind=first.guess.kind,
        form=first.form,
        normalised_over="key" if first.sums_to_one else "query",
        group=_group_axes(groups > 1, max(numbers.values()) > 1),
        summary=f"{first.owner} at {pattern or 'the root'}",
    )
    return FoundSite(site, pattern, first.guess.reason, shape, groups, places, order)


def _group_axes(grouped: bool, repeated: bool) -> tuple[Literal["window", "frame"], ...]:
    """A batch larger than the samples is called windows, calls that repeat frames, until the user says more."""
    axes: list[Literal["window", "frame"]] = []
    axes += ["window"] if grouped else []
    axes += ["frame"] if repeated else []
    return tuple(axes)


def _layer(path: str, pattern: str) -> int:
    """The number at the star; 0 without one."""
    star = re.escape(pattern).replace(r"\*", r"(\d+)")
    match = re.fullmatch(star, path)
    return int(match.group(1)) if match and match.groups() else 0
