"""From a run to what is drawn: which sample, site, layer, head and row, and the words that say so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS
from foveate.render.distributions import Distribution
from foveate.render.panel import Panel, Rule

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.interfaces import TokenAxis

Head = int | Literal["mean"]
GROUPS = ("frame", "window", "track", "position")


def position_of(run: Run, sample: int | str) -> int:
    """The position of a sample given by position or id. Raises UsageError where it is absent or failed."""
    ids = [str(name) for name in run.samples["id"].values]
    if str(sample) in ids:
        position = ids.index(str(sample))
    elif str(sample).lstrip("-").isdigit() and -len(ids) <= int(sample) < len(ids):
        position = int(sample) % len(ids)
    else:
        raise UsageError(f"no sample {sample!r} in {run.path}", remedy=f"0 to {len(ids) - 1}, or an id")
    if position not in run.ok:
        raise UsageError(
            f"sample {ids[position]!r} was not captured: {run.samples['failure'].values[position] or 'missing'}"
        )
    return position


def site_of(run: Run, site: str | None = None) -> tuple[str, xr.Dataset]:
    """A site by id, or the first that kept rows over the picture. Raises UsageError where there is none.

    Sites whose keys have no place (object queries, words) hold nothing that can be laid on a picture.
    """
    patch, kept = TOKEN_KINDS.index("patch"), []
    for name in [site] if site is not None else run.site_ids:
        dataset = run.site(name)
        if "attention" in dataset:
            if patch in dataset["key_kind"].values:
                return name, dataset
            kept.append(name)
    if kept:
        raise UsageError(
            f"{run.path}: the keys of {', '.join(kept)} have no place in the picture: nothing to draw",
            remedy="choose another --site (foveate inspect), or read the rows with foveate.data.run.Run",
        )
    raise UsageError(
        f"{run.path}: no attention rows were kept" + (f" of site {site}" if site else ""),
        remedy="capture again with --rows readout or --rows all",
    )


def layer_index(dataset: xr.Dataset, layer: int) -> int:
    """Index of a true layer number; negative numbers count from the last one kept."""
    layers = [int(number) for number in dataset["layer"].values]
    if layer < 0 and -len(layers) <= layer:
        return len(layers) + layer
    if layer in layers:
        return layers.index(layer)
    raise UsageError(f"layer {layer} was not captured", remedy=f"one of {_runs(layers)}, or -1 for the last")


def attention_panel(
    run: Run,
    position: int,
    *,
    site: str | None = None,
    layer: int = -1,
    head: Head = "mean",
    query: int = 0,
    where: Mapping[str, int] | None = None,
) -> tuple[Panel, Rule]:
    """One kept attention row of one sample. ``where`` chooses along frame, window, track or position."""
    name, dataset = site_of(run, site)
    at = layer_index(dataset, layer)
    rows = _grouped(dataset["attention"], where).isel(sample=position, layer=at, query=_query(dataset, query))
    weights = np.asarray(rows.values, np.float64)  # (head, key)
    row = weights.mean(axis=0) if head == "mean" else weights[_head(dataset, head)]
    tokens = run.tokens(name, "key", position)
    sample = run.load_sample(position)
    panel = Panel.attention(
        sample.pixels, run.geometry(position), row, tokens, "attention" + _place(dataset, query)
    )
    what = f"{_query_words(dataset, query)}, {name}, {_layer_words(dataset, at)}, {_head_words(dataset, head)}"
    return panel, Rule(run.model_id, what, count_keys(tokens), _where_words(where))


def attention_tiles(
    run: Run,
    position: int,
    *,
    site: str | None = None,
    query: int = 0,
    where: Mapping[str, int] | None = None,
) -> tuple[Panel, NDArray[np.float64], list[int], list[str], Rule]:
    """One kept row in every layer and head: ``(layer, head, row, column)`` with layers and head names."""
    from foveate.attribution.levels import on_finest

    name, dataset = site_of(run, site)
    rows = _grouped(dataset["attention"], where).isel(sample=position, query=_query(dataset, query))
    tokens = run.tokens(name, "key", position)
    values, _ = on_finest(np.asarray(rows.transpose("layer", "head", "key").values), tokens)
    panel, _ = attention_panel(run, position, site=name, query=query, where=where)
    layers = [int(number) for number in dataset["layer"].values]
    rule = Rule(
        run.model_id,
        f"{_query_words(dataset, query)}, {name}, every kept layer and head",
        count_keys(tokens),
        _where_words(where),
    )
    return panel, values, layers, _heads(dataset), rule


def map_panel(run: Run, position: int, method: str, *, target: int = 0) -> tuple[Panel, Rule]:
    """One stored attribution map. Raises UsageError naming the methods that were run."""
    known = map_methods(run)
    if method not in known:
        raise UsageError(
            f"{run.path}: no attribution {method!r}",
            remedy=f"one of {', '.join(known)}" if known else f"foveate attribute {run.path} --method {method}",
        )
    dataset = run.product(f"attributions/{method}").isel(sample=position)
    dataset = dataset.isel(target=target) if "target" in dataset.dims else dataset
    signed = bool({**dataset.attrs, **dataset["map"].attrs}.get("signed", False))
    title = method if bool(dataset.get("converged", True)) else f"{method} (not converged)"
    values = np.asarray(dataset["map"].values, np.float64)
    if values.shape[-2:] != run.grid.shape:
        raise UsageError(
            f"{run.path}: attribution {method} has {values.shape[-2]} x {values.shape[-1]} cells, "
            f"the run's grid has {run.grid.shape[0]} x {run.grid.shape[1]}",
            remedy="bring maps of other tools in with foveate.attribution.external, which lays them on the grid",
        )
    image, geometry = run.load_sample(position).pixels, run.geometry(position)
    panel = Panel.of_map(image, geometry, values, run.grid, title, signed=signed)
    explained = f"target {dataset['target_label'].item()}" if "target_label" in dataset else ""
    return panel, Rule(run.model_id, f"attribution {method}", values.size, explained)


def map_methods(run: Run) -> list[str]:
    """Attribution methods stored in the run."""
    prefix = "attributions/"
    return [name.removeprefix(prefix) for name in run.products() if name.startswith(prefix)]


def title_of(run: Run, position: int) -> str:
    """Sample id and what the model answered."""
    name = str(run.samples["id"].values[position])
    answers = run.predictions
    if "label" not in answers or not answers.sizes.get("rank", 0):
        return name
    first = answers.isel(sample=position, rank=0)
    label, score = str(first["label"].item()), float(first["score"].item())
    return f"{name}: {label} ({score:.2f})" if label else name


def metric_values(run: Run, name: str, *, layer: int = -1, head: Head = "mean") -> list[Distribution]:
    """A metric product as one value an image: a layer, a head or their mean, the mean over other dims."""
    dataset = run.product(name)
    found = []
    for variable, array in dataset.data_vars.items():
        if "sample" not in array.dims or array.dtype.kind not in "fiu":
            continue
        if "layer" in array.dims:
            array = array.isel(layer=layer_index(dataset, layer))
        if "head" in array.dims and head != "mean":
            array = array.isel(head=_head(dataset, head))
        values = array.mean([dim for dim in array.dims if dim != "sample"], skipna=True).values[run.ok]
        unit = str({**dataset.attrs, **array.attrs}.get("units", ""))
        found.append(Distribution(str(variable), values, "" if unit == "1" else unit, _uniform(dataset)))
    return found


def _uniform(dataset: xr.Dataset) -> dict[str, float]:
    """What the metric would be if the row were uniform over its K keys, where a row alone decides that."""
    from foveate.plugins.manager import plugin_manager

    keys, name = dataset.attrs.get("K", 0), str(dataset.attrs.get("metric", ""))
    specs = {spec.name: spec for spec in plugin_manager().specs("metric")}
    if not keys or keys == "varies" or name not in specs:  # under a mask there is no one uniform row
        return {}
    keys = int(keys)
    metric = specs[name].create()
    if metric.info.needs or metric.info.consumes != ("key",) or metric.info.produces:
        return {}
    return {"uniform": float(np.squeeze(metric.kernel(np.full((1, 1, keys), 1 / keys))))}


def metric_products(run: Run, site: str | None = None) -> list[str]:
    """Names of the metric products, of one site or of all."""
    prefix = f"metrics/{site}/" if site else "metrics/"
    return [name for name in run.products() if name.startswith(prefix)]


def count_keys(tokens: TokenAxis) -> int:
    """K: tokens that the softmax ran over, without padding."""
    return int((tokens.kind != TOKEN_KINDS.index("padding")).sum())


def _grouped(array: xr.DataArray, where: Mapping[str, int] | None) -> xr.DataArray:
    """The array at one place along every group axis. Raises UsageError where a choice is missing."""
    places = dict(where or {})
    missing = [dim for dim in GROUPS if dim in array.dims and dim not in places]
    if missing:
        raise UsageError(
            f"this site also has {', '.join(missing)}: choose one place along each",
            remedy=f"where={{{missing[0]!r}: 0}}",
        )
    return array.isel({dim: places[dim] for dim in GROUPS if dim in array.dims})


def _query(dataset: xr.Dataset, query: int) -> int:
    size = int(dataset.sizes["query"])
    if not -size <= query < size:
        raise UsageError(f"query row {query}: {size} rows were kept", remedy=f"0 to {size - 1}")
    return query


def _heads(dataset: xr.Dataset) -> list[str]:
    if "head" in dataset.coords:
        return [str(name) for name in dataset["head"].values]
    return [str(number) for number in range(int(dataset.sizes["head"]))]


def _head(dataset: xr.Dataset, head: Head) -> int:
    heads = _heads(dataset)
    if str(head) not in heads:
        raise UsageError(f"head {head} was not captured", remedy=f"one of {', '.join(heads)}, or mean")
    return heads.index(str(head))


def _head_words(dataset: xr.Dataset, head: Head) -> str:
    kept = int(dataset.sizes["head"])
    if head != "mean":
        return f"head {head} of {kept}"
    return f"mean of {int(dataset.attrs.get('model_heads', kept))} heads"


def _layer_words(dataset: xr.Dataset, index: int) -> str:
    layers = [int(number) for number in dataset["layer"].values]
    return f"layer {layers[index]} (kept: {_runs(layers)})"


def _query_words(dataset: xr.Dataset, query: int) -> str:
    """What a kept row is: the readout, or the token it belongs to."""
    rule = str(dataset.attrs.get("rows", ""))
    if int(dataset.sizes["query"]) == 1 and rule and not rule.isdigit():
        return f"attention of the readout row ({rule})"
    number = int(dataset["query_index"].values[query]) if "query_index" in dataset.coords else query
    kinds = dataset["query_kind"] if "query_kind" in dataset.coords else None
    kind = f" ({TOKEN_KINDS[int(kinds.values[query])]})" if kinds is not None and kinds.dims == ("query",) else ""
    return f"attention of token {number}{kind}"


def _place(dataset: xr.Dataset, query: int) -> str:
    return "" if int(dataset.sizes["query"]) == 1 else f", row {query}"


def _where_words(where: Mapping[str, int] | None) -> str:
    return ", ".join(f"{dim} {place}" for dim, place in (where or {}).items())


def _runs(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0–2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def options_for(allowed: tuple[str, ...], options: Mapping[str, Any], renderer: str) -> dict[str, Any]:
    """The options given (None left out). Raises UsageError for one that this renderer does not know."""
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in allowed:
            raise UsageError(f"picture {renderer!r} has no option {name!r}", remedy=f"one of {', '.join(allowed)}")
    return given
