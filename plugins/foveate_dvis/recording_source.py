"""A recording of a model that runs elsewhere, as an attention source: for DVIS-DAQ its own, else this general one.

It answers what was recorded and nothing else: measuring, plotting and following the recorded attention work as on
a live model; gradients and changed pictures need the model itself, and are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from foveate.errors import SampleError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import (
    AttentionSource,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
)
from foveate_dvis.module_sites import FoundSite, finest, label
from foveate_dvis.recording import Recording
from foveate_dvis.recording_pictures import geometry_of, write_pictures
from foveate_dvis.recording_play import Player
from foveate_dvis.recording_shapes import recorded_sites

if TYPE_CHECKING:
    from torch import Tensor, nn


class RecordingSource(AttentionSource):
    """Any recording. ``open`` gives :class:`~foveate_dvis.recording_daq.RecordedDaq` for those of DVIS-DAQ."""

    def __init__(self, recording: Recording, card: ModelCard, *, device: str = "cpu") -> None:
        self.recording, self.card = recording, card
        self.media: Literal["image", "clip"] = "image" if recording.meta["media"] == "image" else "clip"
        self._player = Player(recording).to(device).eval()
        self._found: dict[str, FoundSite] = recorded_sites(recording, self._player.calls)
        self._sites = tuple(one.site for one in self._found.values())

    @classmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> AttentionSource:
        """Open the file that ``weights`` or the row's id names. Raises ModelError, UsageError."""
        if options:
            raise UsageError(f"a recording takes no options, got {sorted(options)}")
        recording = Recording(Path(str(weights or row.id)))
        card = recorded_card(recording, row)
        if "daq" not in recording.meta:
            return cls(recording, card, device=device)
        from foveate_dvis.recording_daq import RecordedDaq

        return RecordedDaq(recording, card, device=device)

    @property
    def module(self) -> nn.Module:
        """The :class:`~foveate_dvis.recording_play.Player`."""
        return self._player

    @property
    def sites(self) -> tuple[Site, ...]:
        """One for every group of recorded modules that repeat."""
        return self._sites

    def write_samples(self, folder: Path) -> Path:
        """The recorded pictures as files; gives what to capture."""
        return write_pictures(self.recording, folder)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """The recorded pictures, as numbers from 0 to 1. Raises SampleError for any other."""
        return recorded_batch(self.recording, samples, device=str(self._player.anchor.device))

    def forward(self, batch: Batch, *, grad: bool = False) -> None:
        """Play the recording. Raises UsageError for gradients and for changed pictures."""
        check_unchanged(self.recording, batch, grad=grad)
        self._player()

    def predictions(self, outputs: None, batch: Batch) -> list[list[Prediction]]:
        """None: what a model of an unknown kind answered is not recorded."""
        return [[] for _ in batch.ids]

    def bind(self, outputs: None, batch: Batch, target: Target) -> BoundTarget:
        """Raises UsageError."""
        raise UsageError(f"{self.card.id}: answers of this model were not recorded", remedy=_LIVE)

    def score(self, outputs: None, batch: Batch, bound: BoundTarget) -> Tensor:
        """Raises UsageError."""
        raise UsageError(f"{self.card.id}: answers of this model were not recorded", remedy=_LIVE)

    def label(self, call: CallKey, batch: Batch, outputs: None) -> CallLabels:
        """See :mod:`foveate_dvis.module_sites`."""
        return label(self._found[call.site], call)

    def readout(self, batch: Batch, outputs: None, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Unknown."""
        return {}

    def flow(self, batch: Batch, outputs: None) -> list[Step]:
        """Unknown: a recording of an unknown model does not tell how its modules follow one another."""
        return []

    def cells(self, batch: Batch) -> CellGrid:
        """The finest map that is read."""
        height, width = self.recording.padded
        return CellGrid.regular(*finest(self._found, (height, width)), height=float(height), width=float(width))

    def facts(self) -> Mapping[str, Any]:
        """What the recording says of itself."""
        return recorded_facts(self.recording)


_LIVE = "open the model itself where it runs (source detectron2), or record one that foveate knows by name"


def recorded_card(recording: Recording, row: Any) -> ModelCard:
    """Which model was recorded, where, and how exactly."""
    meta, worst = recording.meta, recording.worst_error
    notes = [
        f"a recording: {len(recording.calls)} attention calls of {meta['model']}, taken with "
        f"Python {meta['versions'].get('python')} and torch {meta['versions'].get('torch')}",
        "attention times values against the modules' own outputs when it was recorded: "
        + ("not checked" if worst is None else f"at most {worst:.1e} apart"),
    ]
    if meta["silent"]:
        notes.append(f"modules that look like attention and were not recorded: {', '.join(meta['silent'])}")
    return ModelCard(
        id=f"recording:{recording.path.stem}",
        source=recording.path.name,
        adapter="foveate_dvis.recording_source:RecordingSource",
        revision=recording.sha256,
        weights_sha256=str(meta["weights_sha256"]),
        licence=getattr(row, "licence", "unverified") or "unverified",
        family=row.family.id,
        versions={str(name): str(value) for name, value in meta["versions"].items()},
        notes=tuple(notes),
    )


def recorded_facts(recording: Recording) -> dict[str, Any]:
    """What any recording says of itself."""
    return {
        "recorded": recording.meta["model"],
        "image": list(recording.padded),
        "frames": len(recording.frames),
        "calls": len(recording.calls),
        "error": recording.worst_error,
    }


def recorded_batch(recording: Recording, samples: Sequence[Sample], *, device: str) -> Batch:
    """The one sample of a recording. ``inputs`` are its pictures from 0 to 1, padded as the model did."""
    if len(samples) != 1:
        raise SampleError(f"{recording.path.name} holds one sample, got {len(samples)}", remedy="batch size 1")
    (sample,) = samples
    geometry = geometry_of(recording, sample)
    inputs = recorded_inputs(recording).to(device)
    clip = sample.is_clip
    index = {"frame_index": torch.arange(len(recording.frames))[None]} if clip else {}
    return Batch(inputs[None] if clip else inputs, (geometry,), (sample.id,), per_sample=index)


def recorded_inputs(recording: Recording) -> Tensor:
    """Recorded pictures (frame, channel, y, x) from 0 to 1, zero in the padding at the bottom and the right."""
    pictures = torch.from_numpy(recording.frames).permute(0, 3, 1, 2).float() / 255
    height, width = recording.padded
    below, right = height - pictures.shape[-2], width - pictures.shape[-1]
    return torch.nn.functional.pad(pictures, (0, right, 0, below))


def check_unchanged(recording: Recording, batch: Batch, *, grad: bool) -> None:
    """Raises UsageError where something is asked that only the model can answer."""
    if grad:
        raise UsageError("a recording has no gradients", remedy=_LIVE)
    given = batch.inputs[0] if batch.inputs.dim() == 5 else batch.inputs
    expected = recorded_inputs(recording).to(given.device)
    if len(batch) != 1 or given.shape != expected.shape or not torch.equal(given, expected):
        raise UsageError("a recording cannot answer about pictures that were changed", remedy=_LIVE)
