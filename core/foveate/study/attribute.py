"""``foveate attribute``: explanations of every captured image, stored beside its attention.

The target is bound once a batch, to the output the model gives now, and every method explains that same
target. Each method becomes a product ``attributions/<method>`` of the run: ``map (sample, target, y, x)``
on the model's cells, whether it converged, and what its numbers depend on. A job that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.external import load_external
from foveate.attribution.objective import Objective
from foveate.errors import SampleError, UsageError
from foveate.faithfulness.leaderboard import CONVERGED_SHARE
from foveate.geometry import regrid
from foveate.interfaces import Sample, Target
from foveate.study.attribute_plan import (
    DEFAULT_METHODS,
    Estimate,
    build_methods,
    estimate,
    explain_all,
    method_cost,
    method_options,
    with_rows,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from foveate.data.products import ProductWriter
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Attribution, AttributionMap, BoundTarget

Progress = Callable[[int, int], None]
PREFIX = "attributions/"
LOGIT = Target(scale="logit")


@dataclass(frozen=True)
class MethodReport:
    """What became of one method over a run; ``seed_spearman`` is the median over target rows (NaN: no draw)."""

    method: str
    maps: int
    evaluations_per_patch: float
    seed_spearman: float
    converged_share: float

    @property
    def converged(self) -> bool:
        """Whether the method may be ranked."""
        return self.converged_share >= CONVERGED_SHARE


@dataclass(frozen=True)
class AttributionReport:
    """All methods of one job; ``failed`` maps the samples that could not be explained to the reason."""

    methods: tuple[MethodReport, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What is the same for every method of a job.

    ``target.scale`` "logit" is the default here: a confident model's probability is flat, and its gradient
    fades with 1 - p. ``max_targets`` is the number of explained rows a sample that is made room for.
    """

    target: Target = LOGIT
    seed: int = 0
    max_targets: int = 1
    batch_size: int = 8
    overwrite: bool = False


def attribute_run(
    run: Run,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    source: AttentionSource | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Settings = Settings(),  # frozen
    progress: Progress | None = None,
) -> AttributionReport:
    """Explain every captured sample by every method and store the maps.

    Samples whose file is gone or changed are left out and reported. Raises UsageError for unknown methods,
    targets or options, or where a sample has more target rows than ``settings.max_targets``; StoreError
    where maps of other settings are there already and ``settings.overwrite`` is not set.
    """
    built = build_methods(methods, options)
    source = source if source is not None else run.open_source()
    first = _first_objective(run, source, settings)
    built = with_rows(built, first.rows(grad=True))
    names = [method.name for method in built]
    with ExitStack() as stack:
        writers = {m.name: stack.enter_context(_writer(run, source, m, settings)) for m in built}
        waiting = np.unique(np.concatenate([writer.pending(run.ok) for writer in writers.values()]))
        failed: dict[str, str] = {}
        for start in range(0, waiting.size, settings.batch_size):
            positions = waiting[start : start + settings.batch_size]
            _explain_batch(run, source, built, writers, positions, settings, failed)
            if progress is not None:
                progress(min(start + settings.batch_size, waiting.size), waiting.size)
    return AttributionReport(tuple(report(run, name) for name in names), failed)


def plan_run(
    run: Run,
    methods: Sequence[str] = DEFAULT_METHODS,
    *,
    source: AttentionSource | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    settings: Settings = Settings(),  # frozen
) -> list[Estimate]:
    """Forward and backward passes and time of each method, from one timed sample. Writes nothing."""
    built = build_methods(methods, options)
    source = source if source is not None else run.open_source()
    first = _first_objective(run, source, settings)
    built = with_rows(built, first.rows(grad=True))
    return estimate(built, first, rows=int(run.ok.size) * len(first))


def add_external(run: Run, name: str, path: Path | str, *, overwrite: bool = False) -> MethodReport:
    """Store another tool's maps (see :mod:`foveate.attribution.external`) as ``attributions/<name>``.

    They count as explanations of whatever target they are scored against.
    """
    if name in {spec.name for spec in _known_specs()}:
        raise UsageError(f"external map {name!r}: that is the name of a method", remedy="choose another name")
    ids = [str(run.samples["id"].values[i]) for i in run.ok]
    maps = load_external(path, name=name, ids=ids)
    made = maps.on_cells(ids, [run.geometry(int(i)) for i in run.ok], run.grid)
    attrs = {"method": name, "signed": made.signed, "source": "external", **_plain(made.info)}
    variables = _variables(run, 1, (), ())
    with run.product_writer(PREFIX + name, variables, _coords(run, 1, ()), attrs, overwrite=overwrite) as out:
        out.write(run.ok, _external_blocks(made.values))
    return report(run, name)


def report(run: Run, method: str) -> MethodReport:
    """What a stored product says of its method's convergence and price."""
    dataset = run.product(PREFIX + method)
    known = np.isfinite(dataset["map"].values).any(axis=tuple(range(2, dataset["map"].ndim)))
    spearman = dataset["seed_spearman"].values[known] if "seed_spearman" in dataset else np.array([])
    return MethodReport(
        method,
        int(known.sum()),
        float(dataset.attrs.get("evaluations_per_patch", np.nan)),
        float(np.median(np.nan_to_num(spearman))) if spearman.size else float("nan"),
        float(dataset["converged"].values[known].mean()) if known.any() else 0.0,
    )


# ---------------------------------------------------------------------------------------- one batch


def _explain_batch(
    run: Run,
    source: AttentionSource,
    methods: Sequence[Attribution],
    writers: Mapping[str, ProductWriter],
    positions: NDArray[np.intp],
    settings: Settings,
    failed: dict[str, str],
) -> None:
    """Explain the samples at ``positions`` and write; those whose image is gone go to ``failed``."""
    loaded = _load(run, positions, failed)
    wanted = [m for m in methods if writers[m.name].pending(list(loaded)).size]
    if not loaded or not wanted:
        return
    objective, samples = _objective(source, list(loaded.values()), settings.target)
    slots = _slots(samples, list(loaded.values()), settings.max_targets)
    with torch.no_grad():
        scores = objective(objective.inputs).double().cpu().numpy() if len(slots) else np.empty(0)
    for name, made in explain_all(wanted, objective, seed=settings.seed):
        blocks = _blocks(run, made, objective.bound, scores, slots, len(loaded), settings.max_targets)
        for diagnostic in _diagnostics(next(m for m in wanted if m.name == name)):
            rows = made.info.get("per_row", {}).get(diagnostic, np.full(len(slots), np.nan))
            blocks[diagnostic] = _place(np.asarray(rows, np.float32), slots, len(loaded), settings.max_targets)
        writers[name].write(list(loaded), blocks)


def _load(run: Run, positions: Iterable[np.intp], failed: dict[str, str]) -> dict[int, Sample]:
    loaded: dict[int, Sample] = {}
    for position in map(int, positions):
        try:
            loaded[position] = run.load_sample(position)
        except SampleError as error:
            failed[str(run.samples["id"].values[position])] = str(error)
    return loaded


def _objective(
    source: AttentionSource, samples: Sequence[Sample], target: Target
) -> tuple[Objective, tuple[int, ...]]:
    """The bound target of some samples, and which sample each row belongs to. Raises UsageError for no rows."""
    batch = source.encode(samples)
    with torch.no_grad():
        bound = source.bind(source.forward(batch), batch, target)
    return Objective(source, batch, bound), tuple(row.sample for row in bound.rows)


def _first_objective(run: Run, source: AttentionSource, settings: Settings) -> Objective:
    for position in run.ok:
        try:
            return _objective(source, [run.load_sample(int(position))], settings.target)[0]
        except SampleError:
            continue
    raise UsageError(f"{run.path}: no captured sample can be read, there is nothing to explain")


def _slots(rows: Sequence[int], samples: Sequence[Sample], capacity: int) -> list[tuple[int, int]]:
    """(sample, target) place of each row. Raises UsageError where a sample has more rows than room."""
    counts: dict[int, int] = {}
    slots = []
    for sample in rows:
        slots.append((sample, counts.setdefault(sample, 0)))
        counts[sample] += 1
    most = max(counts.values(), default=0)
    if most > capacity:
        crowded = samples[max(counts, key=lambda s: counts[s])].id
        raise UsageError(
            f"sample {crowded!r} has {most} target rows, but there is room for {capacity}",
            remedy=f"--max-targets {most}, or more if other samples have more",
        )
    return slots


def _blocks(
    run: Run,
    made: AttributionMap,
    bound: BoundTarget,
    scores: NDArray[np.float64],
    slots: Sequence[tuple[int, int]],
    samples: int,
    capacity: int,
) -> dict[str, NDArray[Any]]:
    """One block a variable, (sample, target, ...), from values a target row."""
    values = made.values if made.grid == run.grid else regrid(made.values, made.grid, run.grid)
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(values).reshape(len(values), -1).all(1))
    claimed: Any = made.info.get("converged_rows", made.converged)
    converged = finite & np.broadcast_to(claimed, finite.shape)
    classes = [-1 if row.class_index is None else row.class_index for row in bound.rows]
    labels = np.array([row.label for row in bound.rows], object)
    return {
        "map": _place(np.asarray(values, np.float32), slots, samples, capacity),
        "converged": _place(converged, slots, samples, capacity, False),
        "score": _place(scores.astype(np.float32), slots, samples, capacity),
        "target_label": _place(labels, slots, samples, capacity, ""),
        "target_class": _place(np.array(classes, np.int32), slots, samples, capacity, -1),
    }


def _place(
    rows: NDArray[Any], slots: Sequence[tuple[int, int]], samples: int, capacity: int, empty: Any = np.nan
) -> NDArray[Any]:
    """Rows (row, ...) at their (sample, target) places; the rest is ``empty``."""
    block = np.full((samples, capacity, *rows.shape[1:]), empty, rows.dtype)
    for row, slot in zip(rows, slots, strict=True):
        block[slot] = row
    return block


def _external_blocks(values: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    count = len(values)
    known: NDArray[np.bool_] = np.asarray(np.isfinite(values).reshape(count, -1).any(1))
    return {
        "map": values[:, None],
        "converged": known[:, None],
        "score": np.full((count, 1), np.nan, np.float32),
        "target_label": np.full((count, 1), "", object),
        "target_class": np.full((count, 1), -1, np.int32),
    }


# ------------------------------------------------------------------------------------------ the store


def _writer(run: Run, source: AttentionSource, method: Attribution, settings: Settings) -> ProductWriter:
    frames = _frames(run)
    variables = _variables(run, settings.max_targets, frames, _diagnostics(method))
    coords, attrs = _coords(run, settings.max_targets, frames), _attrs(run, source, method, settings)
    return run.product_writer(PREFIX + method.name, variables, coords, attrs, overwrite=settings.overwrite)


def _variables(
    run: Run, targets: int, frames: tuple[int, ...], diagnostics: Iterable[str]
) -> dict[str, tuple[Any, ...]]:
    row: tuple[tuple[str, ...], tuple[int, ...]] = (("sample", "target"), (len(run), targets))
    places = (*row[0], *(("frame",) if frames else ()), "y", "x")
    shape = (*row[1], *frames, *run.grid.shape)
    return {
        "map": (places, shape, "float32", {"long_name": "attribution on cells of the model's input"}),
        "converged": (*row, "bool"),
        "score": (*row, "float32", {"long_name": "the explained number, for the image itself"}),
        "target_label": (*row, "string"),
        "target_class": (*row, "int32", {"long_name": "class index, -1 where there is none"}),
        **dict.fromkeys(diagnostics, (*row, "float32")),
    }


def _coords(run: Run, targets: int, frames: tuple[int, ...]) -> dict[str, Any]:
    y, x = run.grid.centres
    unit = {"units": "pixel of the model's input"}
    frame = {"frame": np.arange(frames[0])} if frames else {}
    return {"target": np.arange(targets), **frame, "y": ("y", y, unit), "x": ("x", x, unit)}


def _attrs(run: Run, source: AttentionSource, method: Attribution, settings: Settings) -> dict[str, Any]:
    """All that fixes the maps, for their provenance; equal attributes mean the same job."""
    shape = (*_frames(run), *run.grid.shape)
    cost, options = method_cost(method, shape), method_options(method)
    target = settings.target
    return {
        "method": method.name,
        "citation": getattr(method, "citation", ""),
        "options": _plain(options),
        "signed": options.get("pooling") == "signed" or options.get("relu") is False,
        "target_kind": source.targets[0] if target.kind == "default" and source.targets else target.kind,
        "target_asked": "" if target.label is None else str(target.label),
        "target_object": -1 if target.object is None else target.object,
        "scale": target.scale,
        "seed": settings.seed,
        "forward_passes": cost.forward,
        "backward_passes": cost.backward,
        "evaluations_per_patch": cost.forward / (shape[-1] * shape[-2]),
        "model": source.card.id,
        "weights_sha256": source.card.weights_sha256,
        "captum": version("captum"),
        "torch": version("torch"),
    }


def _frames(run: Run) -> tuple[int, ...]:
    """Frames of a clip; images have none. (Clips are stored once runs of clips exist.)"""
    frames = run.attrs.get("frames")
    return (int(frames),) if frames else ()


def _diagnostics(method: Attribution) -> tuple[str, ...]:
    return tuple(getattr(method, "diagnostics", ()))


def _known_specs() -> list[Any]:
    from foveate.plugins.manager import plugin_manager

    return list(plugin_manager().specs("attribution"))


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold."""
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in values.items()}
