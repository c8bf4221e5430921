"""A recording of a model that runs elsewhere, as an attention source: for DVIS-DAQ its own, else this general one.

It answers what was recorded and nothing else: measuring, plotting and following the recorded attention work as on
a live model; gradients and changed pictures need the model itself, and are refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from foveate.capture import editing
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

    from foveate.geometry import Geometry


class RecordingSource(AttentionSource):
    """Any recording. ``open`` gives :class:`~foveate_dvis.recording_daq.RecordedDaq` for those of DVIS-DAQ."""

    def __init__(self, recordings: Sequence[Recording], card: ModelCard, *, device: str = "cpu") -> None:
        self.recordings, self.card = tuple(recordings), card
        self.media: Literal["image", "clip"] = "image" if recordings[0].meta["media"] == "image" else "clip"
        self._player = Player(recordings).to(device).eval()
        self._found: list[dict[str, FoundSite]] = [
            recorded_sites(recording, self._player.calls(i)) for i, recording in enumerate(recordings)
        ]
        self._sites = same_sites(recordings, [[one.site for one in found.values()] for found in self._found])

    @classmethod
    def open(  # type: ignore[override]  # the option is named, so that a wrong one is refused
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        more: Sequence[str] = (),
    ) -> AttentionSource:
        """Open the file that ``weights`` or the row's id names, and ``more`` of the same model.

        Raises ModelError for what is no recording, UsageError where two are of different models.
        """
        recordings = [Recording(Path(str(path))) for path in (weights or row.id, *more)]
        check_one_model(recordings)
        card = recorded_card(recordings, row)
        if "daq" not in recordings[0].meta:
            return cls(recordings, card, device=device)
        from foveate_dvis.recording_daq import RecordedDaq

        return RecordedDaq(recordings, card, device=device)

    @property
    def module(self) -> nn.Module:
        """The :class:`~foveate_dvis.recording_play.Player`."""
        return self._player

    @property
    def sites(self) -> tuple[Site, ...]:
        """One for every group of recorded modules that repeat."""
        return self._sites

    def write_samples(self, folder: Path) -> list[Path]:
        """The recorded pictures as files; gives what to capture."""
        return [write_pictures(recording, folder) for recording in self.recordings]

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """The recorded pictures, as numbers from 0 to 1. Raises SampleError for any other."""
        return recorded_batch(self.recordings, samples, device=str(self._player.anchor.device))

    def forward(self, batch: Batch, *, grad: bool = False) -> None:
        """Play the recording. Raises UsageError for gradients and for changed pictures."""
        self._player(check_unchanged(self.recordings, batch, grad=grad))

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
        return label(self._found[batch.shared["recording"]][call.site], call)

    def readout(self, batch: Batch, outputs: None, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Unknown."""
        return {}

    def flow(self, batch: Batch, outputs: None) -> list[Step]:
        """Unknown: a recording of an unknown model does not tell how its modules follow one another."""
        return []

    def cells(self, batch: Batch) -> CellGrid:
        """The finest map that is read."""
        number = batch.shared["recording"]
        height, width = self.recordings[number].padded
        rows, columns = finest(self._found[number], (height, width))
        return CellGrid.regular(rows, columns, height=float(height), width=float(width))

    def facts(self) -> Mapping[str, Any]:
        """What the recording says of itself."""
        return recorded_facts(self.recordings)


_LIVE = "open the model itself where it runs (source detectron2), or record one that foveate knows by name"


_APART = "import each by itself"


def check_one_model(recordings: Sequence[Recording]) -> None:
    """Raises UsageError where recordings are of different models, weights or rules, or one is there twice."""
    for name in ("model", "weights_sha256", "media", "labels"):
        if len({str(recording.meta[name]) for recording in recordings}) > 1:
            raise UsageError(
                f"recordings differ in {name}: they are of different models", remedy="import each by itself"
            )
    if len({str(recording.meta.get("daq", {}).get("config")) for recording in recordings}) > 1:
        raise UsageError("recordings were made with different thresholds or sizes", remedy=_APART)
    stems = [recording.path.stem for recording in recordings]
    twice = sorted({stem for stem in stems if stems.count(stem) > 1})
    if twice:
        raise UsageError(
            f"recordings of the same name: {', '.join(twice)}", remedy="file names become sample names"
        )


def same_sites(recordings: Sequence[Recording], sites: Sequence[Sequence[Site]]) -> tuple[Site, ...]:
    """The sites that all recordings have. Raises UsageError for one that differs."""
    for recording, own in zip(recordings, sites, strict=True):
        if list(own) != list(sites[0]):
            differ = {site.id for site in own} ^ {site.id for site in sites[0]}
            raise UsageError(
                f"{recording.path.name} and {recordings[0].path.name} differ in their sites: "
                f"{', '.join(sorted(differ)) or 'other heads, layers or groups'}",
                remedy=_APART,
            )
    return tuple(sites[0])


def recorded_card(recordings: Sequence[Recording], row: Any) -> ModelCard:
    """Which model was recorded, where, and how exactly."""
    recording = recordings[0]
    meta = recording.meta
    worst = max((error for one in recordings if (error := one.worst_error) is not None), default=None)
    hashes = [one.sha256 for one in recordings]
    notes = [
        f"recorded: {sum(len(one.calls) for one in recordings)} attention calls of {meta['model']}, taken with "
        f"Python {meta['versions'].get('python')} and torch {meta['versions'].get('torch')}",
        "attention times values against the modules' own outputs when it was recorded: "
        + ("not checked" if worst is None else f"at most {worst:.1e} apart"),
    ]
    if meta["silent"]:
        notes.append(f"modules that look like attention and were not recorded: {', '.join(meta['silent'])}")
    return ModelCard(
        id=f"recording:{recording.path.stem}",
        source=", ".join(one.path.name for one in recordings),
        adapter="foveate_dvis.recording_source:RecordingSource",
        revision=hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest(),
        weights_sha256=str(meta["weights_sha256"]),
        licence=getattr(row, "licence", "unverified") or "unverified",
        family=row.family.id,
        versions={str(name): str(value) for name, value in meta["versions"].items()},
        notes=tuple(notes),
    )


def recorded_facts(recordings: Sequence[Recording]) -> dict[str, Any]:
    """What any recordings say of themselves."""
    return {
        "recorded": recordings[0].meta["model"],
        "image": list(recordings[0].padded),
        "frames": [len(recording.frames) for recording in recordings],
        "calls": [len(recording.calls) for recording in recordings],
        "error": [recording.worst_error for recording in recordings],
    }


def recorded_batch(recordings: Sequence[Recording], samples: Sequence[Sample], *, device: str) -> Batch:
    """One sample, whose recording is found by its pictures; ``shared["recording"]`` is its number.

    ``inputs`` are its pictures from 0 to 1, padded as the model did. Raises SampleError where none fits.
    """
    if len(samples) != 1:
        raise SampleError(f"recordings are played one by one, got {len(samples)} samples", remedy="batch size 1")
    (sample,) = samples
    number, geometry = _find(recordings, sample)
    recording = recordings[number]
    inputs = recorded_inputs(recording).to(device)
    clip = sample.is_clip
    index = {"frame_index": torch.arange(len(recording.frames))[None]} if clip else {}
    given = inputs[None] if clip else inputs
    return Batch(given, (geometry,), (sample.id,), per_sample=index, shared={"recording": number})


def _find(recordings: Sequence[Recording], sample: Sample) -> tuple[int, Geometry]:
    """The recording of a sample: the one of its name first. Raises what the closest one says against it."""
    order = sorted(range(len(recordings)), key=lambda i: recordings[i].path.stem not in sample.id)
    refused: list[SampleError] = []
    for number in order:
        try:
            return number, geometry_of(recordings[number], sample)
        except SampleError as error:
            refused.append(error)
    raise refused[0]


def recorded_inputs(recording: Recording) -> Tensor:
    """Recorded pictures (frame, channel, y, x) from 0 to 1, zero in the padding at the bottom and the right."""
    pictures = torch.from_numpy(recording.frames).permute(0, 3, 1, 2).float() / 255
    height, width = recording.padded
    below, right = height - pictures.shape[-2], width - pictures.shape[-1]
    return torch.nn.functional.pad(pictures, (0, right, 0, below))


def check_unchanged(recordings: Sequence[Recording], batch: Batch, *, grad: bool) -> int:
    """The number of the recording to play. Raises UsageError where only the model itself could answer."""
    if grad:
        raise UsageError("a recording has no gradients", remedy=_LIVE)
    if editing.outer() is not None:
        raise UsageError("a recording cannot answer about attention that was changed", remedy=_LIVE)
    given = batch.inputs[0] if batch.inputs.dim() == 5 else batch.inputs
    number = int(batch.shared["recording"])
    expected = recorded_inputs(recordings[number]).to(given.device)
    if len(batch) != 1 or given.shape != expected.shape or not torch.equal(given, expected):
        raise UsageError("a recording cannot answer about pictures that were changed", remedy=_LIVE)
    return number
