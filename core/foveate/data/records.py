"""What is known of each sample after capture, and the two tables made of it: samples and predictions.

Records travel through the ledger (one JSON object a sample), so the tables can be rebuilt whole at any time
from the commit batches that are safely on disk.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from foveate.data.manifest import Manifest
from foveate.data.schema import STATUS
from foveate.geometry import Geometry
from foveate.interfaces import Prediction

OK, FAILED = STATUS.index("ok"), STATUS.index("failed")
GEOMETRY = tuple(Geometry.__dataclass_fields__)
"""Geometry's fields, each a sample coordinate."""
EDGES = ("top", "left", "bottom", "right")


@dataclass(frozen=True)
class SampleRecord:
    """What became of one sample. ``predictions`` are best first; ``correct`` is None where no truth is known."""

    status: int
    failure: str = ""
    notes: str = ""
    sha256: str = ""
    geometry: Geometry | None = None
    predictions: tuple[Prediction, ...] = ()
    correct: bool | None = None
    target_label: str = ""
    target_score: float = float("nan")

    def to_json(self) -> dict[str, Any]:
        """JSON types only (masks of predictions are not kept)."""
        fields = {name: value for name, value in vars(self).items() if name not in ("geometry", "predictions")}
        geometry = None if self.geometry is None else asdict(self.geometry)
        return {**fields, "geometry": geometry, "predictions": [_prediction_json(p) for p in self.predictions]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SampleRecord:
        """The inverse of :meth:`to_json`."""
        geometry = None if data["geometry"] is None else Geometry(**data["geometry"])
        predictions = tuple(_prediction(item) for item in data["predictions"])
        return cls(**{**data, "geometry": geometry, "predictions": predictions})


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
    return xr.Dataset(coords=coords)


STATUS_FLAGS: Mapping[str, Any] = {"flag_values": list(range(len(STATUS))), "flag_meanings": " ".join(STATUS)}


def predictions_table(manifest: Manifest, records: Mapping[int, SampleRecord], ranks: int) -> xr.Dataset:
    """The group ``predictions``: the ``ranks`` best answers of each sample, confidence and correctness.

    label, score, class_index (sample, rank), and box or whatever else predictions carry; confidence
    (sample): the best score; correct (sample): 1, 0, or -1 where there is no truth.
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
