"""What a faithfulness job reads before it scores: stored maps, the target that they explain, control maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.clips import frame_count
from foveate.attribution.objective import Objective
from foveate.attribution.objects import OwnBox, OwnMask, of_objects, own_predictions, own_share
from foveate.attribution.padding import visible_share
from foveate.attribution.reference import Centre, Edge, Oracle, Saturation, Uniform, Untrained, sample_share
from foveate.attribution.reference_clips import Motion, OneFrame
from foveate.errors import UsageError
from foveate.faithfulness.orders import to_cells
from foveate.faithfulness.readings import read_as
from foveate.interfaces import Target, TargetRow

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
    objects: NDArray[np.int32]
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
            f"{run.path}: no attribution {', '.join(missing)}; there are: {', '.join(there) or 'none'}"
            if missing
            else f"{run.path}: no attribution was made",
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
        _objects(dataset),
        float(np.median(np.nan_to_num(seeds))) if seeds.size else float("nan"),
        dataset.attrs,
    )


def _objects(dataset: Any) -> NDArray[np.int32]:
    """Object (query) of each map, -1 where the target is none."""
    if "target_object" in dataset:
        return np.asarray(dataset["target_object"].values, np.int32)
    return np.full(dataset["target_class"].shape, -1, np.int32)


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
    def of_objects(self) -> bool:
        """Whether the targets are objects of a detector."""
        return of_objects(self.objective.bound)

    def visible(self, cells: CellGrid) -> NDArray[np.bool_] | None:
        """Cells that show the image and not only padding, (target row, cell); None where all do."""
        shares = [visible_share(geometry, cells).ravel() > 0 for geometry in self.objective.batch.geometry]
        seen = np.tile(np.stack(shares), max(1, frame_count(self.objective.frames)))
        return None if seen.all() else seen

    @property
    def masks(self) -> list[NDArray[np.bool_] | None]:
        """The sample's mask for each target row."""
        return [self.samples[s].mask for s, _ in self.slots]

    def rows_of(self, table: NDArray[Any]) -> NDArray[Any]:
        """Entries of a table ``(sample of the batch, target, ...)`` by target row."""
        return table[[s for s, _ in self.slots], [t for _, t in self.slots]]

    def maps_of(self, values: NDArray[Any]) -> NDArray[Any]:
        """Stored maps ``(sample of the batch, target, [frame,] y, x)`` by target row, cut to the clips' length."""
        rows = self.rows_of(values)
        return rows[:, : frame_count(self.objective.frames)] if self.objective.frames else rows


def bind(
    source: AttentionSource, samples: Sequence[Sample], target: Target, stored: NDArray[np.int32] | None = None
) -> Bound | None:
    """Encode samples and freeze the target to what the model answers for them now; None without any target.

    ``stored`` (sample, target) are the objects that the maps explain: rows are put at their object's place, and
    an object without a map (one at the threshold, that batch-mates tip over it) is left out.
    """
    batch = source.encode(samples)
    with torch.no_grad():
        outputs = source.forward(batch)
        bound = source.bind(outputs, batch, target)
        batch = source.hold(batch, outputs)  # a tracker's rows stay the tracks that they were
    placed = [(i, place) for i, place in enumerate(_places(bound.rows, stored)) if place is not None]
    if not placed:
        return None
    objective = Objective(source, batch, bound)
    kept = objective if len(placed) == len(bound) else objective.take([i for i, _ in placed])
    return Bound(kept, tuple(place for _, place in placed), samples)


def _places(rows: Sequence[TargetRow], stored: NDArray[np.int32] | None) -> list[tuple[int, int] | None]:
    """The (sample, target) place of each row: its object's, or the next of its sample."""
    places: list[tuple[int, int] | None] = []
    count: dict[int, int] = {}
    for row in rows:
        slot: int | None = count.get(row.sample, 0)
        count[row.sample] = count.get(row.sample, 0) + 1
        if row.object is not None and stored is not None and (stored[row.sample] >= 0).any():
            slot = next(iter(np.flatnonzero(stored[row.sample] == row.object).tolist()), None)
        places.append(None if slot is None else (row.sample, slot))
    return places


def usable_scales(bound: Bound, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of ``wanted`` on which the source can score the target; "value" where there is none.

    Sources raise UsageError for a scale that a target has not, or bind it as a "value" from the start.
    """
    if bound.objective.bound.scale == "value":
        return ("value",)
    return tuple(scale for scale in wanted if _has_scale(bound, scale)) or ("value",)


def _has_scale(bound: Bound, scale: str) -> bool:
    objective = bound.objective
    first = objective.take([0])
    try:
        with torch.no_grad():
            objective.source.score(objective.source.forward(first.batch), first.batch, read_as(first.bound, scale))
    except UsageError:
        return False
    return True


def check_same_answer(bound: Bound, stored: StoredMaps, positions: Sequence[int]) -> None:
    """Raise UsageError where the maps explain another class than the one that is scored."""
    room = stored.classes.shape[1]
    if bound.slots and max(t for _, t in bound.slots) >= room:
        raise UsageError(f"{stored.method}: maps of {room} targets an image, but the model now has more")
    explained = bound.rows_of(stored.classes[list(positions)])
    objects = bound.rows_of(stored.objects[list(positions)])
    for expected, target in zip(objects, bound.objective.bound.rows, strict=True):
        if expected >= 0 and target.object is not None and expected != target.object:
            raise UsageError(
                f"{stored.method}: its maps explain other objects than those of the other methods "
                f"(query {expected} in place of {target.object})",
                remedy="explain again by all methods with foveate attribute --overwrite",
            )
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

    Edge, saturation and motion need colours as input, own box and own mask targets that are objects; where that
    is not so, they are left out. Motion and one frame are for clips. A mask of the image is no truth about one of
    its objects: they have no oracle.
    """
    controls: list[Attribution] = [Uniform(), Centre(), Edge(), Saturation()]
    if bound.objective.frames:
        controls += [Motion(), OneFrame()]
    if bound.of_objects:
        controls += [OwnBox(), OwnMask()]
    elif masks:
        controls.append(Oracle(bound.masks))
    if twin is not None:
        controls += [Untrained(method, twin) for method in twin_methods]
    made: dict[str, NDArray[np.float64]] = {}
    objective = bound.objective
    for control in controls:
        try:
            found = control.attribute(objective.source, objective.batch, objective.bound)
        except UsageError:
            if control.name not in DISPENSABLE:
                raise
            continue
        made[found.method] = to_cells(found.values, found.grid, cells)
    return made


DISPENSABLE = (Edge.name, Saturation.name, Motion.name, OwnBox.name, OwnMask.name)


def evidence_share(bound: Bound, cells: CellGrid) -> NDArray[np.float64]:
    """What localisation is measured against: the share of each cell, (target row, cell), under the sample's mask.

    Of an object: under its predicted box, or mask where it has no box; of a track under its masks. NaN where there
    is neither.
    """
    objective, frames = bound.objective, bound.objective.frames
    if bound.of_objects:
        own = own_predictions(objective.source, objective.batch, objective.bound)
        shares = [own_share(*pair, cells, frames) for pair in zip(own, objective.batch.geometry, strict=True)]
        return np.stack(shares).reshape(len(shares), -1)
    blank = np.full(objective.map_shape, np.nan)
    rows = [
        blank if mask is None else sample_share(mask, objective.batch, row, cells, frames)
        for row, mask in enumerate(bound.masks)
    ]
    return np.stack(rows).reshape(len(rows), -1)
