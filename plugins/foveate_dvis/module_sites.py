"""Sites of modules that no source knows by name: layers that repeat are one site, under their own path.

Tokens are placed where shapes leave no doubt: on the levels of deformable attention and of attention that reads
one of them, and, in a backbone, on a grid of square cells that tiles the input.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveate.errors import CaptureError
from foveate.interfaces import CallKey, CallLabels, Part, Site, SiteForm, TokenAxis

Group = tuple[Literal["frame", "window", "track", "position"], ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. ``levels``: (rows, columns) of each map that deformable attention samples."""

    batch: int
    heads: int
    queries: int
    keys: int
    levels: tuple[tuple[int, int], ...] = ()
    form: SiteForm = "dense"


@dataclass(frozen=True)
class Room:
    """What the model was given: ``size`` (height, width) of the padded input, frames of the sample (images: 1)."""

    size: tuple[int, int]
    frames: int = 1


@dataclass(frozen=True, eq=False)
class FoundSite:
    """A site and the shapes of its calls: ``shapes[layer]`` in the order in which they ran."""

    site: Site
    shapes: Mapping[int, tuple[Shape, ...]]
    query: TokenAxis
    key: TokenAxis


def found_sites(calls: Mapping[str, Sequence[Shape]], room: Room) -> dict[str, FoundSite]:
    """Sites by id of the modules ``calls`` (path -> its calls on one sample), in order of first execution.

    Blocks of one kind that differ in shape (some look within windows, some at the whole picture) are sites of
    their own: ``blocks.attn.windows`` and ``blocks.attn``; so are layers that read different levels: ``cross.p0``.
    Raises CaptureError where one module's calls differ in size.
    """
    groups: dict[tuple[str, tuple[Shape, ...]], list[str]] = defaultdict(list)
    for path, made in calls.items():
        groups[_starred(path), tuple(made)].append(path)
    patterns = [pattern for pattern, _ in groups]
    layout = _Layout(room, [shape for made in calls.values() for shape in made])
    found: dict[str, FoundSite] = {}
    for (pattern, made), paths in groups.items():
        name = pattern.replace(".*", "").replace("*.", "")
        if patterns.count(pattern) > 1:
            name += layout.suffix(made)
        taken = sum(known == name or known.startswith(f"{name}-") for known in found)
        name = f"{name}-{taken + 1}" if taken else name
        found[name] = _found(name, made, paths, layout)
    return found


def label(found: FoundSite, call: CallKey, samples: int = 1) -> CallLabels:
    """The axes of one call of a found site on ``samples`` alike; they are the slowest part of its batch."""
    shapes, group = found.shapes[call.layer], found.site.group
    sizes = [shape.batch for shape in shapes]
    own, before = sizes[call.number], sum(sizes[: call.number])
    leading: list[tuple[str, int]] = [("sample", samples)]
    at: dict[str, Part] = {}
    if group:
        leading.append((group[0], own))
        at[group[0]] = Part(tuple(range(before, before + own)), sum(sizes))
    return CallLabels(tuple(leading), found.query, found.key, at=at if len(shapes) > 1 else {})


def finest(found: Mapping[str, FoundSite], size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the finest map that any site reads; cells of 32 pixels where none is placed."""
    grids: list[tuple[int, int]] = []
    for one in found.values():
        cells = one.key.where("patch")
        for level in np.unique(one.key.level[cells]):
            mine = cells[one.key.level[cells] == level]
            grids.append((np.unique(one.key.y[mine]).size, np.unique(one.key.x[mine]).size))
    return max(grids, key=lambda grid: grid[0] * grid[1], default=(max(size[0] // 32, 1), max(size[1] // 32, 1)))


_NUMBER = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


def _starred(path: str) -> str:
    """The path with its last number as ``*``."""
    numbers = list(_NUMBER.finditer(path))
    return path if not numbers else path[: numbers[-1].start()] + "*" + path[numbers[-1].end() :]


def _layer(path: str) -> int:
    numbers = _NUMBER.findall(path)
    return int(numbers[-1]) if numbers else 0


def _per_sample(shapes: Sequence[Shape]) -> int:
    return sum(shape.batch for shape in shapes)


def _found(name: str, shapes: tuple[Shape, ...], paths: list[str], layout: _Layout) -> FoundSite:
    first, room = shapes[0], layout.room
    sizes = {(shape.heads, shape.queries, shape.keys) for shape in shapes}
    if len(sizes) > 1:
        raise CaptureError(
            f"{paths[0]} ran with {len(sizes)} sizes of (heads, queries, keys): {sorted(sizes)[:4]}",
            remedy="leave it out, or give one picture or clip of one size",
        )
    total = _per_sample(shapes)
    group: Group = () if total <= 1 else ("frame",) if total == room.frames else ("window",)
    own = first.queries == first.keys
    site = Site(
        name,
        {path: _layer(path) for path in paths},
        first.heads,
        query=f"{name} queries",
        key=f"{name} {'queries' if own else 'keys'}",
        kind="self" if own else "cross",
        form=first.form,
        group=group,
        summary=f"found at {paths[0]}",
    )
    key = layout.tokens(first, backbone="backbone" in name and group != ("window",))
    query = key if own else TokenAxis.of_kind("object", first.queries)
    return FoundSite(site, {_layer(path): shapes for path in paths}, query, key)


class _Layout:
    """Where tokens lie, as far as shapes tell."""

    def __init__(self, room: Room, shapes: Sequence[Shape]) -> None:
        self.room = room
        self.levels: tuple[tuple[int, int], ...] = max((shape.levels for shape in shapes), key=len, default=())

    def suffix(self, shapes: Sequence[Shape]) -> str:
        """What tells a site from others of its kind: that it looks within windows, or which level it reads."""
        if _per_sample(shapes) > self.room.frames:
            return ".windows"
        cells = [rows * columns for rows, columns in self.levels]
        other = shapes[0].keys != shapes[0].queries and shapes[0].keys in cells
        return f".p{cells.index(shapes[0].keys)}" if other else ""

    def tokens(self, shape: Shape, *, backbone: bool) -> TokenAxis:
        """Keys: cells of all levels, of one of them, of a grid; else tokens without a place."""
        if shape.levels:
            return TokenAxis.concat(*(self._cells(*size, level) for level, size in enumerate(shape.levels)))
        for level, (rows, columns) in enumerate(self.levels):
            if rows * columns == shape.keys:
                return self._cells(rows, columns, level)
        grid = self._square(shape.keys) if backbone else None
        if grid is None:
            return TokenAxis.of_kind("object", shape.keys)
        rows, columns, prefix = grid
        return TokenAxis.concat(TokenAxis.of_kind("cls", prefix), self._cells(rows, columns, 0))

    def _cells(self, rows: int, columns: int, level: int) -> TokenAxis:
        height, width = self.room.size
        return TokenAxis.patches(rows, columns, height=float(height), width=float(width), level=level)

    def _square(self, count: int) -> tuple[int, int, int] | None:
        """(rows, columns, class tokens) of square cells of a whole number of pixels that tile the input."""
        height, width = self.room.size
        for prefix in (0, 1):
            cell = round(float(np.sqrt(height * width / max(count - prefix, 1))))
            fits = cell and height % cell == 0 and width % cell == 0
            if fits and (height // cell) * (width // cell) == count - prefix:
                return height // cell, width // cell, prefix
        return None
