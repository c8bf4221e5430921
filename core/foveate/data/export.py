"""Tables of a run for spreadsheets: the StreetCLIP study's eight columns, and the well-defined versions beside them.

Every table comes with a provenance file that says model, layer, heads, row, number of keys and definitions, and
is audited before anything is written: an impossible number means a defect here, and ends without a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from foveate.data.labels import tokens_of
from foveate.data.run import Run
from foveate.data.schema import plain
from foveate.errors import FoveateError, MissingDependencyError, UsageError
from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics import study
from foveate.metrics.audit.check import audit
from foveate.metrics.audit.tables import table_of
from foveate.metrics.labelled import Keys, blocks, keys_of, standard

HEAD_FREE = "mean"
_ROWS_AT_ONCE = 1024


class ImpossibleTableError(FoveateError):
    """A table that was about to be written holds numbers that attention cannot give."""

    exit_code = 6


@dataclass(frozen=True)
class Selection:
    """Which row of attention a table is about. ``layer`` is the true number; ``head`` a number or "mean"."""

    site: str
    layer: int
    head: int | str
    query: int
    row: str
    """What the chosen query is, in words."""


@dataclass(frozen=True, eq=False)
class Table:
    """A table and everything that fixes it."""

    frame: pd.DataFrame
    selection: Selection
    tokens: int
    definitions: Mapping[str, Mapping[str, Any]]
    keys: Keys = "patch"


def select(
    run: Run, *, site: str | None = None, layer: int = -1, head: int | str = HEAD_FREE, query: int | None = None
) -> Selection:
    """Settle which row is meant: by default the last layer, the mean over heads, the row the answer is read from.

    ``layer`` is a true number, or counts from the end where negative; ``query`` is a position among the stored
    rows. Raises UsageError naming what exists.
    """
    name = site or _first_site(run)
    dataset = run.site(name)
    if "attention" not in dataset:
        raise UsageError(f"{run.path}: site {name} holds no attention rows", remedy="capture with --rows readout")
    position = _query_position(dataset, query)
    tokens = tokens_of(dataset, "query", 0 if "sample" in dataset["query_kind"].dims else None)
    words = f"{_kind(tokens, position)} ({dataset.attrs.get('rows', 'rows')})"
    return Selection(name, _layer(dataset, layer), _head(dataset, head), position, words)


def study_table(run: Run, selection: Selection) -> Table:
    """The study's eight columns for every captured image, float64; ``country`` is empty where not in the manifest."""
    metrics = [metric() for metric in study.STUDY_METRICS]
    frame = _identity(run).assign(**_measure(run, selection, metrics, "patch"))
    frame["num_high_attention_patches"] = frame["num_high_attention_patches"].astype("int64")
    return Table(
        frame[list(study.COLUMNS)], selection, _tokens(run, selection, "patch"), _definitions(metrics, "patch")
    )


def wide_table(
    run: Run, selection: Selection, metrics: Sequence[Metric], *, keys: Keys = "patch"
) -> Table:
    """One row an image: every manifest column, confidence and correctness, and the well-defined metrics.

    Of ``metrics`` those that need no more than the one row (or the heads of it) are used; the rest is left out.
    """
    usable = [metric for metric in metrics if _fits_one_row(metric.info) and metric.info.name not in study.COLUMNS]
    values = _measure(run, selection, usable, keys)
    known = {name: column for name, column in values.items() if np.isfinite(column).any()}
    frame = _columns(run).assign(K=_tokens(run, selection, keys), **known)
    kept = [metric for metric in usable if metric.info.name in known]
    return Table(frame, selection, _tokens(run, selection, keys), _definitions(kept, keys), keys)


def write_table(run: Run, table: Table, path: Path | str) -> Path:
    """Audit, then write CSV or Parquet and ``<path>.provenance.json``. Returns the path of the provenance.

    Raises ImpossibleTableError (nothing is written), UsageError for another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".parquet"):
        raise UsageError(f"table {path}: expected a name ending in .csv or .parquet")
    checked = _audited(table, path)
    temporary = path.with_name(f".{path.name}.part")
    _write_frame(table.frame, temporary, path.suffix.lower())
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
        "head": f"{selection.head}" if selection.head != HEAD_FREE else "mean of the weights over heads, then measured",
        "model_heads": dataset.attrs.get("model_heads"),
        "keys": table.keys,
        "K": table.tokens,
        "grid": _grid(tokens_of(dataset, "key", 0 if "sample" in dataset["key_kind"].dims else None)),
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


# --------------------------------------------------------------------------------------- which row


def _first_site(run: Run) -> str:
    for name in run.site_ids:
        dataset = run.site(name)
        if "attention" in dataset and (dataset["key_kind"].values == _PATCH).any():
            return name
    raise UsageError(f"{run.path}: no site holds attention rows over patches", remedy="capture with --rows readout")


_PATCH = 0


def _layer(dataset: xr.Dataset, layer: int) -> int:
    have = [int(number) for number in dataset["layer"].values]
    if -len(have) <= layer < 0:
        return have[layer]
    if layer not in have:
        raise UsageError(f"no layer {layer}", remedy=f"layers that were kept: {', '.join(map(str, have))}")
    return layer


def _head(dataset: xr.Dataset, head: int | str) -> int | str:
    heads = standard(dataset["attention"]).sizes["head"]
    if head == HEAD_FREE:
        return head
    if not isinstance(head, int) or not 0 <= head < heads:
        raise UsageError(f"no head {head!r}", remedy=f"'mean', or 0 to {heads - 1}")
    return head


def _query_position(dataset: xr.Dataset, query: int | None) -> int:
    count = dataset.sizes["query"]
    if query is not None:
        if not 0 <= query < count:
            raise UsageError(f"no query {query}", remedy=f"stored rows are 0 to {count - 1}")
        return query
    tokens = tokens_of(dataset, "query", 0 if "sample" in dataset["query_kind"].dims else None)
    for kind in ("readout", "pool", "cls"):
        if tokens.where(kind).size == 1:
            return int(tokens.where(kind)[0])
    if count == 1:
        return 0
    raise UsageError(
        f"{count} rows are stored and none is the row that the answer is read from",
        remedy="say which with --query, or capture with --rows readout",
    )


def _kind(tokens: TokenAxis, position: int) -> str:
    from foveate.interfaces import TOKEN_KINDS

    return TOKEN_KINDS[int(tokens.kind[position])]


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
    for rows, query, key in _rows(run, selection):
        for chosen, array in ((of_a_row, _one_head(rows, selection.head)), (over_heads, rows)):
            if chosen and (chosen is of_a_row or rows.sizes["head"] > 1):
                for _, block in blocks(array, chosen, query=query, key=key, keys=keys):
                    for name, values in block.items():
                        found[name].append(values.reshape(len(values)))
    empty = np.full(run.ok.size, np.nan)
    return {n: np.concatenate(v).astype(np.float64) if v else empty for n, v in found.items()}


def _rows(run: Run, selection: Selection) -> Iterator[tuple[xr.DataArray, TokenAxis, TokenAxis]]:
    """The chosen row of captured images, (sample, layer, head, query, key) with one layer and query."""
    dataset = run.site(selection.site)
    attention = standard(dataset["attention"]).sel(layer=[selection.layer]).isel(query=[selection.query])
    spare = [dim for dim in attention.dims if dim not in ("sample", "layer", "head", "query", "key")]
    if spare:
        raise UsageError(f"site {selection.site}: a table needs one row an image, this site has {spare}")
    ragged = any("sample" in dataset[f"{axis}_kind"].dims for axis in ("query", "key"))
    step = 1 if ragged else _ROWS_AT_ONCE
    for start in range(0, run.ok.size, step):
        positions = run.ok[start : start + step]
        at = int(positions[0])
        query, key = (
            tokens_of(dataset, axis, at if "sample" in dataset[f"{axis}_kind"].dims else None)
            for axis in ("query", "key")
        )
        yield attention.isel(sample=positions), _only(query, selection.query), key


def _only(tokens: TokenAxis, position: int) -> TokenAxis:
    from foveate.metrics.labelled import take

    return take(tokens, slice(position, position + 1))


def _one_head(rows: xr.DataArray, head: int | str) -> xr.DataArray:
    if head == HEAD_FREE:
        return rows.astype(np.float32).mean("head", keepdims=True)
    return rows.isel(head=[int(head)])


def _tokens(run: Run, selection: Selection, keys: Keys) -> int:
    from foveate.metrics.labelled import counted

    dataset = run.site(selection.site)
    first = int(run.ok[0]) if run.ok.size else 0
    key = tokens_of(dataset, "key", first if "sample" in dataset["key_kind"].dims else None)
    return int(counted(key, keys).sum())


# ------------------------------------------------------------------------------------------ tables


def _identity(run: Run) -> pd.DataFrame:
    samples = run.samples.isel(sample=run.ok)
    countries = samples["country"].values if "country" in samples else [""] * run.ok.size
    return pd.DataFrame({"image_id": [str(i) for i in samples["id"].values], "country": countries})


def _columns(run: Run) -> pd.DataFrame:
    """Ids, what the manifest said, confidence and correctness, of captured images."""
    samples = run.samples.isel(sample=run.ok)
    own = {"sample", "id", "path", "sha256", "status", "failure", "notes", "mask"}
    own |= {name for name in samples.coords if str(name).startswith(("original_", "input_", "scale_", "offset_"))}
    columns = {str(name): samples[name].values for name in samples.coords if name not in own}
    predictions = run.predictions.isel(sample=run.ok)
    for name in ("confidence", "correct"):
        if name in predictions:
            columns[name] = predictions[name].values
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
    read = table_of(table.frame, str(path))
    if read is None or table.tokens < 2 or table.frame.empty:
        return {"possible": True, "findings": []}
    (verdict,) = audit(replace(read, tokens=table.tokens), [table.tokens]).verdicts
    findings = [str(finding) for finding in verdict.findings]
    if not verdict.possible:
        raise ImpossibleTableError(
            f"table {path} not written: {'; '.join(findings)}",
            remedy="this is a defect of the capture or of foveate: please report it with the run's validation",
        )
    return {"possible": True, "findings": findings}


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
