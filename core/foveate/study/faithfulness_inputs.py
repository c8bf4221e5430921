"""What a faithfulness job reads before it scores: stored maps, the target that they explain, control maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.objective import Objective
from foveate.attribution.reference import Centre, Edge, Oracle, Saturation, Uniform, Untrained, mask_share
from foveate.errors import UsageError
from foveate.faithfulness.orders import to_cells
from foveate.interfaces import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.geometry import CellGrid
    from foveate.interfaces import AttentionSource, Attribution, Sample, Scale

PREFIX = "attributions/"


@dataclass(frozen=True, eq=False)
class StoredMaps:
    """One method's maps in a run. ``values (sample, target, [frame,] y, x)``; the rest is ``(sample, target)``."""

    method: str
    values: NDArray[np.float32]
    converged: NDArray[np.bool_]
    classes: NDArray[np.int32]
    seed_spearman: float
    attrs: Mapping[str, Any]

    @property
    def target(self) -> Target | None:
        """What the maps explain; None for maps of another tool, which say nothing of it."""
        if "target_kind" not in self.attrs:
            return None
        asked, number = str(self.attrs["target_asked"]), int(self.attrs["target_object"])
        label = int(asked) if asked.isdigit() else asked or None  # as the command line reads it
        scale: Scale = self.attrs.get("scale", "probability")
        return Target(str(self.attrs["target_kind"]), label, number if number >= 0 else None, scale)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Where there is a map, (sample, target)."""
        return np.asarray(np.isfinite(self.values).any(axis=tuple(range(2, self.values.ndim))))

    @property
    def converged_share(self) -> float:
        """Share of the maps that converged, 0 where there are none."""
        known = self.known
        return float(self.converged[known].mean()) if known.any() else 0.0


def stored_maps(run: Run, methods: Sequence[str] | None) -> dict[str, StoredMaps]:
    """The maps to be scored (default: all of the run). Raises UsageError where one is missing."""
    there = [name.removeprefix(PREFIX) for name in run.products() if name.startswith(PREFIX)]
    missing = [name for name in methods or () if name not in there]
    if missing or not there:
        raise UsageError(
            f"{run.path}: no attribution {', '.join(missing)}; there are: {', '.join(there) or 'none'}",
            remedy=f"foveate attribute {run.path} --method {missing[0] if missing else 'default'}",
        )
    return {name: _read(run, name) for name in (methods or there)}


def _read(run: Run, method: str) -> StoredMaps:
    dataset = run.product(PREFIX + method)
    values = dataset["map"].values
    known = np.isfinite(values).any(axis=tuple(range(2, values.ndim)))
    seeds = dataset["seed_spearman"].values[known] if "seed_spearman" in dataset else np.empty(0)
    return StoredMaps(
        method,
        values,
        np.asarray(dataset["converged"].values, bool),
        np.asarray(dataset["target_class"].values, np.int32),
        float(np.median(np.nan_to_num(seeds))) if seeds.size else float("nan"),
        dataset.attrs,
    )


def common_target(maps: Mapping[str, StoredMaps]) -> Target:
    """The one target that all maps explain, on the first map's scale. Raises UsageError naming the others."""
    asked: dict[Target, list[str]] = {}
    scales: list[Scale] = []
    for name, stored in maps.items():
        if stored.target is not None:
            asked.setdefault(replace(stored.target, scale="probability"), []).append(name)
            scales.append(stored.target.scale)
    if len(asked) > 1:
        words = "; ".join(
            f"{', '.join(names)}: {target.kind} {target.label or ''}" for target, names in asked.items()
        )
        raise UsageError(
            f"the maps explain different targets ({words}) and cannot be scored against one another",
            remedy="choose methods of one target with --method",
        )
    return replace(next(iter(asked)), scale=scales[0]) if asked else Target()


@dataclass(frozen=True, eq=False)
class Bound:
    """A batch with its bound target; ``slots`` gives each target row its (position in batch, target) place."""

    objective: Objective
    slots: tuple[tuple[int, int], ...]
    samples: Sequence[Sample]

    @property
    def masks(self) -> list[NDArray[np.bool_] | None]:
        """The sample's mask for each target row."""
        return [self.samples[s].mask for s, _ in self.slots]

    def rows_of(self, table: NDArray[Any]) -> NDArray[Any]:
        """Entries of a table ``(sample of the batch, target, ...)`` by target row."""
        return table[[s for s, _ in self.slots], [t for _, t in self.slots]]


def bind(source: AttentionSource, samples: Sequence[Sample], target: Target) -> Bound:
    """Encode samples and freeze the target to what the model answers for them now."""
    batch = source.encode(samples)
    with torch.no_grad():
        bound = source.bind(source.forward(batch), batch, target)
    count: dict[int, int] = {}
    slots = []
    for row in bound.rows:
        slots.append((row.sample, count.get(row.sample, 0)))
        count[row.sample] = slots[-1][1] + 1
    return Bound(Objective(source, batch, bound), tuple(slots), samples)


def has_scale(bound: Bound, scale: Scale) -> bool:
    """Whether the source can score this target on ``scale``; sources raise UsageError where they cannot."""
    objective = bound.objective
    first = objective.take([0])
    try:
        with torch.no_grad():
            objective.source.score(objective.source.forward(first.batch), first.batch, first.bound.at(scale))
    except UsageError:
        return False
    return True


def check_same_answer(bound: Bound, stored: StoredMaps, positions: Sequence[int]) -> None:
    """Raise UsageError where the maps explain another class than the one that is scored."""
    room = stored.classes.shape[1]
    if bound.slots and max(t for _, t in bound.slots) >= room:
        raise UsageError(f"{stored.method}: maps of {room} targets an image, but the model now has more")
    explained = bound.rows_of(stored.classes[list(positions)])
    for row, (expected, target) in enumerate(zip(explained, bound.objective.bound.rows, strict=True)):
        if expected >= 0 and target.class_index is not None and expected != target.class_index:
            raise UsageError(
                f"{stored.method}, sample {bound.objective.batch.ids[row]!r}: the map explains class {expected}, "
                f"but the model now answers {target.class_index} ({target.label})",
                remedy="explain again with foveate attribute --overwrite",
            )


def control_maps(
    bound: Bound,
    cells: CellGrid,
    *,
    masks: bool,
    twin: AttentionSource | None,
    twin_methods: Sequence[Attribution],
) -> dict[str, NDArray[np.float64]]:
    """Maps that explain nothing, and the oracle where ``masks``: name -> (target row, cell).

    Edge and saturation need colour images as input; where the input is none, they are left out.
    """
    controls: list[Attribution] = [Uniform(), Centre(), Edge(), Saturation()]
    if masks:
        controls.append(Oracle(bound.masks))
    if twin is not None:
        controls += [Untrained(method, twin) for method in twin_methods]
    made: dict[str, NDArray[np.float64]] = {}
    objective = bound.objective
    for control in controls:
        try:
            found = control.attribute(objective.source, objective.batch, objective.bound)
        except UsageError:
            if control.name not in (Edge.name, Saturation.name):
                raise
            continue
        made[found.method] = to_cells(found.values, found.grid, cells)
    return made


def oracle_share(bound: Bound, cells: CellGrid) -> NDArray[np.float64]:
    """The mask's share of each cell, (target row, cell); NaN for samples without a mask."""
    blank = np.full(cells.shape, np.nan)
    rows = [
        blank if mask is None else mask_share(mask, geometry, cells)
        for mask, geometry in zip(bound.masks, bound.objective.batch.geometry, strict=True)
    ]
    return np.stack(rows).reshape(len(rows), -1)
