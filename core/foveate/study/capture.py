"""The job behind ``foveate capture``: samples in, a labelled run on disk out.

The store is allocated from the manifest and the first batch, then filled one commit batch at a time. A job
that is killed, or interrupted, continues from its ledger when the same call is made again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foveate.data.arrays import BatchedArrays, empty_block, stored_specs
from foveate.data.layout import ArraySpec, batches, commit_batch
from foveate.data.ledger import Ledger
from foveate.data.manifest import Manifest
from foveate.data.records import FAILED, OK, SampleRecord, predictions_table, samples_table
from foveate.data.schema import differences, root_attrs
from foveate.data.store import create, finalise, prepare_resume, read_attrs
from foveate.errors import SampleError, StoreError
from foveate.interfaces import AttentionSource, CapturePlan, Target
from foveate.study.capture_batches import BatchCapture, SampleResult
from foveate.study.estimate import Estimate, check_space
from foveate.study.plan import build_plan

Progress = Callable[[int], None]
NOT_IDENTITY = ("device",)
"""Options of opening a model that do not change what is captured."""


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
    batch_size: int = 8,
    reference: str = "",
    options: Mapping[str, Any] | None = None,
    target: Target | None = None,
    top: int = 5,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> CaptureReport:
    """Capture every sample of ``inputs`` into the run ``out``, or continue the run that is there.

    ``plan`` defaults to readout rows, entropy and received attention of every site. ``reference`` and
    ``options`` record how the source was opened, so that :meth:`foveate.data.run.Run.open_source` can do it
    again. With ``target``, its label and score are stored, too. ``retry_failed`` computes the commit batches
    that hold failed samples once more (the files were repaired). ``progress`` is told of samples done.

    A sample that fails is recorded with its reason. Raises StoreError (a run of another configuration, no
    space), SampleError (nothing could be captured), and what the source raises about itself.
    """
    job = _Job(source, _manifest(inputs), Path(out), plan or build_plan(source), batch_size, target, top)
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
    batch_size: int = 8,
) -> Estimate:
    """What :func:`run_capture` would need, from one timed batch; nothing is written."""
    job = _Job(source, _manifest(inputs), Path(out), plan or build_plan(source), batch_size, None, 5)
    probed, seconds = job.probe()
    return Estimate.of(job.out, len(job.manifest), job.specs(), seconds / probed, job.plan)


class _Job:
    """What stays the same during one capture, and the batch that was probed before the store existed."""

    def __init__(
        self,
        source: AttentionSource,
        manifest: Manifest,
        out: Path,
        plan: CapturePlan,
        batch_size: int,
        target: Target | None,
        top: int,
    ) -> None:
        self.source, self.manifest, self.out, self.plan = source, manifest, out, plan
        self.batch_size, self.target, self.top = max(1, batch_size), target, top
        self.worker = BatchCapture(source, manifest, plan, target=target, top=top)
        self._probed: dict[tuple[int, ...], dict[int, SampleResult]] = {}

    def config(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What makes two captures the same run."""
        card = self.source.card
        return {
            "model": {name: getattr(card, name) for name in ("id", "adapter", "revision")},
            "weights": card.weights_sha256 or _parameters(self.source),
            "options": {k: _content(value) for k, value in _lasting(options).items() if k != "weights"},
            "plan": self.plan,
            "samples": len(self.manifest),
            "manifest": self.manifest.digest,
            "target": self.target,
            "top": self.top,
        }

    def notes(self, reference: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """What a run says of itself besides its configuration."""
        return {
            "model": self.source.card,
            "facts": self.source.facts(),
            "reference": reference,
            "open_options": _lasting(options),
            "plan": self.plan,
            "ignored_files": self.manifest.ignored,
        }

    def probe(self) -> tuple[int, float]:
        """Capture batches until a sample succeeds, so that shapes are known: samples tried, seconds.

        Where all of them fail, raises SampleError listing the reasons, or what no sample explains.
        """
        reasons: dict[str, str] = {}
        for part in batches(len(self.manifest), self.batch_size):
            positions = tuple(range(part.start, part.stop))
            started = time.monotonic()
            results = self.worker.run(positions)
            self._probed[positions] = results
            if any(result.record.status == OK for result in results.values()):
                return len(positions), time.monotonic() - started
            reasons |= {self.manifest.rows[i].id: result.record.failure for i, result in results.items()}
        if self.worker.in_a_row:
            raise self.worker.in_a_row[0]
        raise SampleError(
            f"none of {len(self.manifest)} samples could be captured:\n  "
            + "\n  ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:20])
        )

    def results(self, positions: Sequence[int]) -> dict[int, SampleResult]:
        """Results of one model batch; a batch that was probed is not computed twice."""
        known = self._probed.pop(tuple(positions), None)
        return known if known is not None else self.worker.run(positions)

    def specs(self) -> list[ArraySpec]:
        """Every array of the run, from what the first batch taught."""
        frames = self.worker.frames.values()
        return [spec for frame in frames for spec in frame.specs(len(self.manifest), self.plan.dtype)]

    def tables(self, records: Mapping[int, SampleRecord]) -> dict[str, Any]:
        """The samples and predictions groups."""
        folder = self.out.absolute().parent
        return {
            "samples": samples_table(self.manifest, records, folder),
            "predictions": predictions_table(self.manifest, records, self.top),
        }


def _manifest(inputs: Manifest | Path | str | Iterable[Path | str]) -> Manifest:
    return inputs if isinstance(inputs, Manifest) else Manifest.discover(inputs)


def _lasting(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of opening a model that any machine needs again."""
    return {key: value for key, value in options.items() if value is not None and key not in NOT_IDENTITY}


def _parameters(source: AttentionSource) -> str:
    """SHA-256 of a model's own parameters and buffers, for sources that state no hash of their weights."""
    import torch

    total = hashlib.sha256()
    for name, value in sorted(source.module.state_dict().items()):
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
            total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            total.update(raw.data)
    return f"parameters {total.hexdigest()}"


def _content(value: Any) -> Any:
    """A file among the options (prompts) counts by its content, not by its place."""
    is_file = isinstance(value, (str, Path)) and Path(value).is_file()
    return {"sha256": hashlib.sha256(Path(value).read_bytes()).hexdigest()} if is_file else value


# ---------------------------------------------------------------------------------- start and resume


def _start(job: _Job, config: Mapping[str, Any], notes: Mapping[str, Any]) -> BatchedArrays:
    """Learn the shapes, check the disk, allocate everything."""
    probed, seconds = job.probe()
    specs = job.specs()
    check_space(Estimate.of(job.out, len(job.manifest), specs, seconds / probed, job.plan))
    batch = commit_batch(specs, len(job.manifest))
    cells = job.worker.cells
    learned = {
        "sites": list(job.worker.frames),
        "arrays": [spec.name for spec in specs],
        "commit_batch": batch,
        "cells": None if cells is None else {"y": cells.y, "x": cells.x},
        "complete": False,
    }
    groups = {
        f"sites/{site}": (frame.attrs, frame.coordinates(job.manifest.ids), tuple(frame.token_columns()))
        for site, frame in job.worker.frames.items()
    }
    create(job.out, root_attrs(config, {**notes, **learned}), specs, batch, groups, job.tables({}))
    return BatchedArrays(job.out, specs, batch, Ledger(job.out))


def _resume(job: _Job, config: Mapping[str, Any], retry_failed: bool) -> tuple[BatchedArrays, list[int]]:
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
    arrays = BatchedArrays(job.out, specs, int(attrs["commit_batch"]), ledger)
    return arrays, [i for entry in ledger.entries().values() for i in range(entry["start"], entry["stop"])]


# --------------------------------------------------------------------------------------- fill, finish


def _fill(job: _Job, arrays: BatchedArrays, progress: Progress | None) -> None:
    """Compute and write every commit batch that the ledger lacks."""
    done = arrays.ledger.entries()
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


def _results(job: _Job, part: slice) -> Iterator[tuple[int, SampleResult]]:
    """Results of one commit batch in order, one model batch after the other."""
    for start in range(part.start, part.stop, job.batch_size):
        positions = range(start, min(start + job.batch_size, part.stop))
        results = job.results(positions)
        yield from ((i, results[i]) for i in positions)


def _finish(job: _Job, ledger: Ledger) -> dict[int, SampleRecord]:
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


def _report(job: _Job, records: Mapping[int, SampleRecord], resumed: int, seconds: float) -> CaptureReport:
    failures = {job.manifest.rows[i].id: r.failure for i, r in sorted(records.items()) if r.status == FAILED}
    attrs = read_attrs(job.out)
    captured = sum(record.status == OK for record in records.values())
    return CaptureReport(
        job.out, len(job.manifest), captured, resumed, failures, seconds, attrs.get("certificate", {})
    )
