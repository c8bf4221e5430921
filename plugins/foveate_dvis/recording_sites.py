"""Sites of recorded modules that no source knows by name: layers that repeat are one site, under their own path.

Tokens are placed where the recording says how: on the levels of deformable attention and of attention that reads
one of them, and, in a backbone, on a grid that tiles the input with square cells.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from foveate.errors import ModelError
from foveate.interfaces import CallKey, CallLabels, Part, Site, TokenAxis
from foveate_dvis.recording import RecordedCall, Recording

Group = tuple[Literal["frame", "window", "track", "position"], ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of one call. ``levels``: (rows, columns) of each map that deformable attention samples."""

    batch: int
    heads: int
    queries: int
    keys: int
    levels: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class FoundSite:
    """A site and the shapes of its calls: ``shapes[layer]`` in the order in which they ran."""

    site: Site
    shapes: Mapping[int, tuple[Shape, ...]]
    query: TokenAxis
    key: TokenAxis


def found_sites(recording: Recording, calls: Mapping[str, Sequence[RecordedCall]]) -> dict[str, FoundSite]:
    """Sites by id of the modules ``calls`` (path -> calls), in order of first execution."""
    shapes = {path: tuple(_shape(recording, call) for call in made) for path, made in calls.items()}
    forms = {path: made[0].form for path, made in calls.items()}
    groups: dict[tuple[str, str, tuple[Shape, ...]], list[str]] = defaultdict(list)
    for path in calls:
        groups[_starred(path), forms[path], shapes[path]].append(path)
    plain = [pattern for pattern, _, _ in groups]
    layout = _Layout(recording, [shape for made in shapes.values() for shape in made])
    found = {}
    for (pattern, form, made), paths in groups.items():
        name = pattern.replace(".*", "")
        # Blocks that differ in shape (windows and the whole picture) are sites of their own.
        name = name if plain.count(pattern) == 1 else f"{name}.q{made[0].queries}x{made[0].batch}"
        while name in found:
            name += "'"
        found[name] = _found(name, form, made, paths, layout)
    return found


def label(found: FoundSite, call: CallKey) -> CallLabels:
    """The axes of one call of a found site."""
    shapes = found.shapes[call.layer]
    own, before = shapes[call.number], sum(shape.batch for shape in shapes[: call.number])
    total, group = sum(shape.batch for shape in shapes), found.site.group
    leading: list[tuple[str, int]] = [("sample", 1)]
    at: dict[str, Part] = {}
    if group:
        leading.append((group[0], own.batch))
        at[group[0]] = Part(tuple(range(before, before + own.batch)), total)
    return CallLabels(tuple(leading), found.query, found.key, at=at if len(shapes) > 1 else {})


def _starred(path: str) -> str:
    """The path with its last number as ``*``."""
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.|$)", path))
    return path if not numbers else path[: numbers[-1].start()] + "*" + path[numbers[-1].end() :]


def _layer(path: str) -> int:
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", path)
    return int(numbers[-1]) if numbers else 0


def _shape(recording: Recording, call: RecordedCall) -> Shape:
    size = recording.weights(call).shape
    if call.form != "deformable":
        return Shape(*size)
    levels = tuple((int(rows), int(columns)) for rows, columns in recording[call.name("shapes")])
    return Shape(size[0], size[2], size[1], sum(rows * columns for rows, columns in levels), levels)


def _found(name: str, form: str, shapes: tuple[Shape, ...], paths: list[str], layout: _Layout) -> FoundSite:
    sizes = {(shape.heads, shape.queries, shape.keys) for shape in shapes}
    if len(sizes) > 1:
        raise ModelError(
            f"recording: {paths[0]} ran with {len(sizes)} sizes of (heads, queries, keys): {sorted(sizes)[:4]}",
            remedy="leave it out with sites=, or record one clip of one size",
        )
    total = sum(shape.batch for shape in shapes)
    group: Group = () if total == 1 else ("frame",) if total == layout.frames else ("window",)
    own = shapes[0].queries == shapes[0].keys
    site = Site(
        name,
        {path: _layer(path) for path in paths},
        shapes[0].heads,
        query=f"{name} queries",
        key=f"{name} {'queries' if own else 'keys'}",
        kind="self" if own else "cross",
        form="deformable" if form == "deformable" else "dense",
        group=group,
        summary=f"recorded at {paths[0]}",
    )
    key = layout.tokens(shapes[0].keys, shapes[0].levels, backbone="backbone" in name and group != ("window",))
    return FoundSite(
        site, {_layer(path): shapes for path in paths}, key if own else layout.queries(shapes[0]), key
    )


class _Layout:
    """Where tokens lie, as far as a recording tells."""

    def __init__(self, recording: Recording, shapes: Sequence[Shape]) -> None:
        self.frames = len(recording.frames)
        self.height, self.width = recording.padded
        self.levels: tuple[tuple[int, int], ...] = max((shape.levels for shape in shapes), key=len, default=())

    def tokens(self, count: int, levels: Sequence[tuple[int, int]], *, backbone: bool) -> TokenAxis:
        """Keys: cells of all levels, of one of them, of a grid; else tokens without a place."""
        if levels:
            return TokenAxis.concat(*(self._cells(*size, level) for level, size in enumerate(levels)))
        for level, (rows, columns) in enumerate(self.levels):
            if rows * columns == count:
                return self._cells(rows, columns, level)
        grid = self._square(count) if backbone else None
        if grid is None:
            return TokenAxis.of_kind("object", count)
        rows, columns, prefix = grid
        return TokenAxis.concat(TokenAxis.of_kind("cls", prefix), self._cells(rows, columns, 0))

    def queries(self, shape: Shape) -> TokenAxis:
        """Queries that are not what they read: learned ones, without a place."""
        return TokenAxis.of_kind("object", shape.queries)

    def _cells(self, rows: int, columns: int, level: int) -> TokenAxis:
        return TokenAxis.patches(rows, columns, height=float(self.height), width=float(self.width), level=level)

    def _square(self, count: int) -> tuple[int, int, int] | None:
        """(rows, columns, class tokens) of square cells of a whole number of pixels that tile the input."""
        for prefix in (0, 1):
            side = float(np.sqrt(self.height * self.width / max(count - prefix, 1)))
            cell = round(side)
            fits = cell and self.height % cell == 0 and self.width % cell == 0
            if fits and (self.height // cell) * (self.width // cell) == count - prefix:
                return self.height // cell, self.width // cell, prefix
        return None


def finest(found: Mapping[str, FoundSite], size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of the finest map that any site reads; cells of 32 pixels where none is placed."""
    grids: list[tuple[int, int]] = []
    for one in found.values():
        for level in np.unique(one.key.level[one.key.where("patch")]):
            cells = one.key.where("patch")[one.key.level[one.key.where("patch")] == level]
            grids.append((np.unique(one.key.y[cells]).size, np.unique(one.key.x[cells]).size))
    return max(grids, key=lambda grid: grid[0] * grid[1], default=(max(size[0] // 32, 1), max(size[1] // 32, 1)))
