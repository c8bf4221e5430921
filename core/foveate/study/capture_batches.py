"""One model batch of a capture: decode, encode, forward under the tap, and one result a sample.

A bad sample never takes its neighbours with it: where a batch fails it is done again one by one, and what
fails alone is recorded with its reason. Errors that are about the model or the plugin end the run, and so
does a row of failures that no sample explains.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from foveate.data.gaps import is_broken
from foveate.data.manifest import Manifest
from foveate.data.records import FAILED, OK, ClipRecord, SampleRecord, judge
from foveate.data.schema import plain
from foveate.errors import CaptureError, FoveateError, SampleError
from foveate.geometry import CellGrid
from foveate.interfaces import AttentionSource, Batch, CapturePlan, Prediction, Sample, Target
from foveate.study.frames import SiteFrame, first_frame
from foveate.study.tracks import TrackFrame, gives_tracks

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

    After the first success ``frames`` (by site), ``cells`` and ``tracks`` hold what every sample shares; a sample
    that does not fit them fails. ``certificate`` gathers the worst errors seen.
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
        self.tracks: TrackFrame | None = None
        self.sizes: Mapping[str, Mapping[str, int]] | None = None
        """Sizes by site and dim of a store that is there: what is learned then must fit it."""
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
            if about_all_samples(error):
                raise
            if len(loaded) == 1:
                self.count(error)
                return {position: failed(error, sample) for position, sample in loaded.items()}
        else:
            self.in_a_row.clear()
            return dict(zip(loaded, captured, strict=True))
        free_memory()
        return {p: result for p, sample in loaded.items() for p, result in self._together({p: sample}).items()}

    def count(self, error: Exception) -> None:
        """End the run where failure after failure is not about the samples (a lost device, a wrong plugin)."""
        if not isinstance(error, SampleError):
            self.in_a_row.append(error)
        if len(self.in_a_row) >= TOLERATED_IN_A_ROW:
            raise self.in_a_row[0]

    def _capture(self, samples: Sequence[Sample]) -> list[SampleResult]:
        from foveate.capture.engine import capture_batch

        batch = self.source.encode(samples)
        captured = capture_batch(self.source, batch, self.plan)
        predictions = self.source.predictions(captured.outputs, batch)
        self.learn(captured, batch, predictions, frames=self._room(samples[0], batch))
        self.remember(captured.certificate)
        records = self._records(samples, batch, captured, predictions)
        arrays = self._arrays(captured)
        return [self._result(i, records[i], captured, arrays, predictions[i]) for i in range(len(samples))]

    @property
    def unseen(self) -> list[str]:
        """Sites of the plan that have not run yet (optional ones: they need a second frame, or a track)."""
        return [part.site for part in self.plan.sites if part.site not in self.frames]

    def learn(
        self,
        captured: Captured,
        batch: Batch,
        predictions: Sequence[Sequence[Prediction]],
        *,
        frames: tuple[int, int] | None,
        by_blocks: bool = False,
    ) -> None:
        """Take what all samples share from the first batch that has it, until the store is there.

        ``frames`` of a clip: those that the model read, and the most that it may read of any.
        """
        first = not self.frames
        if not first and (self.sizes is not None or not self.unseen):
            return
        header = {"samples": len(self.manifest), **({"frames": frames[1]} if frames else {})}
        bounds = self.source.bounds(header)
        for name, site in captured.sites.items():
            if name not in self.frames and (self.sizes is None or name in self.sizes):
                stored = None if self.sizes is None else self.sizes[name]
                self.frames[name] = first_frame(
                    self.source, site, bounds, frames, stored=stored, by_blocks=by_blocks
                )
        if first:
            self.cells = _cells(self.source, batch)
            self.tracks = self._first_tracks(batch, predictions, frames)

    def _room(self, sample: Sample, batch: Batch) -> tuple[int, int] | None:
        """Frames that the model read of the first sample, and the most that it may read of any."""
        if not sample.is_clip:
            return None
        read = int(batch.inputs.shape[1])
        return read, max(read, self.longest) if read == len(sample.pixels) else read

    @cached_property
    def longest(self) -> int:
        """An upper bound of the frames of any clip."""
        return self.manifest.most_frames()

    def _first_tracks(
        self, batch: Batch, predictions: Sequence[Sequence[Prediction]], frames: tuple[int, int] | None
    ) -> TrackFrame | None:
        if self.sizes is not None and "tracks" in self.sizes:
            sizes = self.sizes["tracks"]
            return TrackFrame(sizes["rank"], sizes["frame"], (sizes["y"], sizes["x"]))
        if frames is None or self.sizes is not None or not gives_tracks(self.source, predictions):
            return None
        return TrackFrame.of(batch.geometry[0], self.top, frames[1])

    def remember(self, certificate: Any) -> None:
        """Keep the worst value of every error; the other facts of the last batch."""
        for name, value in plain(certificate.summary()).items():
            before = self.certificate.get(name)
            worse = isinstance(value, float) and isinstance(before, float) and before > value
            self.certificate[name] = before if worse else value

    def _records(
        self,
        samples: Sequence[Sample],
        batch: Batch,
        captured: Captured,
        predictions: Sequence[Sequence[Prediction]],
    ) -> list[SampleRecord]:
        targets = self.targets(captured.outputs, batch)
        return [
            SampleRecord(
                OK,
                notes=self.notes(str(sample.columns.get("notes", "")), captured),
                sha256=sample.sha256,
                geometry=batch.geometry[i],
                predictions=tuple(predictions[i][: self.top]),
                correct=judge(predictions[i], sample.columns.get("label")),
                target_label=targets.get(i, ("", 0.0))[0],
                target_score=targets.get(i, ("", float("nan")))[1],
                clip=self._clip(sample, batch, i) if sample.is_clip else None,
            )
            for i, sample in enumerate(samples)
        ]

    def notes(self, said: str, captured: Captured) -> str:
        """What is to be said of a sample: of its file, and of sites that ran too late to be kept."""
        late = [name for name in captured.sites if name not in self.frames]
        further = f"not kept, since they first ran after the run was laid out: {', '.join(late)}" if late else ""
        return "; ".join(part for part in (said, further) if part)

    def _clip(self, sample: Sample, batch: Batch, i: int) -> ClipRecord:
        index = frames_read(batch)[i]
        return ClipRecord.of(sample.times, len(sample.pixels), index, self.source.frame_cells(batch)[: len(index)])

    def targets(self, outputs: Any, batch: Batch) -> dict[int, tuple[str, float]]:
        """Label and score of the first explained number of each sample, where a target was asked for."""
        if self.target is None:
            return {}
        bound = self.source.bind(outputs, batch, self.target)
        scores = self.source.score(outputs, batch, bound).detach().float().tolist()
        rows = list(zip(bound.rows, scores, strict=True))
        return {row.sample: (row.label, score) for row, score in reversed(rows)}

    def _arrays(self, captured: Captured) -> dict[str, NDArray[Any]]:
        """Everything that is stored of a batch, ``(sample, ...)`` by path."""
        fitted = [self.frames[name].fit(site) for name, site in captured.sites.items() if name in self.frames]
        return {path: array for arrays in fitted for path, array in arrays.items()}

    def _result(
        self,
        i: int,
        record: SampleRecord,
        captured: Captured,
        arrays: Mapping[str, NDArray[Any]],
        predictions: Sequence[Prediction],
    ) -> SampleResult:
        broken = [path for name in captured.sites for path in self.broken(name, captured, i)]
        if broken:
            return failed(SampleError(f"not finite: {', '.join(broken)}"), record=record)
        own = {path: array[i] for path, array in arrays.items()}
        if self.tracks is not None and record.clip is not None:
            own |= self.tracks.padded(self.tracks.arrays(predictions, len(record.clip.frame_index)))
        return SampleResult(record, own)

    def broken(self, name: str, captured: Captured, i: int) -> list[str]:
        """Paths of one site's arrays that are not finite in sample ``i``, gaps excepted."""
        site, frame = captured.sites[name], self.frames.get(name)
        if frame is None:
            return []
        ragged = bool(frame.site.ragged)
        return [
            f"sites/{name}/{variable}"
            for variable, array in site.arrays.items()
            if is_broken(array[i], frame.dims[variable], frame.site.group, comes_and_goes=ragged)
        ]


def frames_read(batch: Batch) -> list[list[int]]:
    """Of each sample of a batch of clips, the frames that the model reads, in order."""
    index = batch.per_sample.get("frame_index")
    if index is None:
        return [list(range(batch.inputs.shape[1]))] * len(batch)
    # A clip that is shorter than others of its batch may be filled up with -1.
    return [[int(i) for i in row if i >= 0] for row in index.tolist()]


def failed(
    error: BaseException, sample: Sample | None = None, *, record: SampleRecord | None = None
) -> SampleResult:
    """The result of a sample that cannot be used, with the reason in words."""
    reason = str(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {error}"
    sha256 = record.sha256 if record else sample.sha256 if sample else ""
    return SampleResult(SampleRecord(FAILED, failure=" ".join(reason.split()), sha256=sha256))


def about_all_samples(error: Exception) -> bool:
    """foveate's errors about usage, models and plugins, and missing packages, concern every sample alike."""
    ours = isinstance(error, FoveateError) and not isinstance(error, (SampleError, CaptureError))
    return ours or isinstance(error, ImportError)


def _cells(source: AttentionSource, batch: Batch) -> CellGrid | None:
    try:
        return source.cells(batch)
    except (FoveateError, NotImplementedError):  # a text tower has no picture
        return None


def free_memory() -> None:
    """Give back what a failed or finished forward holds."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
