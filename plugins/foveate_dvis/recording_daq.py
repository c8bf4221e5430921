"""A recorded DVIS-DAQ: the same sites, names, labels and targets as the model that runs here.

Rows, tracks and answers come from the recording instead of a forward; everything else is
:class:`~foveate_dvis.daq_source.DaqSource`. Modules that it does not know (a backbone's attention) are further
sites, under their own path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from foveate.interfaces import Batch, CallKey, CallLabels, ModelCard, OpaqueStep, Sample, Step
from foveate_dvis.daq.config import DaqConfig
from foveate_dvis.daq.outputs import ABSENT, NEW, DaqOutputs, FrameRows, Refined, SegmenterOutputs, Track
from foveate_dvis.daq.state import TrackerState
from foveate_dvis.daq_clips import DaqClips
from foveate_dvis.daq_opening import OpenedDaq
from foveate_dvis.daq_source import DaqSource
from foveate_dvis.module_sites import FoundSite, label
from foveate_dvis.recording import Recording
from foveate_dvis.recording_pictures import write_pictures
from foveate_dvis.recording_play import Player
from foveate_dvis.recording_shapes import recorded_sites
from foveate_dvis.recording_source import check_unchanged, recorded_batch, recorded_facts, same_sites

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_HERE = (
    (
        r"sem_seg_head\.pixel_decoder\.transformer\.encoder\.layers\.(\d+)\.self_attn",
        r"segmenter.model.pixel_level_module.decoder.encoder.layers.\1.self_attn",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_cross_attention_layers\.(\d+)\.multihead_attn",
        r"segmenter.model.transformer_module.decoder.layers.\1.cross_attn",
    ),
    (
        r"sem_seg_head\.predictor\.transformer_self_attention_layers\.(\d+)\.self_attn",
        r"segmenter.model.transformer_module.decoder.layers.\1.self_attn",
    ),
)
"""Published module paths and those of our own model; tracker and refiner are called alike."""


def path_here(path: str) -> str:
    """Where a module of the published code is in :class:`~foveate_dvis.daq.network.DvisDaq`."""
    for theirs, ours in _HERE:
        if re.fullmatch(theirs, path):
            return re.sub(theirs, ours, path)
    return path


class DaqPlayer(Player):
    """The player with what :class:`~foveate_dvis.daq_source.DaqSource` asks of its model."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        super().__init__(recordings, path_here)
        recording = recordings[0]
        labels = recording.meta["labels"]
        told = {**recording.meta["daq"]["config"], "refiner": recording.meta["daq"]["config"].get("refiner")}
        count = int(told["num_classes"])
        # The published demo's metadata may be of another data set than the weights.
        self.config = DaqConfig.from_json({**told, "labels": labels if len(labels) == count else []})
        self.upstream_exact = False


class RecordedDaq(DaqSource):
    """A recording of the published DVIS-DAQ, online or offline."""

    def __init__(self, recordings: Sequence[Recording], card: ModelCard, *, device: str = "cpu") -> None:
        self.recordings, self._player = tuple(recordings), DaqPlayer(recordings).to(device).eval()
        opened = OpenedDaq(cast("Any", self._player), card)
        most = max(len(recording.meta["daq"]["tracks"]) for recording in recordings)
        super().__init__(opened, shortest_edge=0, max_tracks=most)
        self.carries = False
        calls = [self._player.calls(i) for i in range(len(recordings))]
        recorded = {path for site in self._sites for path in site.modules} & {
            path for one in calls for path in one
        }
        whole = tuple(site for site in self._sites if set(site.modules) <= recorded)
        self._missing = tuple(site.id for site in self._sites if site not in whole and not site.optional)
        self._sites = whole
        known = {path for site in self._sites for path in site.modules}
        self._found: list[dict[str, FoundSite]] = [
            recorded_sites(recording, {path: made for path, made in one.items() if path not in known})
            for recording, one in zip(recordings, calls, strict=True)
        ]
        further = same_sites(recordings, [[one.site for one in found.values()] for found in self._found])
        self._sites = (*self._sites, *further)
        self._outputs: dict[int, DaqOutputs] = {}

    def write_samples(self, folder: Path) -> list[Path]:
        """The recorded pictures as files; gives what to capture."""
        return [write_pictures(recording, folder) for recording in self.recordings]

    def facts(self) -> Mapping[str, Any]:
        """What the model was, and what the recording says of itself."""
        told = {k: v for k, v in super().facts().items() if k not in ("parameters", "backbone", "image")}
        return {**told, **recorded_facts(self.recordings)}

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """The recorded clip, as numbers from 0 to 1. Raises SampleError for any other."""
        return recorded_batch(self.recordings, samples, device=str(self._player.anchor.device))

    def forward(self, batch: Batch, *, grad: bool = False) -> DaqClips:
        """Play the recording. Raises UsageError for gradients and for changed pictures."""
        number = check_unchanged(self.recordings, batch, grad=grad)
        self._player(number)
        if number not in self._outputs:
            self._outputs = {number: recorded_outputs(self.recordings[number])}
        config = self.config
        return DaqClips(
            (self._outputs[number],), batch.ids, (False,), config.num_queries, config.tracker.slots, config.window
        )

    def label(self, call: CallKey, batch: Batch, outputs: DaqClips) -> CallLabels:
        """As of the model that runs here; further modules as they were recorded."""
        found = self._found[batch.shared["recording"]].get(call.site)
        return super().label(call, batch, outputs) if found is None else label(found, call)

    def flow(self, batch: Batch, outputs: DaqClips) -> list[Step]:
        """As of the model that runs here; where the recording lacks a site, nothing can be followed through it."""
        if self._missing:
            return [OpaqueStep(self.stream(batch), f"sites that were not recorded: {', '.join(self._missing)}")]
        return super().flow(batch, outputs)


def recorded_outputs(recording: Recording) -> DaqOutputs:
    """The outputs of the recorded forward, in the words of our own model."""
    told = recording.meta["daq"]
    tracks = tuple(Track(t["id"], t["start"], tuple(t["appearance"]), t["dead"]) for t in told["tracks"])
    rows = tuple(_rows(recording, frame) for frame in range(len(told["frames"])))
    offline = told["config"].get("refiner") is not None
    ids = tuple(i for i in told["instances"] if i >= 0)
    logits, masks = _answer(recording, "online" if offline else "final", rows, len(ids))
    frame_logits, alive = _frame_by_frame(rows, ids)
    return DaqOutputs(
        first_frame=0,
        rows=rows,
        tracks=tracks,
        ids=ids,
        pred_logits=logits[: len(ids)],
        pred_masks=masks[: len(ids)],
        frame_logits=frame_logits,
        alive=alive,
        segmenter=_segmenter(recording),
        state=TrackerState(),
        refined=_refined(recording) if offline else None,
    )


def _tensor(recording: Recording, name: str) -> Tensor:
    return torch.from_numpy(recording[name].astype(np.float32))


def _rows(recording: Recording, number: int) -> FrameRows:
    frame = recording.meta["daq"]["frames"][number]
    carried, new = len(frame["ids"]), frame["rows"] - len(frame["ids"])
    return FrameRows(
        frame=number,
        ids=(*frame["ids"], *(NEW,) * new),
        anchors=(*(-1,) * carried, *range(new)),
        valid=tuple(frame["valid"]),
        births=tuple((row, track) for row, track in frame["births"]),
        deaths=tuple(frame["deaths"]),
        class_logits=_tensor(recording, f"tracker/logits::{number}"),
        slot_scores=_tensor(recording, f"tracker/slot_scores::{number}"),
    )


def _answer(recording: Recording, kind: str, rows: tuple[FrameRows, ...], count: int) -> tuple[Tensor, Tensor]:
    """Class logits (track, class + 1) and mask logits (track, frame, y/4, x/4); none where there is no track."""
    if not count:
        height, width = recording.padded
        logits = rows[0].class_logits[:0]
        return logits, logits.new_zeros(0, len(rows), height // 4, width // 4)
    return _tensor(recording, f"{kind}/logits"), _tensor(recording, f"{kind}/masks")


def _frame_by_frame(rows: tuple[FrameRows, ...], ids: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """What each track's row said in every frame, (track, frame, class + 1), and where it lived."""
    logits = rows[0].class_logits.new_full((len(ids), len(rows), rows[0].class_logits.shape[-1]), ABSENT)
    logits[..., -1] = 1.0
    alive = torch.zeros(len(ids), len(rows), dtype=torch.bool)
    for number, frame in enumerate(rows):
        for row, track in enumerate(frame.born):
            if track in ids and track not in frame.deaths:
                at = ids.index(track)
                logits[at, number], alive[at, number] = frame.class_logits[row], True
    return logits, alive


def _segmenter(recording: Recording) -> SegmenterOutputs:
    """Class logits and embeddings of the segmenter; masks and features are not recorded (empty)."""
    numbers = [n for n in range(len(recording.frames)) if f"segmenter/logits::{n}" in recording]
    logits = torch.cat([_tensor(recording, f"segmenter/logits::{n}") for n in numbers])
    embeds = torch.cat([_tensor(recording, f"segmenter/embeds::{n}") for n in numbers])
    nothing = logits.new_zeros(*logits.shape[:2], 0, 0)
    return SegmenterOutputs(logits, nothing, embeds, logits.new_zeros(len(logits), embeds.shape[-1], 0, 0))


def _refined(recording: Recording) -> Refined:
    """The refiner's answer. Where the published code answers nothing, although it ran, there is none."""
    told = recording.meta["daq"]
    if not told["answered"]:
        return _nothing(recording)
    frames = len(told["frames"])
    chains = {int(i): chain for i, chain in told["chains"].items()}
    linked = tuple(track < 0 for track in told["instances"])
    # A linked instance has no track: it is named by the query of the first frame at which its chain begins.
    ids = tuple(chains[i][0] if made else told["instances"][i] for i, made in enumerate(linked))
    table = torch.full((frames, told["config"]["num_queries"]), -1, dtype=torch.int64)
    for i, chain in chains.items():
        table[:, ids[i]] = torch.tensor(chain)
    embeds = _tensor(recording, "refiner/embeds")
    pooled = [call for call in recording.calls if call.form == "pool"]
    importance = (
        torch.from_numpy(recording.weights(pooled[-1])[:, 0, 0].copy())
        if pooled
        else embeds.new_full((len(ids), frames), torch.nan)
    )
    return Refined(
        ids=ids,
        linked=linked,
        logits=_tensor(recording, "final/logits"),
        masks=_tensor(recording, "final/masks"),
        mask_embeds=embeds.new_zeros(len(ids), frames, 0),
        embeds=embeds,
        importance=importance,
        padding=torch.from_numpy(recording["refiner/padding"]),
        unrefined_logits=_tensor(recording, "online/logits"),
        chains=table if chains else None,
    )


def _nothing(recording: Recording) -> Refined:
    logits, masks = _answer(recording, "final", (_rows(recording, 0),), 0)
    frames = len(recording.meta["daq"]["frames"])
    empty = logits.new_zeros(0, frames, 0)
    masks = masks.new_zeros(0, frames, *masks.shape[2:])
    return Refined((), (), logits, masks, empty, empty, empty[..., 0], empty[..., 0].bool(), logits)
