"""Metrics of stored sampling points: products beside the metrics of rows, ``metrics/<site>/points_...``.

The mathematics is :mod:`foveate.detection.sampling_points`; here are its names, units and the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.data.labels import tokens_of
from foveate.detection import sampling_points as points
from foveate.errors import UsageError

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.interfaces import TokenAxis

ZHU = "Zhu et al. 2021, Deformable DETR, arXiv:2010.04159, eq. 3"
LEVEL = "key_level"
"""The dim of a number for each feature map; its labels are the maps' own numbers."""


@dataclass(frozen=True)
class PointMetric:
    """A number a row, ``(sample, *group, layer, head, query)``, with one a level behind it where ``by_level``.

    ``needs`` names stored arrays besides location, weight and level. ``circular`` numbers have no plain mean.
    """

    name: str
    summary: str
    unit: str
    bounds: tuple[float, float]
    compute: Callable[[xr.Dataset, TokenAxis], NDArray[np.float64]]
    needs: tuple[str, ...] = ()
    by_level: bool = False
    circular: bool = False


def _arrays(site: xr.Dataset, *names: str) -> dict[str, NDArray[Any]]:
    return {name: np.asarray(site[name].values) for name in names}


def _mass(site: xr.Dataset, key: TokenAxis) -> NDArray[np.float64]:
    return points.image_mass(**_arrays(site, "location", "weight", "level"), key=key)


def _levels(site: xr.Dataset, key: TokenAxis) -> NDArray[np.float64]:
    return points.levels_mass(**_arrays(site, "weight", "level"), count=len(points.level_cells(key)))


def _cells(part: str) -> Callable[[xr.Dataset, TokenAxis], NDArray[np.float64]]:
    def compute(site: xr.Dataset, key: TokenAxis) -> NDArray[np.float64]:
        found = points.offsets_in_cells(**_arrays(site, "location", "weight", "level", "reference"), key=key)
        return np.asarray(getattr(found, part))

    return compute


def _boxes(part: str) -> Callable[[xr.Dataset, TokenAxis], NDArray[np.float64]]:
    def compute(site: xr.Dataset, key: TokenAxis) -> NDArray[np.float64]:
        found = points.offsets_in_boxes(**_arrays(site, "location", "weight", "reference"))
        return np.asarray(getattr(found, part))

    return compute


_TOLD, _INF = ("reference",), float("inf")
POINT_METRICS: tuple[PointMetric, ...] = (
    PointMetric("points_in_image", "weight that falls on cells of the feature maps", "1", (0, 1), _mass),
    PointMetric("points_level_mass", "weight on each feature map", "1", (0, 1), _levels, by_level=True),
    PointMetric(
        "points_distance_cells", "mean distance from the reference", "cell", (0, _INF), _cells("length"), _TOLD
    ),
    PointMetric(
        "points_spread_cells", "root mean square distance from their mean", "cell", (0, _INF), _cells("spread"),
        _TOLD,
    ),
    PointMetric(
        "points_one_sided", "mean offset over mean distance, in cells", "1", (0, 1), _cells("one_sided"), _TOLD
    ),
    PointMetric(
        "points_direction", "direction of the mean offset in cells: 0 to the right, positive downwards", "rad",
        (-np.pi, np.pi), _cells("direction"), _TOLD, circular=True,
    ),
    PointMetric(
        "points_distance_boxes", "mean distance from the reference", "box", (0, _INF), _boxes("length"), _TOLD
    ),
    PointMetric(
        "points_spread_boxes", "root mean square distance from their mean", "box", (0, _INF), _boxes("spread"),
        _TOLD,
    ),
)  # fmt: skip
"""Every metric of points. Those in boxes are NaN where a layer's references are points without extent."""

NAMES = {metric.name: metric for metric in POINT_METRICS}


def chosen_points(site: xr.Dataset, names: Iterable[str] | None) -> tuple[list[PointMetric], dict[str, str]]:
    """Metrics that a site's stored points give (all, or of those named), and why the others cannot be had."""
    wanted = POINT_METRICS if names is None else tuple(NAMES[name] for name in names)
    if "location" not in site:
        return [], {metric.name: "no sampling points were kept (--reductions points)" for metric in wanted}
    given = [metric for metric in wanted if all(name in site for name in metric.needs)]
    lacking = {m.name: "the model's layers are told no reference point" for m in wanted if m not in given}
    return given, lacking


def write_points(run: Run, site_id: str, metric: PointMetric, product: str, *, overwrite: bool = False) -> str:
    """Write one product, sample by sample, and return from what it was computed; a cut-off job continues."""
    site = run.site(site_id)
    dims, shape, labels = _layout(run, site, site_id, metric)
    source = "stored float32 sampling points"
    attrs = {
        "units": metric.unit, "long_name": metric.summary, "citation": ZHU, "computed_from": source,
        "valid_min": float(metric.bounds[0]), "valid_max": float(metric.bounds[1]),
        "circular": int(metric.circular),
    }  # fmt: skip
    coords = {
        str(name): coord
        for name, coord in site.coords.items()
        if set(coord.dims) <= set(dims) and name != "sample"
    }
    with run.product_writer(
        product,
        {metric.name: (dims, shape, "float32", attrs)},
        coords | labels,
        {"site": site_id, "metric": metric.name, **attrs},
        overwrite=overwrite,
    ) as writer:
        if overwrite:
            writer.restart()
        for position in writer.pending(run.ok):
            i = int(position)
            values = metric.compute(site.isel(sample=i), run.tokens(site_id, "key", i))
            writer.write([i], {metric.name: values[None].astype(np.float32)})
    return source


def stored_splat(run: Run, site_id: str, position: int) -> xr.DataArray:
    """Dense rows ``(*group, layer, head, query, key)`` of one sample, float64, made from its stored points.

    Equal to rows that were captured beside them but for the rounding of stored numbers. Raises UsageError where
    the run kept no points of the site, and SampleError where the sample failed.
    """
    import xarray as xr

    site = run.site(site_id)
    if "location" not in site:
        raise UsageError(
            f"{run.path}: no sampling points of {site_id} were kept",
            remedy="capture again with --reductions points --rows all",
        )
    run.geometry(position)  # a failed sample has none
    one = site.isel(sample=position)
    key = tokens_of(site, "key", position)
    rows = points.splat(**_arrays(one, "location", "weight", "level"), key=key)
    dims = [dim for dim in one["weight"].dims if dim != "point"]
    coords = {name: coord for name, coord in one.coords.items() if set(coord.dims) <= {*dims, "key"}}
    return xr.DataArray(rows, dims=(*dims, "key"), coords=coords, name="attention")


def _layout(
    run: Run, site: xr.Dataset, site_id: str, metric: PointMetric
) -> tuple[tuple[str, ...], tuple[int, ...], dict[str, Any]]:
    weight = site["weight"]
    kept = [str(dim) for dim in weight.dims if dim != "point"]
    shape = [weight.sizes[dim] for dim in kept]
    if not metric.by_level:
        return tuple(kept), tuple(shape), {}
    names = [cells.level for cells in points.level_cells(tokens_of(site, "key", int(run.ok[0])))]
    return (*kept, LEVEL), (*shape, len(names)), {LEVEL: np.array(names)}
