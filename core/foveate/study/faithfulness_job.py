"""One faithfulness job while it runs: which samples, maps and controls, and the curves that it stores.

Curves go to ``faithfulness/curves`` as they are computed, with everything that fixes them as attributes, so
that a job that was cut off continues and one of other settings cannot be mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import SampleError, UsageError
from foveate.faithfulness.curves import MODES
from foveate.faithfulness.leaderboard import RANDOM
from foveate.faithfulness.localisation import LOCALISATION, localisation
from foveate.faithfulness.orders import to_cells
from foveate.faithfulness.readings import readings_of
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.units import Unit
from foveate.study.clip_frames import alike, cell_counts, check_for_clips, check_frames, product_name
from foveate.study.faithfulness_inputs import (
    Bound,
    StoredMaps,
    bind,
    check_same_answer,
    common_target,
    control_maps,
    evidence_share,
    usable_scales,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.products import ProductWriter
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Attribution, Sample, Target

Progress = Callable[[int, int], None]
CURVES = "faithfulness/curves"


@dataclass(frozen=True)
class Settings:
    """Of a faithfulness job. ``samples`` draws that many images or clips (seeded) instead of all."""

    scoring: Scoring = field(default_factory=Scoring)
    samples: int | None = None
    batch_size: int = 8
    overwrite: bool = False


class Job:
    """What stays the same during one job."""

    def __init__(
        self,
        run: Run,
        source: AttentionSource,
        stored: Mapping[str, StoredMaps],
        settings: Settings,
        twin: AttentionSource | None,
        twin_methods: tuple[Attribution, ...],
    ) -> None:
        self.run, self.source, self.stored, self.settings = run, source, stored, settings
        self.twin, self.twin_methods = twin, twin_methods
        self.target: Target = common_target(stored)
        if self.target.kind.startswith("box_"):
            raise UsageError(
                f"the maps explain {self.target.kind}: an edge of a box can move either way, so deletion and "
                "insertion have no better and worse for it",
                remedy="explain class or iou_score with foveate attribute --target-kind",
            )
        self.positions = _chosen(run, settings)
        check_for_clips(run, settings.scoring)
        self.frames = cell_counts(run)
        self.masks = "mask" in run.samples and any(str(path) for path in run.samples["mask"].values)
        _, bound = self.probe()
        self.objects = bound.of_objects
        self.scoring = _on_scales_of(self, bound, settings.scoring)

    def bind(self, samples: Mapping[int, Sample]) -> Bound | None:
        """The bound target of some samples by position; None where none of them has one."""
        stored = next(iter(self.stored.values())).objects
        for maps in self.stored.values():
            if (maps.objects >= 0).any():
                stored = maps.objects
                break
        return bind(self.source, list(samples.values()), self.target, stored[list(samples)])

    def probe(self) -> tuple[int, Bound]:
        """The first sample that can be read and has a target, bound. Raises UsageError where there is none."""
        for position in map(int, self.positions):
            try:
                bound = self.bind({position: self.run.load_sample(position)})
            except SampleError:
                continue
            if bound is not None:
                return position, bound
        raise UsageError(f"{self.run.path}: no captured sample can be read and has a target to score")

    def maps(self, bound: Bound, positions: Sequence[int]) -> dict[str, NDArray[np.float64]]:
        """Stored and control maps on the model's cells, name -> (target row, cell)."""
        cells = self.run.grid
        found = {}
        for name, stored in self.stored.items():
            check_same_answer(bound, stored, positions)
            found[name] = to_cells(bound.maps_of(stored.values[list(positions)]), cells, cells)
        return found | control_maps(bound, cells, masks=self.masks, twin=self.twin, twin_methods=self.twin_methods)

    @property
    def localises(self) -> bool:
        """Whether there is a place to hold maps against: a mask, or an object's predicted box."""
        return self.masks or self.objects

    @property
    def unit(self) -> Unit:
        """What vanishes at once."""
        return self.scoring.unit

    def fractions(self, position: int) -> NDArray[np.float64]:
        """Shares of the units that are changed at each step, for one sample."""
        frames = (int(self.frames[position]),) if self.run.media == "clip" else ()
        count = self.unit.of((*frames, *self.run.grid.shape)).count
        return self.scoring.protocol.counts(count) / count

    @property
    def steps(self) -> int:
        """Room for steps: those of the sample with the most."""
        return max(self.fractions(first).size for first in self._lengths)

    @property
    def videos(self) -> list[str] | None:
        """The recording of every sample, the unit of statistics of clips; None for images."""
        if self.run.media != "clip":
            return None
        names = self.run.samples["video"].values if "video" in self.run.samples else self.run.samples["id"].values
        return [str(name) for name in names]

    @property
    def ragged(self) -> bool:
        """Whether clips differ in length, and so in the shares of units that are changed."""
        return len(self._lengths) > 1

    @cached_property
    def _lengths(self) -> list[int]:
        """The position of one scored sample of each length."""
        return [int(self.positions[i]) for i in np.unique(self.frames[self.positions], return_index=True)[1]]

    @property
    def targets(self) -> int:
        """Room for target rows a sample."""
        return max(int(stored.values.shape[1]) for stored in self.stored.values())


def _localised_by(job: Job) -> str:
    if job.objects:
        return "own box" if job.run.media == "image" else "own mask"
    return "mask" if job.masks else ""


def _of_clips(job: Job) -> dict[str, Any]:
    """What fixes scores of clips besides: the unit, and how many frame cells it was taken from."""
    if job.run.media != "clip":
        return {}
    return {**job.unit.record(), "frame_cells": [int(n) for n in job.frames], "frozen_nowhere": "mean"}


def _on_scales_of(job: Job, bound: Bound, scoring: Scoring) -> Scoring:
    """The same scoring on those scales that the target has, objects also followed by match."""
    usable = usable_scales(bound, scoring.protocol.scales)
    kind = bound.objective.bound.rows[0].kind
    return replace(scoring, protocol=replace(scoring.protocol, scales=readings_of(job.source, kind, usable)))


def _chosen(run: Run, settings: Settings) -> NDArray[np.intp]:
    """Positions of the samples that are scored, ascending."""
    ok = np.asarray(run.ok)
    if settings.samples is None or settings.samples >= ok.size:
        return ok
    rng = np.random.default_rng(settings.scoring.seed)
    return np.sort(rng.permutation(ok)[: settings.samples])


# ------------------------------------------------------------------------------------------- curves


def fill(job: Job, progress: Progress | None) -> dict[str, str]:
    """Compute and store the curves of all samples that are not there yet; what failed, with reasons."""
    position, bound = job.probe()
    names = (*job.maps(bound, [position]), RANDOM)
    failed: dict[str, str] = {}
    with _writer(job, names) as writer:
        waiting = writer.pending(job.positions)
        for start in range(0, waiting.size, job.settings.batch_size):
            _score_batch(job, writer, names, waiting[start : start + job.settings.batch_size], failed)
            if progress is not None:
                progress(min(start + job.settings.batch_size, waiting.size), waiting.size)
    return failed


def _score_batch(
    job: Job, writer: ProductWriter, names: Sequence[str], positions: NDArray[np.intp], failed: dict[str, str]
) -> None:
    for group in alike(job.run, positions):
        _score_alike(job, writer, names, group, failed)


def _score_alike(
    job: Job, writer: ProductWriter, names: Sequence[str], positions: Sequence[int], failed: dict[str, str]
) -> None:
    """Score samples that one batch can hold, and write."""
    loaded: dict[int, Sample] = {}
    for position in positions:
        try:
            loaded[position] = job.run.load_sample(position)
        except SampleError as error:
            failed[str(job.run.samples["id"].values[position])] = str(error)
    if not loaded:
        return
    bound = job.bind(loaded)
    if bound is None:
        writer.write(list(loaded), _nothing(job, list(loaded), len(names)))
        return
    check_frames(job.run, job.source, bound.objective.batch, next(iter(loaded)))
    maps = _in_order(job.maps(bound, list(loaded)), names)
    grid = job.run.grid
    scores = score_maps(bound.objective, maps, grid, job.scoring, bound.visible(grid))
    curves = _with_room(scores.curves, job.steps)
    blocks: dict[str, NDArray[Any]] = {
        "curve": _place(curves, bound, len(loaded), job.targets),
        **_shares(job, list(loaded)),
    }
    if job.localises:
        blocks["localisation"] = _place(_localised(job, bound, maps), bound, len(loaded), job.targets)
    writer.write(list(loaded), blocks)


def _in_order(maps: Mapping[str, NDArray[np.float64]], names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """The maps by the job's names; a control that this batch does not have (no object has a mask) is NaN."""
    blank = np.full_like(next(iter(maps.values())), np.nan)
    return {name: maps.get(name, blank) for name in names if name != RANDOM}


def _with_room(values: NDArray[Any], steps: int) -> NDArray[Any]:
    """Values along steps ``(..., step)``, the last repeated up to ``steps``, which leaves areas as they are."""
    return np.concatenate([values, np.repeat(values[..., -1:], steps - values.shape[-1], axis=-1)], axis=-1)


def _shares(job: Job, positions: Sequence[int]) -> dict[str, NDArray[np.float64]]:
    """The block of fractions, where they differ from sample to sample."""
    if not job.ragged:
        return {}
    return {"fraction": np.stack([_with_room(job.fractions(position), job.steps) for position in positions])}


def _nothing(job: Job, positions: Sequence[int], methods: int) -> dict[str, NDArray[Any]]:
    """Blocks of samples without a target: all NaN."""
    protocol, samples = job.scoring.protocol, len(positions)
    curve = (samples, job.targets, methods, len(MODES), len(protocol.baselines), len(protocol.scales), job.steps)
    shapes: dict[str, tuple[int, ...]] = {"curve": curve}
    if job.localises:
        shapes["localisation"] = (samples, job.targets, methods, len(LOCALISATION))
    blank = {name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()}
    return {**blank, **_shares(job, positions)}


def _localised(job: Job, bound: Bound, maps: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float32]:
    """(target row, method, measure); "random" has the expected value of a random order: a uniform map's."""
    frames = bound.objective.frames
    share, area = evidence_share(bound, job.run.grid), job.run.grid.areas.ravel()
    if frames:  # a tubelet of two frames holds twice the pixels
        area = np.outer(np.bincount(frames), area).ravel()
    stack = np.stack([*maps.values(), np.ones_like(share)], axis=1)
    rows = [localisation(values, one, area) for values, one in zip(stack, share, strict=True)]
    return np.asarray(rows, dtype=np.float32)


def _place(rows: NDArray[np.float32], bound: Bound, samples: int, targets: int) -> NDArray[np.float32]:
    """Rows (target row, ...) at their (sample, target) places, NaN elsewhere."""
    block = np.full((samples, targets, *rows.shape[1:]), np.nan, np.float32)
    for row, slot in zip(rows, bound.slots, strict=True):
        block[slot] = row
    return block


def _writer(job: Job, names: Sequence[str]) -> ProductWriter:
    protocol, steps = job.scoring.protocol, np.arange(job.steps)
    axes = {
        "target": np.arange(job.targets),
        "method": list(names),
        "mode": list(MODES),
        "baseline": list(protocol.baselines),
        "scale": list(protocol.scales),
        "step": steps,
        "measure": list(LOCALISATION),
    }
    dims = ("target", "method", "mode", "baseline", "scale", "step")
    variables: dict[str, tuple[Any, ...]] = {"curve": _variable(job, dims, axes)}
    if job.localises:
        variables["localisation"] = _variable(job, ("target", "method", "measure"), axes)
    share = {"long_name": f"share of the {job.unit.kind} that are changed"}
    if job.ragged:
        variables["fraction"] = (("sample", "step"), (len(job.run), job.steps), "float64", share)
    used = {dim for dims, *_ in variables.values() for dim in dims}
    coords = {name: values for name, values in axes.items() if name in used}
    if not job.ragged:
        coords["fraction"] = ("step", job.fractions(int(job.positions[0])), share)
    return job.run.product_writer(
        product_name(CURVES, job.unit), variables, coords, _attrs(job), overwrite=job.settings.overwrite
    )


def _variable(job: Job, dims: Sequence[str], axes: Mapping[str, Any]) -> tuple[Any, ...]:
    return ("sample", *dims), (len(job.run), *(len(axes[dim]) for dim in dims)), "float32"


def _attrs(job: Job) -> dict[str, Any]:
    """All that fixes the scores; equal attributes mean the same job."""
    card, target = job.source.card, job.target
    return {
        **job.scoring.record(),
        "model": card.id,
        "weights_sha256": card.weights_sha256,
        "target": f"{target.kind} ({'what the model answers' if target.label is None else target.label})",
        "grid": list(job.run.grid.shape),
        **_of_clips(job),
        "localisation_of": _localised_by(job),
        "maps": {name: str(stored.attrs.get("product_hash", "")) for name, stored in job.stored.items()},
        "untrained": job.twin.card.id if job.twin else "",
    }
