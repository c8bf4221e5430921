"""A long clip, captured a block of frames at a time by a model that carries what it remembers.

Memory is bounded by the block, and every block is safe on disk when it is done: the commit unit is a sample and
a block of frames. A job that was killed within a clip reads that clip again from its first frame, since only the
model itself can make what it remembers, but what is on disk is not written twice.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.arrays import BatchedArrays
from foveate.data.records import OK, ClipRecord, SampleRecord, judge
from foveate.errors import CaptureError, SampleError, UsageError
from foveate.interfaces import Batch, Prediction
from foveate.study.capture_batches import BatchCapture, about_all_samples, failed, frames_read, free_memory
from foveate.study.token_merge import TokenMerge
from foveate.study.tracks import BOXES, GROUP, drawn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.engine import Captured
    from foveate.data.clips import Clip

PROBED_BLOCKS = 4
"""Blocks of the first clip in which optional sites may show that they run."""


@dataclass(frozen=True, eq=False)
class Block:
    """One block of a clip: its number and arrays ``(1, ...)`` by path, each with the frames of the block."""

    number: int
    arrays: Mapping[str, NDArray[Any]]


@dataclass(eq=False)
class Tape:
    """What is known of a clip as its blocks go by; masks of tracks wait in ``spool`` until ranks are known."""

    clip: Clip
    spool: Path
    merges: dict[str, TokenMerge] = field(default_factory=dict)
    frame_index: list[int] = field(default_factory=list)
    frame_cells: list[int] = field(default_factory=list)
    answers: list[Prediction] = field(default_factory=list)
    """The last block's: by contract they are those of the clip so far."""
    late: dict[str, None] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    geometry: Any = None
    target: tuple[str, float] = ("", float("nan"))


class BlockCapture:
    """Captures clips of a worker's manifest in blocks of ``frames`` frames."""

    def __init__(self, worker: BatchCapture, frames: int) -> None:
        self.worker, self.frames = worker, frames

    def probe(self, position: int) -> int:
        """Capture as many blocks of one clip as teach the shapes; returns the frames that were read."""
        with tempfile.TemporaryDirectory() as spool:
            tape = Tape(self.worker.manifest.open(position), Path(spool))
            for block in self.blocks(tape):
                if not self.worker.unseen or block.number + 1 == PROBED_BLOCKS:
                    break
            return sum(tape.lengths)

    def write(self, position: int, arrays: BatchedArrays, written: set[int]) -> SampleRecord:
        """Capture one clip and write it; blocks in ``written`` are on disk. Returns its record, failed or not.

        Raises only what is not about the sample.
        """
        try:
            with tempfile.TemporaryDirectory() as spool:
                tape = Tape(self.worker.manifest.open(position), Path(spool))
                for block in self.blocks(tape):
                    if block.number not in written:
                        arrays.write_block(position, block.number, block.arrays, {})
                record = self._record(tape)
                tables = {name: table for merge in tape.merges.values() for name, table in merge.tables().items()}
                entry = {"samples": [record.to_json()], "certificate": self.worker.certificate}
                arrays.finish(position, tables, self._track_blocks(tape, record.predictions), entry)
        except Exception as error:
            if about_all_samples(error):
                raise
            self.worker.count(error)
            free_memory()
            record = failed(error).record
            arrays.erase(position)
            arrays.finish(position, {}, (), {"samples": [record.to_json()], "certificate": {}})
        else:
            self.worker.in_a_row.clear()
        return record

    def blocks(self, tape: Tape) -> Iterator[Block]:
        """The blocks of a clip, one after the other, each captured with what the model carries from the last."""
        from foveate.capture.engine import capture_batch

        source, worker = self.worker.source, self.worker
        state: Mapping[str, Any] | None = None
        for number, start in enumerate(range(0, tape.clip.frames, self.frames)):
            sample = tape.clip.read(start, start + self.frames)
            batch = source.encode([sample])
            if state is not None:
                batch = replace(batch, shared={**batch.shared, "state": state})
            captured = capture_batch(source, batch, worker.plan)
            predictions = source.predictions(captured.outputs, batch)
            read = _all_frames(batch, len(sample.pixels), tape.clip)
            room = (len(read), max(worker.longest, len(read)))
            worker.learn(captured, batch, predictions, frames=room, by_blocks=True)
            worker.remember(captured.certificate)
            arrays = self._arrays(tape, captured, len(read))
            self._note(tape, number, batch, captured, predictions[0], [start + i for i in read])
            state = source.carry(captured.outputs)
            yield Block(number, arrays)

    def _arrays(self, tape: Tape, captured: Captured, frames: int) -> dict[str, NDArray[Any]]:
        """What is stored of one block, ``(1, ...)`` by path."""
        found = {}
        for name, site in captured.sites.items():
            frame = self.worker.frames.get(name)
            if frame is None:
                tape.late[name] = None
                continue
            if "frame" not in frame.site.group:
                raise UsageError(
                    f"site {name} has no axis of frames, so it cannot be captured in blocks of frames",
                    remedy="leave it out (--sites), or read clips whole (--block 0, --window 32)",
                )
            broken = self.worker.broken(name, captured, 0)
            if broken:
                raise SampleError(f"not finite: {', '.join(broken)}")
            frame.check(site)
            merge = tape.merges.setdefault(name, TokenMerge(frame))
            axis = 1 + frame.site.group.index("frame")
            for variable, array in merge.place(site).items():
                if array.shape[axis] != frames:
                    raise CaptureError(f"site {name}: {array.shape[axis]} frames of {frames} in a block")
                found[f"sites/{name}/{variable}"] = array
        return found

    def _note(
        self,
        tape: Tape,
        number: int,
        batch: Batch,
        captured: Captured,
        predictions: Sequence[Prediction],
        index: Sequence[int],
    ) -> None:
        """Remember what the clip's record needs; masks go to the spool, so that memory stays bounded."""
        cells = self.worker.source.frame_cells(batch)
        first = max(tape.frame_cells, default=-1) + 1
        tape.frame_index += index
        tape.frame_cells += [first + cell for cell in cells]
        tape.lengths.append(len(index))
        tape.geometry = batch.geometry[0]
        tape.answers = [replace(p, mask=None) for p in predictions]
        if sum(tape.lengths) == tape.clip.frames:
            tape.target = self.worker.targets(captured.outputs, batch).get(0, tape.target)
        if self.worker.tracks is not None:
            canvas = self.worker.tracks.canvas
            masks = {p.track: drawn(p.mask, canvas) for p in predictions if p.mask is not None and p.track}
            saved: dict[str, Any] = {
                f"{name} {track}": a for track, one in masks.items() for name, a in one.items()
            }
            np.savez(tape.spool / f"{number}.npz", **saved)

    def _record(self, tape: Tape) -> SampleRecord:
        clip, worker = tape.clip, self.worker
        notes = list(clip.source.notes)
        if tape.late:
            notes.append(f"not kept, since they first ran after the run was laid out: {', '.join(tape.late)}")
        return SampleRecord(
            OK,
            notes="; ".join(notes),
            sha256=clip.sha256,
            geometry=tape.geometry,
            predictions=tuple(tape.answers[: worker.top]),
            correct=judge(tape.answers, clip.columns.get("label")),
            target_label=tape.target[0],
            target_score=tape.target[1],
            clip=ClipRecord.of(clip.times, clip.frames, tape.frame_index, tape.frame_cells),
        )

    def _track_blocks(
        self, tape: Tape, predictions: Sequence[Prediction]
    ) -> Iterator[tuple[int, dict[str, NDArray[Any]]]]:
        """Masks of the ranked tracks, block by block, ``(1, rank, frame, ...)`` by path."""
        frame = self.worker.tracks
        if frame is None:
            return
        for number, length in enumerate(tape.lengths):
            arrays = frame.empty(length)
            with np.load(tape.spool / f"{number}.npz", allow_pickle=False) as saved:
                for rank, prediction in enumerate(predictions[: frame.ranks]):
                    for path, array in arrays.items():
                        name = path.removeprefix(f"{GROUP}/")
                        key = f"{name} {prediction.track}"
                        if key in saved.files:
                            array[rank] = saved[key]
                        elif prediction.track and name not in BOXES:
                            array[rank] = 0  # a track that is not in this block covers nothing of it
            yield number, {path: array[None] for path, array in arrays.items()}


def _all_frames(batch: Batch, count: int, clip: Clip) -> list[int]:
    """The frames of a block that the model reads: every one, or the blocks would not join. Raises CaptureError."""
    read = frames_read(batch)[0]
    if read != list(range(count)):
        raise CaptureError(
            f"clip {clip.path}: the model reads frames {read[:8]} of a block of {count}",
            remedy="a source that carries its memory must read every frame; read clips whole with --block 0",
        )
    return read
