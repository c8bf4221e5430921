"""What a run's metrics say, one line each: the mean over images with its interval, beside a uniform row's value.

The unit is the image, of clips the video: an image's value is its mean over heads and stored rows at one layer,
a video's the mean over its windows. Metrics with one value a key are left out, since their mean over keys is a
constant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from foveate.data.export_rows import tokens_at
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.interfaces import Metric
from foveate.metrics.labelled import measure
from foveate.plugins.manager import plugin_manager
from foveate.stats.intervals import bootstrap_mean
from foveate.study.measure import Measured, allowed_keys
from foveate.study.measure_points import NAMES as POINTS


@dataclass(frozen=True)
class Line:
    """A metric at one layer: mean over ``n`` images (or videos), 95 % interval, and the value of uniform rows."""

    site: str
    metric: str
    unit: str
    layer: int
    n: int
    mean: float
    low: float
    high: float
    uniform: float
    over: str
    """What an image's value is a mean over, besides itself."""


def summarise(run: Run, measured: Iterable[Measured], *, layer: int = -1, seed: int = 0) -> list[Line]:
    """A line for every product with one value a row, or a layer; ``layer`` counts the stored layers."""
    lines = []
    for item in measured:
        values = run.product(item.product)[item.metric]
        by_key = {"key", "key_level"} & set(values.dims)
        if not by_key and not values.attrs.get("circular"):  # angles have no plain mean
            lines.append(_line(run, item, values.isel(layer=layer), seed))
    return lines


def _line(run: Run, item: Measured, values: xr.DataArray, seed: int) -> Line:
    interval = bootstrap_mean(_of_each_video(run, _mean_of_each(values.isel(sample=run.ok))), seed=seed)
    over = ", ".join(f"{values.sizes[d]} {d}s" for d in values.dims if d != "sample" and values.sizes[d] > 1)
    return Line(
        item.site,
        item.metric,
        str(values.attrs["units"]),
        int(values["layer"]),
        interval.n,
        interval.estimate,
        interval.low,
        interval.high,
        uniform_value(run, item),
        over,
    )


def _of_each_video(run: Run, per_sample: NDArray[np.float64]) -> NDArray[np.float64]:
    """Windows of one recording are not independent: they count as one. Images stay as they are."""
    if run.media != "clip" or "video" not in run.samples:
        return per_sample
    names = [str(name) for name in run.samples["video"].values[run.ok]]
    places = [[i for i, name in enumerate(names) if name == video] for video in dict.fromkeys(names)]
    return np.array(
        [_mean_of_each(xr.DataArray(per_sample[rows][None], dims=("sample", "window")))[0] for rows in places]
    )


def _mean_of_each(values: xr.DataArray) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).reshape(values.sizes["sample"], -1)
    known = np.isfinite(array)
    count = known.sum(axis=1)
    total = np.where(known, array, 0.0).sum(axis=1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def uniform_value(run: Run, item: Measured) -> float:
    """The metric where every row is uniform over all keys: what no preference at all would give.

    NaN for metrics of sampling points, for which no row is uniform.
    """
    if item.metric in POINTS:
        return float("nan")
    site = run.site(item.site)
    axis = "query" if "query" in site.sizes else "token"
    query, key = tokens_at(site, axis), tokens_at(site, "key")
    shape = (1, 1, 2, len(query), len(key))
    rows = xr.DataArray(
        np.full(shape, 1.0 / len(key), np.float32), dims=("sample", "layer", "head", "query", "key")
    )
    metric: Metric = plugin_manager().spec("metric", item.metric).create()
    keys = run.product(item.product)[item.metric].attrs["over_keys"]
    allowed = allowed_keys(site, axis)
    try:
        flat = measure(rows, [metric], query=query, key=key, keys=keys, all_rows=True, allowed=allowed)[
            item.metric
        ]
    except UsageError:
        return float("nan")
    return float(_mean_of_each(flat)[0])
