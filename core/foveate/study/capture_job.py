"""What stays the same during one capture: source, samples, plan, identity, and the shapes that the first teach."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from foveate.data.labels import Coordinate
from foveate.data.layout import ArraySpec, batches
from foveate.data.manifest import Manifest
from foveate.data.records import OK, SampleRecord, predictions_table, samples_table
from foveate.data.store import read_attrs
from foveate.errors import SampleError, UsageError
from foveate.interfaces import AttentionSource, CapturePlan, Target
from foveate.study.capture_batches import BatchCapture, SampleResult, about_all_samples, failed
from foveate.study.capture_blocks import BlockCapture
from foveate.study.frames import SiteFrame
from foveate.study.tracks import GROUP

BLOCK = 64
"""Frames of a clip that a model which carries its memory reads at a time."""
BATCH_SIZE = {"image": 8, "clip": 1}
"""Samples of a forward pass."""
PROBED_BATCHES = 4
"""Batches in which optional sites may show that they run; their shapes are not known before."""
NOT_IDENTITY = ("device",)
"""Options of opening a model that do not change what is captured."""


class CaptureJob:
    """What stays the same during one capture, and the batch that was probed before the store existed."""

    def __init__(
        self,
        source: AttentionSource,
        manifest: Manifest,
        out: Path,
        plan: CapturePlan,
        batch_size: int | None,
        target: Target | None,
        top: int,
        block: int = BLOCK,
    ) -> None:
        self.source, self.manifest, self.out, self.plan = source, manifest, out, plan
        self.batch_size = max(1, batch_size if batch_size is not None else BATCH_SIZE[source.media])
        self.target, self.top = target, top
        self.worker = BatchCapture(source, manifest, plan, target=target, top=top)
        self.block = self._frame_block(block)
        """Frames of a commit, where long clips are read a block at a time."""
        self._probed: dict[tuple[int, ...], dict[int, SampleResult]] = {}

    def _frame_block(self, block: int) -> int | None:
        """Those of a run that is there, or ``block`` where the model carries its memory and a clip is longer."""
        if not self.source.carries or self.source.media != "clip":
            return None
        if self.out.exists():
            stored = read_attrs(self.out).get("frame_block")
            return None if stored is None else int(stored)
        # A model may read its own number of frames at a time: blocks of that many answer as the whole clip does.
        window = int(self.source.facts().get("window", 1))
        wanted = max(block // window, 1) * window if block > 0 else 0
        return wanted if 0 < wanted < self.worker.longest else None

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

    def probe(self) -> tuple[float, float]:
        """Capture until a sample succeeds, so that shapes are known: samples tried (or parts of one), seconds.

        Where all of them fail, raises SampleError listing the reasons, or what no sample explains.
        """
        return self._probe_batches() if self.block is None else self._probe_blocks(self.block)

    def _probe_batches(self) -> tuple[float, float]:
        reasons: dict[str, str] = {}
        tried, seconds, succeeded = 0, 0.0, False
        for number, part in enumerate(batches(len(self.manifest), self.batch_size)):
            positions = tuple(range(part.start, part.stop))
            started = time.monotonic()
            results = self.worker.run(positions)
            self._probed[positions] = results
            tried, seconds = len(positions), time.monotonic() - started
            succeeded |= any(result.record.status == OK for result in results.values())
            if succeeded and (not self.worker.unseen or number + 1 >= PROBED_BATCHES):
                break
            reasons |= {self.manifest.rows[i].id: result.record.failure for i, result in results.items()}
        return (tried, seconds) if succeeded else self._nothing(reasons)

    def _probe_blocks(self, block: int) -> tuple[float, float]:
        reasons: dict[str, str] = {}
        for position, row in enumerate(self.manifest.rows):
            started = time.monotonic()
            try:
                read = BlockCapture(self.worker, block).probe(position)
            except Exception as error:
                if about_all_samples(error):
                    raise
                self.worker.count(error)
                reasons[row.id] = failed(error).record.failure
            else:
                return read / self.worker.longest, time.monotonic() - started
        return self._nothing(reasons)

    def _nothing(self, reasons: Mapping[str, str]) -> NoReturn:
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
        frames, count = self.worker.frames.values(), len(self.manifest)
        tracks = self.worker.tracks.specs(count) if self.worker.tracks is not None else []
        return [spec for frame in frames for spec in frame.specs(count, self.plan.dtype)] + tracks

    def groups(self) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Coordinate], Sequence[str]]]:
        """Attributes and coordinates of every group that holds arrays."""
        ids, tracks = self.manifest.ids, self.worker.tracks
        groups: dict[str, tuple[Mapping[str, Any], Mapping[str, Coordinate], Sequence[str]]] = {
            f"sites/{site}": (self._told(frame), frame.coordinates(ids), tuple(frame.token_columns()))
            for site, frame in self.worker.frames.items()
        }
        return groups if tracks is None else {**groups, GROUP: (tracks.attrs, tracks.coordinates(ids), ())}

    def _told(self, frame: SiteFrame) -> dict[str, Any]:
        """A site's attributes. A row that depends on the answer is, block by block, that of the answer so far."""
        weighted = self.block is not None and frame.query_index == (-1,)
        rule = f"{frame.rule}: in each block of {self.block} frames, by the answer so far"
        return {**frame.attrs, **({"rows": rule} if weighted else {})}

    def tables(self, records: Mapping[int, SampleRecord]) -> dict[str, Any]:
        """The samples and predictions groups."""
        folder = self.out.absolute().parent
        return {
            "samples": samples_table(self.manifest, records, folder),
            "predictions": predictions_table(self.manifest, records, self.top),
        }


def manifest_of(inputs: Manifest | Path | str | Iterable[Path | str], source: AttentionSource) -> Manifest:
    """The samples. Raises UsageError where they are images and the model takes clips, or the reverse."""
    manifest = inputs if isinstance(inputs, Manifest) else Manifest.discover(inputs, source.media)
    if manifest.media != source.media and len(manifest):
        raise UsageError(
            f"{source.card.id} takes {source.media}s, but the manifest holds {manifest.media}s",
            remedy=f"Manifest.discover(inputs, {source.media!r})",
        )
    return manifest


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
