"""The job behind ``foveate capture``: samples in, a labelled run on disk out.

The store is allocated from the manifest and the first batch, then filled one commit batch at a time. A job
that is killed, or interrupted, continues from its ledger when the same call is made again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.data.arrays import BatchedArrays, empty_block, stored_specs
from foveate.data.layout import ArraySpec, commit_batch
from foveate.data.ledger import Ledger
from foveate.data.manifest import Manifest
from foveate.data.records import FAILED, OK, SampleRecord
from foveate.data.schema import differences, root_attrs
from foveate.data.store import create, finalise, prepare_resume, read_attrs
from foveate.errors import StoreError
from foveate.interfaces import AttentionSource, CapturePlan, Target
from foveate.study.capture_batches import SampleResult
from foveate.study.capture_blocks import BlockCapture
from foveate.study.capture_job import BLOCK, CaptureJob, manifest_of
from foveate.study.estimate import Estimate, check_space
from foveate.study.plan import build_plan

Progress = Callable[[int], None]


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did. ``failed`` maps sample ids to reasons; ``resumed`` samples were there already."""

    path: Path
    samples: int
    captured: int
    resumed: int
    failed: Mapping[str, str]
    seconds: float
    certificate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every sample was captured."""
        return self.captured == self.samples


def run_capture(
    source: AttentionSource,
    inputs: Manifest | Path | str | Iterable[Path | str],
    out: Path | str,
    *,
    plan: CapturePlan | None = None,
    batch_size: int | None = None,
    block: int = BLOCK,
    reference: str = "",
    options: Mapping[str, Any] | None = None,
    target: Target | None = None,
    top: int = 5,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> CaptureReport:
    """Capture every sample of ``inputs`` into the run ``out``, or continue the run that is there.

    ``plan`` defaults to readout rows, entropy and received attention of every site; ``batch_size`` to 8 images or
    one clip. A model that carries what it remembers reads clips of more than ``block`` frames a block at a time
    (0: whole), each safe on disk when it is done. ``reference`` and
    ``options`` record how the source was opened, so that :meth:`foveate.data.run.Run.open_source` can do it
    again. With ``target``, its label and score are stored, too. ``retry_failed`` computes the commit batches
    that hold failed samples once more (the files were repaired). ``progress`` is told of samples done.

    A sample that fails is recorded with its reason. Raises StoreError (a run of another configuration, no
    space), SampleError (nothing could be captured), and what the source raises about itself.
    """
    manifest = manifest_of(inputs, source)
    job = CaptureJob(source, manifest, Path(out), plan or build_plan(source), batch_size, target, top, block)
    config = job.config(options or {})
    notes = job.notes(reference, options or {})
    started = time.monotonic()
    arrays, kept = _resume(job, config, retry_failed) if job.out.exists() else (_start(job, config, notes), [])
    if progress and kept:
        progress(len(kept))
    try:
        _fill(job, arrays, progress)
    finally:
        records = _finish(job, arrays.ledger)
    return _report(job, records, len(kept), time.monotonic() - started)


def estimate_capture(
    source: AttentionSource,
    inputs: Manifest | Path | str | Iterable[Path | str],
    out: Path | str,
    *,
    plan: CapturePlan | None = None,
    batch_size: int | None = None,
    block: int = BLOCK,
) -> Estimate:
    """What :func:`run_capture` would need, from one timed batch; nothing is written."""
    manifest = manifest_of(inputs, source)
    job = CaptureJob(source, manifest, Path(out), plan or build_plan(source), batch_size, None, 5, block)
    probed, seconds = job.probe()
    return Estimate.of(job.out, len(job.manifest), job.specs(), seconds / probed, job.plan)


# ---------------------------------------------------------------------------------- start and resume


def _start(job: CaptureJob, config: Mapping[str, Any], notes: Mapping[str, Any]) -> BatchedArrays:
    """Learn the shapes, check the disk, allocate everything."""
    probed, seconds = job.probe()
    specs = job.specs()
    check_space(Estimate.of(job.out, len(job.manifest), specs, seconds / probed, job.plan))
    batch = commit_batch(specs, len(job.manifest)) if job.block is None else 1
    cells = job.worker.cells
    learned = {
        "media": job.source.media,
        "sites": list(job.worker.frames),
        "arrays": [spec.name for spec in specs],
        "commit_batch": batch,
        "frame_block": job.block,
        "cells": None if cells is None else {"y": cells.y, "x": cells.x},
        "complete": False,
    }
    attrs = root_attrs(config, {**notes, **learned})
    create(job.out, attrs, specs, batch, job.groups(), job.tables({}), frames=job.block)
    return BatchedArrays(job.out, specs, batch, Ledger(job.out), job.block)


def _resume(job: CaptureJob, config: Mapping[str, Any], retry_failed: bool) -> tuple[BatchedArrays, list[int]]:
    """The arrays of the run that is there, if it is of the same configuration, and the positions it has."""
    attrs = read_attrs(job.out)
    different = differences(attrs.get("config"), config)
    if different:
        raise StoreError(
            f"{job.out}: exists already, with another configuration (nothing was changed)\n  "
            + "\n  ".join(different[:8]),
            remedy="write to another path, or remove that run first; the same call as before would continue it",
        )
    ledger = prepare_resume(job.out)
    if retry_failed:
        for number, entry in ledger.entries().items():
            if any(sample["status"] == FAILED for sample in entry["samples"]):
                ledger.forget(number)
    specs = stored_specs(job.out, attrs["arrays"])
    job.worker.sizes = _sizes(specs)
    arrays = BatchedArrays(job.out, specs, int(attrs["commit_batch"]), ledger, job.block)
    return arrays, [i for entry in ledger.entries().values() for i in range(entry["start"], entry["stop"])]


def _sizes(specs: Sequence[ArraySpec]) -> dict[str, dict[str, int]]:
    """Size of every dim of a stored run, by site (or "tracks")."""
    sizes: dict[str, dict[str, int]] = {}
    for spec in specs:
        group = spec.name.rpartition("/")[0].removeprefix("sites/")
        sizes.setdefault(group, {}).update(zip(spec.dims, spec.shape, strict=True))
    return sizes


# --------------------------------------------------------------------------------------- fill, finish


def _fill(job: CaptureJob, arrays: BatchedArrays, progress: Progress | None) -> None:
    """Compute and write every commit batch that the ledger lacks."""
    done = arrays.ledger.entries()
    if arrays.frames is not None:
        _fill_blocks(job, arrays, arrays.frames, done, progress)
        return
    for number, part in enumerate(arrays.batches):
        if number not in done:
            started = time.monotonic()
            blocks = {name: empty_block(spec, part.stop - part.start) for name, spec in arrays.specs.items()}
            records = []
            for position, result in _results(job, part):
                records.append(result.record.to_json())
                for name, array in result.arrays.items():
                    blocks[name][position - part.start] = array
                if progress:
                    progress(1)
            entry = {"samples": records, "certificate": job.worker.certificate}
            arrays.write(number, blocks, {**entry, "seconds": round(time.monotonic() - started, 3)})


def _fill_blocks(
    job: CaptureJob, arrays: BatchedArrays, block: int, done: Collection[int], progress: Progress | None
) -> None:
    """The same for clips that are read a block of frames at a time."""
    capture, written = BlockCapture(job.worker, block), arrays.ledger.blocks()
    for position in range(len(job.manifest)):
        if position not in done:
            capture.write(position, arrays, {number for sample, number in written if sample == position})
            if progress:
                progress(1)


def _results(job: CaptureJob, part: slice) -> Iterator[tuple[int, SampleResult]]:
    """Results of one commit batch in order, one model batch after the other."""
    for start in range(part.start, part.stop, job.batch_size):
        positions = range(start, min(start + job.batch_size, part.stop))
        results = job.results(positions)
        yield from ((i, results[i]) for i in positions)


def _finish(job: CaptureJob, ledger: Ledger) -> dict[int, SampleRecord]:
    """Write the tables from the ledger, so that they say exactly what is safely on disk."""
    entries = ledger.entries().values()
    records = {
        entry["start"] + i: SampleRecord.from_json(data)
        for entry in entries
        for i, data in enumerate(entry["samples"])
    }
    certificate = _worst([entry["certificate"] for entry in entries])
    complete = len(records) == len(job.manifest)
    finalise(job.out, job.tables(records), {"complete": complete, "certificate": certificate})
    return records


def _worst(certificates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Errors of all commit batches as their maximum; other facts of the last one."""
    worst: dict[str, Any] = {}
    for certificate in certificates:
        for name, value in certificate.items():
            both = isinstance(value, float) and isinstance(worst.get(name), float)
            worst[name] = max(value, worst[name]) if both else value
    return worst


def _report(job: CaptureJob, records: Mapping[int, SampleRecord], resumed: int, seconds: float) -> CaptureReport:
    failures = {job.manifest.rows[i].id: r.failure for i, r in sorted(records.items()) if r.status == FAILED}
    attrs = read_attrs(job.out)
    captured = sum(record.status == OK for record in records.values())
    return CaptureReport(
        job.out, len(job.manifest), captured, resumed, failures, seconds, attrs.get("certificate", {})
    )
