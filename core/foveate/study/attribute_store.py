"""How explanations lie in a run: ``attributions/<method>`` with one slot a sample and explained row.

Targets may be ragged (objects, several classes); a sample's rows take its slots in order, and slots that
are not used hold NaN, an empty label and class -1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.records import EDGES
from foveate.errors import PluginError, UsageError
from foveate.geometry import regrid
from foveate.study.attribute_plan import method_cost, method_options
from foveate.study.clip_frames import frame_coords, map_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.products import ProductWriter
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Attribution, AttributionMap, Prediction, Target, TargetRow

PREFIX = "attributions/"
EMPTY: Mapping[str, Any] = {
    "converged": False,
    "target_label": "",
    "target_class": -1,
    "target_object": -1,
    "target_track": "",
}
"""What an unused slot holds, where it is not NaN."""


@dataclass(frozen=True)
class Slots:
    """Where target rows go: ``places`` (sample of the batch, slot), within ``samples x capacity``."""

    places: tuple[tuple[int, int], ...]
    samples: int
    capacity: int

    @classmethod
    def of(cls, sample_of_row: Iterable[int], ids: Sequence[str], capacity: int) -> Slots:
        """Slots in order of the rows. Raises UsageError where a sample has more rows than ``capacity``."""
        used = [0] * len(ids)
        places = []
        for sample in sample_of_row:
            places.append((sample, used[sample]))
            used[sample] += 1
        most = max(used, default=0)
        if most > capacity:
            raise UsageError(
                f"sample {ids[used.index(most)]!r} has {most} target rows, but there is room for {capacity}",
                remedy=f"--max-targets {most}, or more if other samples have more",
            )
        return cls(tuple(places), len(ids), capacity)

    def lay(self, name: str, rows: NDArray[Any]) -> NDArray[Any]:
        """Values ``(row, ...)`` at their places, ``(sample, slot, ...)``; the rest as :data:`EMPTY` says."""
        block = np.full((self.samples, self.capacity, *rows.shape[1:]), EMPTY.get(name, np.nan), rows.dtype)
        for row, place in zip(rows, self.places, strict=True):
            block[place] = row
        return block


def open_writer(
    run: Run,
    name: str,
    attrs: Mapping[str, Any],
    extra: Iterable[str] = (),
    *,
    slots: int,
    overwrite: bool,
    objects: bool = False,
) -> ProductWriter:
    """The product of one method, allocated or continued, with ``extra`` numbers a target row.

    Where targets are ``objects``, it also says which: the query, and its predicted box in original pixels; of
    clips the track. Maps of clips have an axis ``frame``, see :mod:`foveate.study.clip_frames`.

    Raises StoreError where one of other settings is in its place and ``overwrite`` is not set.
    """
    y, x = run.grid.centres
    unit = {"units": "pixel of the model's input"}
    coords: dict[str, Any] = {"target": np.arange(slots), "y": ("y", y, unit), "x": ("x", x, unit)}
    coords |= frame_coords(run)
    frame = ("frame",) if run.media == "clip" else ()
    row: tuple[tuple[str, ...], tuple[int, ...]] = (("sample", "target"), (len(run), slots))
    variables: dict[str, tuple[Any, ...]] = {
        "map": (
            (*row[0], *frame, "y", "x"),
            (*row[1], *map_shape(run)),
            "float32",
            {"long_name": "attribution on cells of the model's input"},
        ),
        "converged": (*row, "bool"),
        "score": (*row, "float32", {"long_name": "the explained number, for the image itself"}),
        "target_label": (*row, "string"),
        "target_class": (*row, "int32", {"long_name": "class index, -1 where there is none"}),
        **dict.fromkeys(extra, (*row, "float32")),
    }
    if objects:
        variables["target_object"] = (*row, "int32", {"long_name": "object query, -1 where there is none"})
        place = {"long_name": "predicted box of the object", "units": "pixel of the original image"}
        variables["target_box"] = ((*row[0], "edge"), (*row[1], len(EDGES)), "float32", place)
        coords["edge"] = list(EDGES)
        if frame:
            variables["target_track"] = (*row, "string", {"long_name": "track of the object, empty for none"})
    return run.product_writer(PREFIX + name, variables, coords, attrs, overwrite=overwrite)


def blocks(
    run: Run,
    made: AttributionMap,
    rows: Sequence[TargetRow],
    scores: NDArray[Any],
    extra: Sequence[str],
    slots: Slots,
    own: Sequence[Prediction | None] | None = None,
) -> dict[str, NDArray[Any]]:
    """A method's maps of one batch as blocks of its product, ``(sample, slot, ...)``.

    ``own`` are the model's answers for the objects, where targets are objects. Raises PluginError where the method
    did not give one map a target row.
    """
    shape = map_shape(run)
    axes, found = len(shape) - 2, made.values.shape
    if len(found) != len(shape) + 1 or found[0] != len(rows) or found[-2:] != made.grid.shape:
        expected = ", ".join(map(str, (len(rows), *("frame",) * axes, *made.grid.shape)))
        raise PluginError(
            f"method {made.method}: expected maps ({expected}) for {len(rows)} target rows on its own grid, got "
            f"{found}"
        )
    values = made.values if made.grid == run.grid else regrid(made.values, made.grid, run.grid)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(values).all(tuple(range(1, values.ndim))))
    values = _with_room(values, shape, made.method)
    claimed: Any = made.info.get("converged_rows", made.converged)
    classes = [-1 if row.class_index is None else row.class_index for row in rows]
    per_row = made.info.get("per_row", {})
    columns = {
        "map": np.asarray(values, np.float32),
        "converged": finite & np.broadcast_to(claimed, finite.shape),
        "score": np.asarray(scores, np.float32),
        "target_label": np.array([row.label for row in rows], object),
        "target_class": np.array(classes, np.int32),
        **{name: np.asarray(per_row.get(name, np.full(len(rows), np.nan)), np.float32) for name in extra},
    }
    if own is not None:
        columns["target_object"] = np.array([-1 if row.object is None else row.object for row in rows], np.int32)
        boxes = [(np.nan,) * len(EDGES) if one is None or one.box is None else one.box for one in own]
        columns["target_box"] = np.asarray(boxes, np.float32)
        if axes:
            tracks = ["" if one is None else one.track or "" for one in own]
            columns["target_track"] = np.array(tracks, object)
    return {name: slots.lay(name, column) for name, column in columns.items()}


def _with_room(values: NDArray[Any], shape: tuple[int, ...], method: str) -> NDArray[Any]:
    """Maps ``(row, [frame,] y, x)`` padded with NaN behind a clip's end. PluginError for too many frames."""
    if values.shape[1:] == shape:
        return values
    if len(shape) < 3 or values.shape[1] > shape[0]:
        raise PluginError(f"method {method}: maps of shape {values.shape[1:]}, but the run's are {shape}")
    room = np.full((len(values), *shape), np.nan, values.dtype)
    room[:, : values.shape[1]] = values
    return room


def empty_blocks(run: Run, extra: Sequence[str], slots: Slots, *, objects: bool) -> dict[str, NDArray[Any]]:
    """Blocks of samples that have no target row at all."""
    size = (slots.samples, slots.capacity)
    blank: dict[str, NDArray[Any]] = {}
    if objects:
        blank["target_object"] = np.full(size, -1, np.int32)
        blank["target_box"] = np.full((*size, len(EDGES)), np.nan, np.float32)
        if run.media == "clip":
            blank["target_track"] = np.full(size, "", object)
    return blank | {
        "map": np.full((*size, *map_shape(run)), np.nan, np.float32),
        "converged": np.zeros(size, bool),
        "score": np.full(size, np.nan, np.float32),
        "target_label": np.full(size, "", object),
        "target_class": np.full(size, -1, np.int32),
        **{name: np.full(size, np.nan, np.float32) for name in extra},
    }


def diagnostics(method: Attribution) -> tuple[str, ...]:
    """Names of the numbers a target row that a method reports about its own convergence."""
    return tuple(getattr(method, "diagnostics", ()))


def provenance(
    run: Run, source: AttentionSource, method: Attribution, target: Target, *, seed: int
) -> dict[str, Any]:
    """All that fixes the maps; equal attributes mean the same job."""
    shape = map_shape(run)
    cost, options = method_cost(method, shape), method_options(method)
    return {
        "method": method.name,
        "citation": getattr(method, "citation", ""),
        "options": options,
        "signed": options.get("pooling") == "signed" or options.get("relu") is False,
        "target_kind": source.targets[0] if target.kind == "default" and source.targets else target.kind,
        "target_asked": "" if target.label is None else str(target.label),
        "target_object": -1 if target.object is None else target.object,
        "scale": target.scale,
        "seed": seed,
        "forward_passes": cost.forward,
        "backward_passes": cost.backward,
        "evaluations_per_patch": cost.forward / math.prod(shape),
        "model": source.card.id,
        "weights_sha256": source.card.weights_sha256,
        "captum": version("captum"),
        "torch": version("torch"),
    }
