"""Sampling points and the row that they make, from what a run kept: the model is not opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.attribution.levels import patches_by_level, tokens_on_cells
from foveate.capture.sampling import SamplingPoints
from foveate.detection.sampling_points import splat
from foveate.errors import UsageError
from foveate.render.panel import Panel, Rule
from foveate.render.selection import Head, count_keys, layer_index

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run


def sites_with_points(run: Run) -> list[str]:
    """Sites of a run that kept sampling points, those read by objects last."""
    sites = [name for name in run.site_ids if "location" in run.site(name)]
    return sorted(sites, key=lambda name: run.site(name).attrs.get("kind") == "cross")


def stored(
    run: Run, position: int, query: int | None, *, site: str | None = None, layer: int = -1, head: Head = "mean"
) -> tuple[SamplingPoints, Panel, Rule]:
    """Points of a query with their reference, the row they make on the finest cells, and the words for both.

    ``query`` is a query of the model; None is the first row kept. Raises UsageError where its points, the
    site, the layer or the head were not kept.
    """
    name = _site(run, site)
    dataset = run.site(name)
    at, row = layer_index(dataset, layer), _row(dataset, query)
    heads = _heads(dataset, head)
    one = dataset.isel(sample=position, layer=at, query=row)
    found = _points(one, heads)
    tokens = run.tokens(name, "key", position)
    location, weight, level = _arrays(one, heads)
    dense = splat(location, weight, level, tokens).mean(0)
    keys = count_keys(tokens)
    even = np.full(len(tokens), 1.0 / keys)
    values, uniform = (tokens_on_cells(array, tokens, run.grid) for array in (dense, even))
    title = "splat" if len(patches_by_level(tokens)) < 2 else "splat, all levels"
    image, geometry = run.load_sample(position).pixels, run.geometry(position)
    panel = Panel(image, geometry, values, run.grid, float(uniform.mean()), title)
    layers = [int(number) for number in dataset["layer"].values]
    who = f"mean of {dataset.sizes['head']} heads" if head == "mean" else f"head {head} of {dataset.sizes['head']}"
    number = int(dataset["query_index"].values[row])
    read = f"query {number}" if number >= 0 else "readout row"
    words = f"{name}, {read}, layer {layers[at]} of {layers[0]}–{layers[-1]}, {who}"
    return found, panel, Rule(run.model_id, words, keys)


def _site(run: Run, name: str | None) -> str:
    known = sites_with_points(run)
    if (name is None and known) or name in known:
        return known[-1] if name is None else name
    raise UsageError(
        f"{run.path}: no sampling points were kept" + (f" of {name}" if name else ""),
        remedy="capture again with --reductions entropy,received,points --rows all",
    )


def _row(dataset: xr.Dataset, query: int | None) -> int:
    kept = [int(number) for number in dataset["query_index"].values]
    if query is None or (kept == [-1] and query == -1):
        return 0
    if query not in kept:
        raise UsageError(
            f"the sampling points of query {query} were not kept", remedy="capture again with --rows all"
        )
    return kept.index(query)


def _heads(dataset: xr.Dataset, head: Head) -> list[int]:
    known = [str(number) for number in dataset["head"].values]
    if head == "mean":
        return list(range(len(known)))
    if str(head) not in known:
        raise UsageError(f"head {head} was not captured", remedy=f"one of {', '.join(known)}, or mean")
    return [known.index(str(head))]


def _arrays(
    one: xr.Dataset, heads: list[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """location (head, point, 2), weight and level (head, point) of one row."""
    location = np.asarray(one["location"].transpose("head", "point", "yx").values, np.float64)[heads]
    weight = np.asarray(one["weight"].transpose("head", "point").values, np.float64)[heads]
    return location, weight, np.asarray(one["level"].transpose("head", "point").values, np.int64)[heads]


def _points(one: xr.Dataset, heads: list[int]) -> SamplingPoints:
    """Points of one row, head by head; weights of several heads are their mean."""
    location, weight, level = _arrays(one, heads)
    of = np.broadcast_to(np.array(heads)[:, None], weight.shape)
    reference = (float("nan"), float("nan"))
    if "reference" in one:
        y, x = (float(value) for value in one["reference"].values[:2])
        reference = (y, x)
    return SamplingPoints(
        location[..., 0].ravel(),
        location[..., 1].ravel(),
        weight.ravel() / len(heads),
        level.ravel(),
        of.astype(np.int64).ravel(),
        reference,
    )
