"""The job behind ``foveate metrics``: every metric of every site of a run, written into the run.

One pass over a site's rows serves all its metrics, in bounded memory; a job that was cut off continues. Where
capture kept an exact reduction over every row (float32), that is used in preference to the stored rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from foveate.data.labels import tokens_of
from foveate.data.run import Run
from foveate.data.store import consolidated_once
from foveate.errors import FoveateError, UsageError
from foveate.interfaces import Metric
from foveate.metrics import labelled
from foveate.metrics.labelled import Keys, Tokens
from foveate.metrics.reduced import is_reducible, reduced_blocks
from foveate.plugins.manager import plugin_manager
from foveate.study.measure_points import NAMES as POINTS
from foveate.study.measure_points import PointMetric, chosen_points, write_points

_LEFT_OUT = ("_height", "_width", "_level")
"""Columns of token tables that stay with the site: one small array each would be most of a product."""

Progress = Callable[[int], None]
Blocks = Iterator[tuple[int, dict[str, NDArray[np.float32]]]]


@dataclass(frozen=True)
class Measured:
    """A product that the run holds now."""

    site: str
    metric: str
    product: str
    computed_from: str


@dataclass(frozen=True)
class Skipped:
    """A metric that a site cannot give, and why."""

    site: str
    metric: str
    reason: str


@dataclass(frozen=True)
class MeasureReport:
    """What was measured and what was not."""

    path: Path
    keys: Keys
    written: tuple[Measured, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """One stored array of a site and the metrics that it gives."""

    site: str
    array: xr.DataArray
    metrics: tuple[Metric, ...]
    computed_from: str
    walk: Callable[[xr.DataArray, Sequence[int]], Blocks]
    count: Mapping[str, int | str]


def measure_run(
    run: Run | Path | str,
    metrics: Sequence[str | Metric] | None = None,
    *,
    sites: Iterable[str] | None = None,
    keys: Keys = "patch",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MeasureReport:
    """Write ``metrics/<site>/<metric>`` for every site; default: all metrics that are installed.

    Where a run holds sampling points, so do their metrics (:mod:`foveate.study.measure_points`).

    ``keys`` is as in :mod:`foveate.metrics.labelled`. A metric that a site cannot give is reported as skipped;
    UsageError where nothing at all can be given, or a name is unknown. StoreError where a product is there
    with other settings, unless ``overwrite``, which computes all anew. ``progress`` is told of samples done.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    run.check_captured()
    of_points = None if metrics is None else [name for name in metrics if name in POINTS]
    chosen, skipped = load_metrics(None if metrics is None else [m for m in metrics if m not in POINTS])
    parts: list[_Part] = []
    sampled: list[tuple[str, PointMetric]] = []
    for site in sites if sites is not None else run.site_ids:
        found, missing = _parts(run, site, chosen, keys)
        given, lacking = chosen_points(run.site(site), of_points)
        parts += found
        sampled += [(site, metric) for metric in given]
        skipped += missing
        if of_points is not None or given:  # at sites without points nobody asked for theirs
            skipped += [Skipped(site, name, reason) for name, reason in lacking.items()]
    if not parts and not sampled:
        raise _nothing(run, skipped)
    with consolidated_once(run.path):
        written = [measured for part in parts for measured in _write(run, part, keys, overwrite, progress)]
        for site, metric in sampled:
            product = product_name(site, metric.name)
            source = write_points(run, site, metric, product, overwrite=overwrite)
            written.append(Measured(site, metric.name, product, source))
    return MeasureReport(run.path, keys, tuple(written), tuple(skipped))


def load_metrics(metrics: Sequence[str | Metric] | None) -> tuple[list[Metric], list[Skipped]]:
    """Metrics by name, or all that are installed; one that does not load is skipped unless it was named."""
    manager = plugin_manager()
    if metrics is not None:
        return [manager.spec("metric", m).create() if isinstance(m, str) else m for m in metrics], []
    loaded, broken = [], []
    for spec in manager.specs("metric"):
        try:
            loaded.append(spec.create())
        except FoveateError as error:
            broken.append(Skipped("", spec.name, error.message))
    return loaded, broken


def product_name(site: str, metric: str) -> str:
    """Where a metric of a site lies in a run."""
    return f"metrics/{site}/{metric}"


def _nothing(run: Run, skipped: Sequence[Skipped]) -> UsageError:
    reasons = "; ".join(sorted({f"{s.metric}: {s.reason}" for s in skipped})) or "the run holds no site"
    return UsageError(f"{run.path}: nothing can be measured ({reasons})", remedy="capture what the metrics need")


# ------------------------------------------------------------------------- which array gives which metric


def _parts(run: Run, site_id: str, metrics: Sequence[Metric], keys: Keys) -> tuple[list[_Part], list[Skipped]]:
    site = run.site(site_id)
    by_reduction: dict[str, list[Metric]] = {}
    from_rows: list[Metric] = []
    skipped: list[Skipped] = []
    key = _tokens(site, "key")
    for metric in metrics:
        reason = _no_keys(key, labelled.keys_of(metric.info, keys))
        if reason:
            skipped.append(Skipped(site_id, metric.info.name, reason))
        elif is_reducible(metric, site, keys):
            by_reduction.setdefault(metric.reduction, []).append(metric)
        elif reason := _no_rows(site, metric):
            skipped.append(Skipped(site_id, metric.info.name, reason))
        else:
            from_rows.append(metric)
    parts = [_reduced_part(site_id, site, name, tuple(given), keys) for name, given in by_reduction.items()]
    return parts + ([_rows_part(site_id, site, tuple(from_rows), keys)] if from_rows else []), skipped


def _no_keys(key: Tokens, keys: Keys) -> str:
    try:
        labelled.key_count(key, keys)
    except UsageError as error:
        return f"{error.message}; {error.remedy}"
    return ""


def _no_rows(site: xr.Dataset, metric: Metric) -> str:
    """Why the stored rows do not give this metric; empty where they do."""
    if "attention" not in site:
        return "no attention rows were kept"
    rows = labelled.standard(site["attention"])
    complete = site.attrs.get("rows") == "all"
    return labelled.unmet(metric.info, rows, _tokens(site, "query"), _tokens(site, "key"), all_rows=complete)


def _tokens(site: xr.Dataset, axis: str) -> Tokens:
    """The axis' tokens: one table, or one a sample where they differ."""
    if "sample" not in site[f"{axis}_kind"].dims:
        return tokens_of(site, axis)
    return [tokens_of(site, axis, i) for i in range(site.sizes["sample"])]


def _of(tokens: Tokens, positions: Sequence[int]) -> Tokens:
    return [tokens[i] for i in positions] if isinstance(tokens, list) else tokens


def _rows_part(site_id: str, site: xr.Dataset, metrics: tuple[Metric, ...], keys: Keys) -> _Part:
    rows, query, key = labelled.standard(site["attention"]), _tokens(site, "query"), _tokens(site, "key")

    allowed = allowed_keys(site, "query")

    def walk(part: xr.DataArray, positions: Sequence[int]) -> Blocks:
        if "allowed" in site:
            return _walk_masked(part, positions)
        rows_of, keys_of = _of(query, positions), _of(key, positions)
        return labelled.blocks(part, metrics, query=rows_of, key=keys_of, keys=keys, allowed=allowed)

    def _walk_masked(part: xr.DataArray, positions: Sequence[int]) -> Blocks:
        """Sample by sample, because masks differ: a blocked key is NaN, which no kernel counts."""
        for start, position in enumerate(positions):
            one, free = part.isel(sample=[start]), site["allowed"].isel(sample=[position])
            masked = one.where(free.variable).transpose(*one.dims)
            rows_of, keys_of = _of(query, [position]), _of(key, [position])
            for _, block in labelled.blocks(masked, metrics, query=rows_of, key=keys_of, keys=keys):
                yield start, block

    if "allowed" in site:  # K differs between rows
        allowed = np.ones((1, 1), bool)
    return _Part(site_id, rows, metrics, f"stored {rows.dtype}", walk, _counts(metrics, key, keys, allowed))


def _reduced_part(site_id: str, site: xr.Dataset, name: str, metrics: tuple[Metric, ...], keys: Keys) -> _Part:
    array, key = site[name], _tokens(site, "key")
    allowed = allowed_keys(site, "token") if "token" in array.dims else None
    masks = site.get("key_count" if "token" in array.dims else "reader_share")

    def walk(part: xr.DataArray, positions: Sequence[int]) -> Blocks:
        given = [metric for metric in metrics if is_reducible(metric, site, keys)]
        left = None if masks is None else masks.isel(sample=list(positions))
        return reduced_blocks(part, given, key=_of(key, positions), keys=keys, allowed=allowed, masks=left)

    source = f"{array.dtype} at capture, every row"
    differs = allowed if masks is None else np.ones((1, 1), bool)  # K differs between rows
    return _Part(site_id, array, metrics, source, walk, _counts(metrics, key, keys, differs))


def _counts(
    metrics: Sequence[Metric], key: Tokens, keys: Keys, allowed: NDArray[np.bool_] | None
) -> dict[str, int | str]:
    return {m.info.name: labelled.key_count(key, labelled.keys_of(m.info, keys), allowed) for m in metrics}


def allowed_keys(site: xr.Dataset, axis: str) -> NDArray[np.bool_] | None:
    """(rows along ``axis``, key): which keys a causal mask leaves each row; None where the site has no such mask.

    A weighted readout row (position -1) may have read from any key.
    """
    if "causal" not in site.attrs.get("masks", ()):
        return None
    rows = site["query_index"].values if axis == "query" else np.arange(site.sizes[axis])
    key = np.arange(site.sizes["key"])
    return np.asarray((key[None, :] <= rows[:, None]) | (rows[:, None] < 0))


# ------------------------------------------------------------------------------------------ writing


def _write(run: Run, part: _Part, keys: Keys, overwrite: bool, progress: Progress | None) -> list[Measured]:
    """Compute the part's metrics for every captured sample that lacks one of them."""
    probe = next(part.walk(part.array.isel(sample=slice(0, 1)), [0]))[1]
    with ExitStack() as stack:
        writers = {
            metric.info.name: stack.enter_context(
                run.product_writer(
                    product_name(part.site, metric.info.name),
                    *_layout(part, metric, probe[metric.info.name].shape[1:], keys),
                    overwrite=overwrite,
                )
            )
            for metric in part.metrics
        }
        if overwrite:  # also where settings are the same: the metric itself may have changed
            for writer in writers.values():
                writer.restart()
        waiting = sorted({int(i) for writer in writers.values() for i in writer.pending(run.ok)})
        if waiting:
            for start, block in part.walk(part.array.isel(sample=waiting), waiting):
                positions = waiting[start : start + len(next(iter(block.values())))]
                for name, values in block.items():
                    writers[name].write(positions, {name: values})
                if progress:
                    progress(len(positions))
    return [
        Measured(part.site, m.info.name, product_name(part.site, m.info.name), part.computed_from)
        for m in part.metrics
    ]


def _layout(
    part: _Part, metric: Metric, shape: tuple[int, ...], keys: Keys
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Variables, coordinates and attributes of one product."""
    info = metric.info
    dims = labelled.result_dims(info, part.array.dims)
    attrs = labelled.describe(info, keys=keys, count=part.count[info.name], computed_from=part.computed_from)
    variables = {info.name: (dims, (part.array.sizes["sample"], *shape), "float32", attrs)}
    coords = {
        str(name): coord
        for name, coord in part.array.coords.items()
        if set(coord.dims) <= set(dims) and not str(name).endswith(_LEFT_OUT)
    }
    coords.pop("sample", None)  # the run's own
    return variables, coords, {"site": part.site, "metric": info.name, **attrs}
