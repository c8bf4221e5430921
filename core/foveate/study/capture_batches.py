"""One model batch of a capture: decode, encode, forward under the tap, and one result a sample.

A bad sample never takes its neighbours with it: where a batch fails it is done again one by one, and what
fails alone is recorded with its reason. Errors that are about the model or the plugin end the run, and so
does a row of failures that no sample explains.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.labels import VARIABLES
from foveate.data.manifest import Manifest
from foveate.data.records import FAILED, OK, SampleRecord, judge
from foveate.data.schema import plain
from foveate.errors import CaptureError, FoveateError, SampleError
from foveate.geometry import CellGrid
from foveate.interfaces import AttentionSource, Batch, CapturePlan, Sample, Target
from foveate.study.frames import SiteFrame, first_frame

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.engine import Captured

TOLERATED_IN_A_ROW = 8
"""So many unexplained failures one after the other, and the run stops instead of failing every sample."""


@dataclass(frozen=True, eq=False)
class SampleResult:
    """What became of one sample: its record and, where it succeeded, its arrays by path, without ``sample``."""

    record: SampleRecord
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


class BatchCapture:
    """Captures batches of a manifest's samples with one source and plan.

    After the first success ``frames`` (by site) and ``cells`` hold what every sample shares; a sample that
    does not fit them fails. ``certificate`` gathers the worst errors seen.
    """

    def __init__(
        self,
        source: AttentionSource,
        manifest: Manifest,
        plan: CapturePlan,
        *,
        target: Target | None = None,
        top: int = 5,
    ) -> None:
        self.source, self.manifest, self.plan, self.target, self.top = source, manifest, plan, target, top
        self.frames: dict[str, SiteFrame] = {}
        self.cells: CellGrid | None = None
        self.certificate: dict[str, Any] = {}
        self.in_a_row: list[Exception] = []
        """Failures since the last success for which no sample was to blame by itself."""

    def run(self, positions: Sequence[int]) -> dict[int, SampleResult]:
        """Results of the samples at ``positions``. Raises only what is not about a sample."""
        results: dict[int, SampleResult] = {}
        loaded: dict[int, Sample] = {}
        for position in positions:
            try:
                loaded[position] = self.manifest.load(position)
            except SampleError as error:
                results[position] = failed(error)
        return results | self._together(loaded)

    def _together(self, loaded: Mapping[int, Sample]) -> dict[int, SampleResult]:
        """Results of samples in one forward or, where that fails, one by one."""
        if not loaded:
            return {}
        try:
            captured = self._capture(list(loaded.values()))
        except Exception as error:
            if _about_all_samples(error):
                raise
            if len(loaded) == 1:
                self._count(error)
                return {position: failed(error, sample) for position, sample in loaded.items()}
        else:
            self.in_a_row.clear()
            return dict(zip(loaded, captured, strict=True))
        _free_memory()
        return {p: result for p, sample in loaded.items() for p, result in self._together({p: sample}).items()}

    def _count(self, error: Exception) -> None:
        """End the run where failure after failure is not about the samples (a lost device, a wrong plugin)."""
        if not isinstance(error, SampleError):
            self.in_a_row.append(error)
        if len(self.in_a_row) >= TOLERATED_IN_A_ROW:
            raise self.in_a_row[0]

    def _capture(self, samples: Sequence[Sample]) -> list[SampleResult]:
        from foveate.capture.engine import capture_batch

        batch = self.source.encode(samples)
        captured = capture_batch(self.source, batch, self.plan)
        self._learn(captured, batch)
        self._remember(captured.certificate)
        records = self._records(samples, batch, captured.outputs)
        arrays = self._arrays(captured)
        return [self._result(i, records[i], arrays) for i in range(len(samples))]

    def _learn(self, captured: Captured, batch: Batch) -> None:
        """Take what all samples share from the first batch."""
        if not self.frames:
            bounds = self.source.bounds({"samples": len(self.manifest)})
            self.frames = {name: first_frame(self.source, site, bounds) for name, site in captured.sites.items()}
            self.cells = _cells(self.source, batch)

    def _remember(self, certificate: Any) -> None:
        """Keep the worst value of every error; the other facts of the last batch."""
        for name, value in plain(certificate.summary()).items():
            before = self.certificate.get(name)
            worse = isinstance(value, float) and isinstance(before, float) and before > value
            self.certificate[name] = before if worse else value

    def _records(self, samples: Sequence[Sample], batch: Batch, outputs: Any) -> list[SampleRecord]:
        predictions = self.source.predictions(outputs, batch)
        targets = self._targets(outputs, batch)
        return [
            SampleRecord(
                OK,
                notes=str(sample.columns.get("notes", "")),
                sha256=sample.sha256,
                geometry=batch.geometry[i],
                predictions=tuple(predictions[i][: self.top]),
                correct=judge(predictions[i], sample.columns.get("label")),
                target_label=targets.get(i, ("", 0.0))[0],
                target_score=targets.get(i, ("", float("nan")))[1],
            )
            for i, sample in enumerate(samples)
        ]

    def _targets(self, outputs: Any, batch: Batch) -> dict[int, tuple[str, float]]:
        """Label and score of the first explained number of each sample, where a target was asked for."""
        if self.target is None:
            return {}
        bound = self.source.bind(outputs, batch, self.target)
        scores = self.source.score(outputs, batch, bound).detach().float().tolist()
        rows = list(zip(bound.rows, scores, strict=True))
        return {row.sample: (row.label, score) for row, score in reversed(rows)}

    def _arrays(self, captured: Captured) -> dict[str, NDArray[Any]]:
        """Everything that is stored of a batch, ``(sample, ...)`` by path."""
        fitted = [self.frames[name].fit(site) for name, site in captured.sites.items()]
        return {path: array for arrays in fitted for path, array in arrays.items()}

    def _result(self, i: int, record: SampleRecord, arrays: Mapping[str, NDArray[Any]]) -> SampleResult:
        own = {path: array[i] for path, array in arrays.items()}
        broken = [path for path, array in own.items() if _not_finite(path, array)]
        if broken:
            return failed(SampleError(f"not finite: {', '.join(broken)}"), record=record)
        return SampleResult(record, own)


def failed(
    error: BaseException, sample: Sample | None = None, *, record: SampleRecord | None = None
) -> SampleResult:
    """The result of a sample that cannot be used, with the reason in words."""
    reason = str(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {error}"
    sha256 = record.sha256 if record else sample.sha256 if sample else ""
    return SampleResult(SampleRecord(FAILED, failure=" ".join(reason.split()), sha256=sha256))


def _about_all_samples(error: Exception) -> bool:
    """foveate's errors about usage, models and plugins, and missing packages, concern every sample alike."""
    ours = isinstance(error, FoveateError) and not isinstance(error, (SampleError, CaptureError))
    return ours or isinstance(error, ImportError)


def _not_finite(path: str, array: NDArray[Any]) -> bool:
    """Tokens without a place have NaN for it; attention never has."""
    return path.rpartition("/")[2] in VARIABLES and not bool(np.isfinite(array).all())


def _cells(source: AttentionSource, batch: Batch) -> CellGrid | None:
    try:
        return source.cells(batch)
    except (FoveateError, NotImplementedError):  # a text tower has no picture
        return None


def _free_memory() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
