"""What is known of each sample after capture, and the two tables made of it: samples and predictions.

Records travel through the ledger (one JSON object a sample), so the tables can be rebuilt whole at any time
from the commit batches that are safely on disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from foveate.data.manifest import Manifest
from foveate.data.sampling import duration_of, rate_of
from foveate.data.schema import STATUS
from foveate.geometry import Geometry
from foveate.interfaces import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

OK, FAILED = STATUS.index("ok"), STATUS.index("failed")
GEOMETRY = tuple(Geometry.__dataclass_fields__)
"""Geometry's fields, each a sample coordinate."""
EDGES = ("top", "left", "bottom", "right")


@dataclass(frozen=True)
class ClipRecord:
    """What is known of a clip. ``frames`` of the sample, its ``fps`` and ``duration`` (seconds; NaN: not known).

    Of each frame that the model read: ``frame_index`` (which frame of the sample), ``times`` (seconds from the
    first frame of the file, NaN where not known) and ``frame_cells`` (the frame cell that it belongs to).
    """

    frames: int
    fps: float
    duration: float
    frame_index: tuple[int, ...]
    times: tuple[float, ...]
    frame_cells: tuple[int, ...]

    @classmethod
    def of(
        cls,
        times: NDArray[np.float64] | None,
        frames: int,
        frame_index: Sequence[int],
        frame_cells: Sequence[int],
    ) -> ClipRecord:
        """From the times of all ``frames`` frames of a sample and what the model read of them."""
        read = tuple(int(i) for i in frame_index)
        seconds = tuple(float("nan") if times is None else float(times[i]) for i in read)
        return cls(frames, rate_of(times), duration_of(times), read, seconds, tuple(int(i) for i in frame_cells))


@dataclass(frozen=True)
class SampleRecord:
    """What became of one sample. ``predictions`` are best first; ``correct`` is None where no truth is known.

    ``clip`` is None for images and for clips that failed.
    """

    status: int
    failure: str = ""
    notes: str = ""
    sha256: str = ""
    geometry: Geometry | None = None
    predictions: tuple[Prediction, ...] = ()
    correct: bool | None = None
    target_label: str = ""
    target_score: float = float("nan")
    clip: ClipRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON types only (masks of predictions are not kept)."""
        fields = {name: v for name, v in vars(self).items() if name not in ("geometry", "predictions", "clip")}
        geometry = None if self.geometry is None else asdict(self.geometry)
        clip = {} if self.clip is None else {"clip": asdict(self.clip)}
        answers = [_prediction_json(p) for p in self.predictions]
        return {**fields, "geometry": geometry, "predictions": answers, **clip}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SampleRecord:
        """The inverse of :meth:`to_json`."""
        geometry = None if data["geometry"] is None else Geometry(**data["geometry"])
        predictions = tuple(_prediction(item) for item in data["predictions"])
        known = data.get("clip")
        clip = None if known is None else ClipRecord(**{k: _frozen(value) for k, value in known.items()})
        return cls(**{**data, "geometry": geometry, "predictions": predictions, "clip": clip})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def judge(predictions: Sequence[Prediction], truth: object) -> bool | None:
    """Whether the best answer is the truth of the manifest's ``label``, by name or class index.

    None where there is no truth or no answer. Names are compared without regard to case and outer spaces.
    """
    said = str(truth if truth is not None else "").strip().casefold()
    if not said or not predictions:
        return None
    best = predictions[0]
    return said in (best.label.strip().casefold(), str(best.class_index))


def samples_table(manifest: Manifest, records: Mapping[int, SampleRecord], beside: Path) -> xr.Dataset:
    """The group ``samples``: manifest columns, geometry, hash and status, one entry a row of the manifest.

    ``records`` maps positions to what is known; paths below the folder ``beside`` are stored relative to it.
    """
    known = [records.get(i) for i in range(len(manifest))]
    masks = ["" if row.mask is None else portable(row.mask, beside) for row in manifest.rows]
    coords: dict[str, Any] = {name: ("sample", _column(values)) for name, values in manifest.columns.items()}
    coords |= {
        "id": ("sample", _text(manifest.ids)),
        "path": ("sample", _text(portable(row.path, beside) for row in manifest.rows)),
        "mask": ("sample", _text(masks)),
        "sha256": ("sample", _text(r.sha256 if r else "" for r in known)),
        "failure": ("sample", _text(r.failure if r else "" for r in known)),
        "notes": ("sample", _text(r.notes if r else "" for r in known)),
        "status": ("sample", np.array([r.status if r else 0 for r in known], np.uint8), STATUS_FLAGS),
        "sample": ("sample", _text(manifest.ids)),
    }
    for name in GEOMETRY:
        values = [getattr(r.geometry, name) if r and r.geometry else np.nan for r in known]
        coords[name] = ("sample", np.array(values, np.float64), {"units": "1" if "scale" in name else "pixel"})
    if manifest.media == "clip":
        coords |= clip_columns(manifest, [None if r is None else r.clip for r in known])
    return xr.Dataset(coords=coords)


def clip_columns(manifest: Manifest, known: Sequence[ClipRecord | None]) -> dict[str, Any]:
    """What the group ``samples`` holds of clips: frames, fps, duration, video, selection (sample); and of each
    frame that the model read frame_index, time, frame_cell (sample, frame), -1 and NaN behind a clip's end."""
    rows = manifest.rows
    capacity = max((len(c.frame_index) for c in known if c), default=0)
    dims = ("sample", "frame")
    index, cell = (np.full((len(rows), capacity), -1, np.int64) for _ in range(2))
    time = np.full((len(rows), capacity), np.nan)
    for i, clip in enumerate(known):
        if clip is not None:
            read = slice(len(clip.frame_index))
            index[i, read], time[i, read], cell[i, read] = clip.frame_index, clip.times, clip.frame_cells
    return {
        "video": ("sample", _text(row.video for row in rows), {"long_name": "recording: the unit of statistics"}),
        "selection": ("sample", _text(row.selection.to_json() if row.selection else "" for row in rows)),
        "frames": ("sample", np.array([c.frames if c else -1 for c in known], np.int64)),
        "fps": ("sample", np.array([c.fps if c else np.nan for c in known], np.float64), {"units": "1/s"}),
        "duration": ("sample", np.array([c.duration if c else np.nan for c in known], np.float64), {"units": "s"}),
        "frame_index": (dims, index, {"long_name": "frame of the sample that the model read, -1 for none"}),
        "time": (dims, time, {"units": "s", "long_name": "since the first frame of the file"}),
        "frame_cell": (dims, cell, {"long_name": "frame cell that the frame belongs to, -1 for none"}),
    }


STATUS_FLAGS: Mapping[str, Any] = {"flag_values": list(range(len(STATUS))), "flag_meanings": " ".join(STATUS)}


def predictions_table(manifest: Manifest, records: Mapping[int, SampleRecord], ranks: int) -> xr.Dataset:
    """The group ``predictions``: the ``ranks`` best answers of each sample, confidence and correctness.

    label, score, class_index (sample, rank), of clips track, and box or whatever else predictions carry;
    confidence (sample): the best score; correct (sample): 1, 0, or -1 where there is no truth.
    """
    count = len(manifest)
    known = [records.get(i) for i in range(count)]
    best = [(r.predictions[:ranks] if r else ()) for r in known]
    table = {
        "label": _ranked(best, ranks, "", lambda p: p.label),
        "score": _ranked(best, ranks, np.nan, lambda p: p.score),
        "class_index": _ranked(best, ranks, -1, lambda p: -1 if p.class_index is None else p.class_index),
        "confidence": ("sample", np.array([p[0].score if p else np.nan for p in best], np.float64)),
        "correct": (
            "sample",
            np.array([-1 if r is None or r.correct is None else int(r.correct) for r in known], np.int8),
            {"flag_values": [-1, 0, 1], "flag_meanings": "unknown wrong right"},
        ),
        "target_label": ("sample", _text(r.target_label if r else "" for r in known)),
        "target_score": ("sample", np.array([r.target_score if r else np.nan for r in known], np.float64)),
    }
    if manifest.media == "clip":
        table["track"] = _ranked(best, ranks, "", lambda p: p.track or "")
    table |= _further(best, ranks)
    return xr.Dataset(table, coords={"sample": ("sample", _text(manifest.ids)), "rank": np.arange(ranks)})


def _further(best: Sequence[Sequence[Prediction]], ranks: int) -> dict[str, Any]:
    """Boxes, object queries, and extras of the source (a geolocator's coordinates), where there are any."""
    every = [p for row in best for p in row]
    table: dict[str, Any] = {}
    if any(p.box is not None for p in every):
        for i, edge in enumerate(EDGES):
            table[f"box_{edge}"] = _ranked(best, ranks, np.nan, lambda p, i=i: p.box[i] if p.box else np.nan)
    if any(p.object is not None for p in every):
        table["object"] = _ranked(best, ranks, -1, lambda p: -1 if p.object is None else p.object)
    for name in dict.fromkeys(name for p in every for name in p.extra):
        text = any(isinstance(p.extra.get(name), str) for p in every)
        missing: Any = "" if text else np.nan
        table[name] = _ranked(best, ranks, missing, lambda p, name=name, m=missing: p.extra.get(name, m))
    return table


def _ranked(best: Sequence[Sequence[Prediction]], ranks: int, missing: Any, get: Any) -> tuple[Any, ...]:
    rows = [[get(p) for p in row] + [missing] * (ranks - len(row)) for row in best]
    if isinstance(missing, str):
        return ("sample", "rank"), np.array(rows, dtype=object).reshape(len(best), ranks)
    return ("sample", "rank"), np.array(rows, np.int64 if missing == -1 else np.float64).reshape(len(best), ranks)


def _text(values: Any) -> Any:
    return np.array([str(value) for value in values], dtype=object)


def _column(values: Sequence[Any]) -> Any:
    return _text(values) if any(isinstance(value, str) for value in values) else np.array(values)


def portable(path: Path, beside: Path) -> str:
    """``path`` relative to the folder ``beside`` where it lies below it (both may move), else absolute."""
    full, folder = Path(os.path.abspath(path)), Path(os.path.abspath(beside))
    return full.relative_to(folder).as_posix() if full.is_relative_to(folder) else str(full)


def _prediction_json(p: Prediction) -> dict[str, Any]:
    return {
        "label": p.label,
        "score": p.score,
        "class_index": p.class_index,
        "object": p.object,
        "box": p.box,
        "track": p.track,
        "extra": dict(p.extra),
    }


def _prediction(data: Mapping[str, Any]) -> Prediction:
    box = None if data["box"] is None else tuple(data["box"])
    return Prediction(**{**data, "box": box})
