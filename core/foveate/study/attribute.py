"""``foveate attribute``: explanations of every captured image, stored beside its attention.

The target is bound once a batch, to the output the model gives now, and every method explains that same
target. Each method becomes a product ``attributions/<method>`` of the run: ``map (sample, target, y, x)``
(of clips ``(sample, target, frame, y, x)``) on the model's cells, whether it converged, and what its numbers
depend on. A job that was cut off goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.attribution.external import load_external
from foveate.attribution.objective import Objective
from foveate.attribution.objects import of_objects, own_prediction
from foveate.errors import SampleError, UsageError
from foveate.faithfulness.leaderboard import CONVERGED_SHARE
from foveate.interfaces import Prediction, Sample, Target, TargetRow
from foveate.study.attribute_plan import (
    DEFAULT_METHODS,
    Estimate,
    build_methods,
    estimate,
    explain_all,
    fitting,
    with_rows,
)
from foveate.study.attribute_store import PREFIX, Slots, blocks, diagnostics, empty_blocks, open_writer, provenance
from foveate.study.clip_frames import alike, check_frames

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from foveate.data.products import ProductWriter
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Attribution, Batch, BoundTarget

Progress = Callable[[int, int], None]
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
    """All methods of one job; ``failed`` maps the samples that could not be explained to the reason.

    ``left_out`` are the methods of ``default`` that this model of clips does not allow, with the reason.
    """

    methods: tuple[MethodReport, ...]
    failed: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What is the same for every method of a job.

    ``target.scale`` "logit" is the default here: a confident model's probability is flat, and its gradient
    fades with 1 - p. ``max_targets`` is the number of explained rows a sample that is made room for (None: as
    many as any sample has, which takes one more forward pass an image where targets are objects).
    """

    target: Target = LOGIT
    seed: int = 0
    max_targets: int | None = None
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
    where maps of other settings are there and ``settings.overwrite`` is not set, and where no sample was captured.
    """
    built = build_methods(methods, options)
    run.check_captured()
    source = source if source is not None else run.open_source()
    first = _first_objective(run, source, settings)
    built, left_out = fitting(built, methods, first)
    rows, objects = first.rows(grad=True), of_objects(first.bound)
    room = settings.max_targets or max(_targets(run, source, settings, first))
    job = _Job(run, source, {m.name: m for m in with_rows(built, rows)}, settings, rows, room, objects)
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        writers = {name: stack.enter_context(job.writer(name)) for name in job.methods}
        waiting = np.unique(np.concatenate([writer.pending(run.ok) for writer in writers.values()]))
        for start in range(0, waiting.size, settings.batch_size):
            _explain_batch(job, writers, waiting[start : start + settings.batch_size], failed)
            if progress is not None:
                progress(min(start + settings.batch_size, waiting.size), waiting.size)
    return AttributionReport(tuple(report(run, name) for name in job.methods), failed, left_out)


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
    built = with_rows(fitting(built, methods, first)[0], first.rows(grad=True))
    return estimate(built, first, rows=sum(_targets(run, source, settings, first)))


def add_external(run: Run, name: str, path: Path | str, *, overwrite: bool = False) -> MethodReport:
    """Store another tool's maps (see :mod:`foveate.attribution.external`) as ``attributions/<name>``.

    They count as explanations of whatever target they are scored against.
    """
    if name in {spec.name for spec in _known_specs()}:
        raise UsageError(f"external map {name!r}: that is the name of a method", remedy="choose another name")
    ids = [str(run.samples["id"].values[i]) for i in run.ok]
    maps = load_external(path, name=name, ids=ids)
    clip = run.media == "clip"
    frames = [tuple(int(cell) for cell in run.frame_cells(int(i))) for i in run.ok] if clip else None
    made = maps.on_cells(ids, [run.geometry(int(i)) for i in run.ok], run.grid, frames)
    attrs = {"method": name, "signed": made.signed, "source": "external", **made.info}
    rows = [TargetRow(i, "external") for i in range(len(ids))]
    slots = Slots.of(range(len(ids)), ids, 1)
    with open_writer(run, name, attrs, slots=1, overwrite=overwrite) as out:
        out.write(run.ok, blocks(run, made, rows, np.full(len(ids), np.nan), (), slots))
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


@dataclass(frozen=True)
class _Job:
    """What stays the same while batches come and go.

    ``rows`` is what one pass of the model takes, ``room`` the number of targets a sample, ``objects`` whether
    targets are objects.
    """

    run: Run
    source: AttentionSource
    methods: Mapping[str, Attribution]
    settings: Settings
    rows: int
    room: int
    objects: bool

    def writer(self, name: str) -> ProductWriter:
        """The product of one method, allocated or continued."""
        method, settings = self.methods[name], self.settings
        attrs = provenance(self.run, self.source, method, settings.target, seed=settings.seed)
        options: dict[str, Any] = {"slots": self.room, "overwrite": settings.overwrite, "objects": self.objects}
        return open_writer(self.run, name, attrs, diagnostics(method), **options)


def _explain_batch(
    job: _Job, writers: Mapping[str, ProductWriter], positions: NDArray[np.intp], failed: dict[str, str]
) -> None:
    """Explain the samples at ``positions`` and write; those whose image is gone go to ``failed``."""
    for group in alike(job.run, positions):
        loaded = _load(job.run, group, failed)
        if loaded:
            _explain_loaded(job, writers, loaded)


def _explain_loaded(job: _Job, writers: Mapping[str, ProductWriter], loaded: Mapping[int, Sample]) -> None:
    """Explain samples by position, which one batch can hold, and write."""
    wanted = {name: m for name, m in job.methods.items() if writers[name].pending(list(loaded)).size}
    if not wanted:
        return
    batch, bound, own = _bind(job.source, list(loaded.values()), job.settings.target)
    check_frames(job.run, job.source, batch, next(iter(loaded)))
    slots = Slots.of((row.sample for row in bound.rows), batch.ids, job.room)
    if not len(bound):
        for name, method in wanted.items():
            blank = empty_blocks(job.run, diagnostics(method), slots, objects=job.objects)
            writers[name].write(list(loaded), blank)
        return
    objective = Objective(job.source, batch, bound, rows=job.rows)
    with torch.no_grad():
        scores = objective(objective.inputs).double().cpu().numpy()
    for name, made in explain_all(list(wanted.values()), objective, seed=job.settings.seed):
        extra, answers = diagnostics(wanted[name]), own if job.objects else None
        writers[name].write(list(loaded), blocks(job.run, made, bound.rows, scores, extra, slots, answers))


def _load(run: Run, positions: Iterable[int | np.intp], failed: dict[str, str]) -> dict[int, Sample]:
    loaded: dict[int, Sample] = {}
    for position in map(int, positions):
        try:
            loaded[position] = run.load_sample(position)
        except SampleError as error:
            failed[str(run.samples["id"].values[position])] = str(error)
    return loaded


def _bind(
    source: AttentionSource, samples: Sequence[Sample], target: Target
) -> tuple[Batch, BoundTarget, list[Prediction | None]]:
    """A batch, its target, and the model's answer for each row's object, None where it has none."""
    batch = source.encode(samples)
    with torch.no_grad():
        outputs = source.forward(batch)
        bound = source.bind(outputs, batch, target)
        own: list[Prediction | None] = [None] * len(bound)
        if of_objects(bound):
            answers = source.predictions(outputs, batch)
            own = [own_prediction(answers[row.sample], row) for row in bound.rows]
        batch = source.hold(batch, outputs)
    return batch, bound, own


def _targets(run: Run, source: AttentionSource, settings: Settings, first: Objective) -> list[int]:
    """Target rows of every sample that can be read; only targets that are objects differ in number."""
    if not of_objects(first.bound):
        return [len(first)] * int(run.ok.size)
    counts = []
    for start in range(0, run.ok.size, settings.batch_size):
        for group in alike(run, run.ok[start : start + settings.batch_size]):
            loaded = _load(run, group, {})
            if loaded:
                _, bound, _ = _bind(source, list(loaded.values()), settings.target)
                rows = [row.sample for row in bound.rows]
                counts += [rows.count(sample) for sample in range(len(loaded))]
    return counts


def _first_objective(run: Run, source: AttentionSource, settings: Settings) -> Objective:
    """The first sample that can be read and has a target: it is measured and timed before the job."""
    for position in run.ok:
        try:
            batch, bound, _ = _bind(source, [run.load_sample(int(position))], settings.target)
        except SampleError:
            continue
        if len(bound):
            return Objective(source, batch, bound)
    raise UsageError(
        f"{run.path}: no captured sample can be read and has a target, there is nothing to explain",
        remedy="of a detector: capture with a lower threshold (--option threshold=0.2), or name one with --object",
    )


def _known_specs() -> list[Any]:
    from foveate.plugins.manager import plugin_manager

    return list(plugin_manager().specs("attribution"))
