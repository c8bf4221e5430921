"""Tables of a run for spreadsheets: the StreetCLIP study's eight columns, and well-defined versions beside them.

Every table comes with a provenance file that says model, layer, heads, row, number of keys and definitions, and
is audited before anything is written: an impossible number means a defect here, and ends without a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from foveate.data.export_rows import HEAD_MEAN, Selection, count_keys, one_head, rows_of, select, tokens_at
from foveate.data.records import GEOMETRY
from foveate.data.run import Run
from foveate.data.schema import plain
from foveate.errors import FoveateError, MissingDependencyError, StoreError, UsageError
from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics import study
from foveate.metrics.audit.check import findings
from foveate.metrics.audit.tables import table_of
from foveate.metrics.audit.verdict import Verdict
from foveate.metrics.declare import foveate_metrics
from foveate.metrics.labelled import Keys, blocks, keys_of

__all__ = [
    "ImpossibleTableError",
    "Selection",
    "Table",
    "provenance",
    "select",
    "study_table",
    "wide_table",
    "write_table",
]


class ImpossibleTableError(FoveateError):
    """A table that was about to be written holds numbers that attention cannot give."""

    exit_code = 6


@dataclass(frozen=True, eq=False)
class Table:
    """A table and everything that fixes it."""

    frame: pd.DataFrame
    selection: Selection
    tokens: int
    definitions: Mapping[str, Mapping[str, Any]]
    keys: Keys = "patch"


def study_table(run: Run, selection: Selection) -> Table:
    """The study's eight columns for every captured image; ``country`` is empty where the manifest has none."""
    metrics = [metric() for metric in study.STUDY_METRICS]
    frame = _identity(run).assign(**_measure(run, selection, metrics, "patch"))
    frame["num_high_attention_patches"] = frame["num_high_attention_patches"].astype("int64")
    return Table(
        frame[list(study.COLUMNS)], selection, count_keys(run, selection, "patch"), _definitions(metrics, "patch")
    )


def wide_table(
    run: Run, selection: Selection, metrics: Sequence[Metric] | None = None, *, keys: Keys = "patch"
) -> Table:
    """One row an image: every manifest column, confidence and correctness, and the well-defined metrics.

    Of ``metrics`` (default: the core's) those that need no more than the one row, or its heads, are used.
    """
    offered = metrics if metrics is not None else [spec.create() for spec in foveate_metrics()]
    usable = [metric for metric in offered if _fits_one_row(metric.info) and metric.info.name not in study.COLUMNS]
    values = _measure(run, selection, usable, keys)
    known = {name: column for name, column in values.items() if np.isfinite(column).any()}
    frame = _columns(run).assign(K=count_keys(run, selection, keys), **known)
    kept = [metric for metric in usable if metric.info.name in known]
    return Table(frame, selection, count_keys(run, selection, keys), _definitions(kept, keys), keys)


def write_table(run: Run, table: Table, path: Path | str) -> Path:
    """Audit, then write CSV or Parquet and ``<path>.provenance.json``. Returns the path of the provenance.

    Raises ImpossibleTableError (nothing is written), UsageError for another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError(f"table {path}: expected a name ending in .csv or .parquet")
    checked = _audited(table, path)
    temporary = path.with_name(f".{path.name}.part")
    try:
        _write_frame(table.frame, temporary, path.suffix.lower())
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"table {path} cannot be written: {error}") from error
    record = provenance(run, table) | {
        "audit": checked,
        "table": path.name,
        "sha256": hashlib.sha256(temporary.read_bytes()).hexdigest(),
    }
    sidecar = path.with_name(path.name + ".provenance.json")
    sidecar.write_text(json.dumps(plain(record), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return sidecar


def provenance(run: Run, table: Table) -> dict[str, Any]:
    """What fixes the numbers of a table."""
    selection = table.selection
    dataset = run.site(selection.site)
    return {
        "run": run.path.name,
        "config_hash": run.attrs.get("config_hash", ""),
        "model": run.attrs["model"],
        **{key: value for key, value in asdict(selection).items() if key != "head"},
        "head": f"{selection.head}"
        if selection.head != HEAD_MEAN
        else "mean of the weights over heads, then measured",
        "model_heads": dataset.attrs.get("model_heads"),
        "keys": table.keys,
        "K": table.tokens,
        "grid": _grid(tokens_at(dataset, "key")),
        "computed_from": f"stored {dataset['attention'].dtype}",
        "images": len(table.frame),
        "left_out": int(len(run) - len(run.ok)),
        "definitions": table.definitions,
        "versions": {
            "foveate": version("foveate"),
            "numpy": np.__version__,
            "pandas": pd.__version__,
            "python": platform.python_version(),
        },
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _grid(key: TokenAxis) -> list[int]:
    """Rows and columns of the patches among the keys."""
    patches = key.where("patch")
    return [int(np.unique(key.y[patches]).size), int(np.unique(key.x[patches]).size)]


# ----------------------------------------------------------------------------------------- numbers


def _fits_one_row(info: MetricInfo) -> bool:
    return set(info.consumes) <= {"head", "key"} and "key" in info.consumes and not info.produces


def _measure(
    run: Run, selection: Selection, metrics: Sequence[Metric], keys: Keys
) -> dict[str, NDArray[np.float64]]:
    """One number an image and metric. Metrics over heads get the heads, the others the chosen head or the mean."""
    over_heads = [m for m in metrics if "head" in m.info.consumes]
    of_a_row = [m for m in metrics if "head" not in m.info.consumes]
    found: dict[str, list[NDArray[np.float32]]] = {metric.info.name: [] for metric in metrics}
    for rows, query, key in rows_of(run, selection):
        for chosen, array in ((of_a_row, one_head(rows, selection.head)), (over_heads, rows)):
            if chosen and (chosen is of_a_row or rows.sizes["head"] > 1):
                for _, block in blocks(array, chosen, query=query, key=key, keys=keys):
                    for name, values in block.items():
                        found[name].append(values.reshape(len(values)))
    empty = np.full(run.ok.size, np.nan)
    return {n: np.concatenate(v).astype(np.float64) if v else empty for n, v in found.items()}


# ------------------------------------------------------------------------------------------ tables


def _identity(run: Run) -> pd.DataFrame:
    samples = run.samples.isel(sample=run.ok)
    countries = samples["country"].values if "country" in samples else [""] * run.ok.size
    return pd.DataFrame({"image_id": [str(i) for i in samples["id"].values], "country": countries})


def _columns(run: Run) -> pd.DataFrame:
    """Ids, what the manifest said, confidence and correctness, of captured images."""
    samples = run.samples.isel(sample=run.ok)
    own = {"sample", "id", "path", "sha256", "status", "failure", "notes", "mask", "selection", *GEOMETRY}
    told = [name for name in samples.coords if name not in own and samples[name].dims == ("sample",)]
    columns = {str(name): samples[name].values for name in told}
    predictions = run.predictions.isel(sample=run.ok)
    if predictions.sizes["rank"]:
        columns["prediction"] = predictions["label"].values[:, 0]
    columns |= {name: predictions[name].values for name in ("confidence", "correct")}
    return pd.DataFrame({"image_id": [str(i) for i in samples["id"].values], **columns})


def _definitions(metrics: Sequence[Metric], keys: Keys) -> dict[str, dict[str, Any]]:
    return {
        m.info.name: {
            "definition": m.info.summary,
            "unit": m.info.unit,
            "keys": keys_of(m.info, keys),
            "citation": m.info.citation,
        }
        for m in metrics
    }


def _audited(table: Table, path: Path) -> dict[str, Any]:
    """The audit's outcome. Raises ImpossibleTableError where a number cannot be."""
    read = table_of(table.frame[["image_id", *table.definitions]], str(path))
    found = tuple(findings(read, table.tokens)) if read and table.tokens > 1 and len(table.frame) else ()
    verdict = Verdict(table.tokens, found)
    words = [str(finding) for finding in found]
    if not verdict.possible:
        raise ImpossibleTableError(
            f"table {path} not written: {'; '.join(words)}",
            remedy="this is a defect of the capture or of foveate: please report it with the run's validation",
        )
    return {"possible": True, "findings": words}


def _write_frame(frame: pd.DataFrame, path: Path, suffix: str) -> None:
    if suffix == ".csv":
        frame.to_csv(path, index=False, float_format="%.9g")
        return
    try:
        frame.to_parquet(path, index=False)
    except ImportError as error:
        raise MissingDependencyError(
            f"Parquet needs pyarrow: {error}", remedy='pip install "foveate[parquet]"'
        ) from error
