"""Maps of one run, read from the store with the rule that made them, ready to be compared with another's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.attribution.levels import on_finest
from foveate.compare.maps import MapRule, MapSet
from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS
from foveate.study.compare_objects import common_objects, of_objects, of_queries, surest_objects

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run

READOUT = "readout"
READS = ("readout", "cls", "pool")
"""Kinds of query that an answer is read from, where a run kept more rows than one."""


def load_pair(
    runs: tuple[Run, Run],
    positions: tuple[Sequence[int], Sequence[int]],
    method: str = READOUT,
    *,
    layer: int = -1,
    sites: tuple[str | None, str | None] = (None, None),
) -> tuple[MapSet, MapSet]:
    """Maps of both runs on the same images; of two detectors, of the object that both found.

    Raises UsageError where they are not there, with the command that makes them.
    """
    if method != READOUT:
        a, b = (stored(*pair, method) for pair in zip(runs, positions, strict=True))
        if of_objects(a) and of_objects(b):
            targets = common_objects(a, b)
            one, other = (attribution_maps(runs[i], positions[i], method, targets[i]) for i in (0, 1))
            return one, other
    one, other = (load_maps(runs[i], positions[i], method, layer=layer, site=sites[i]) for i in (0, 1))
    if method == READOUT:
        answers = [run.predictions.isel(sample=list(at)) for run, at in zip(runs, positions, strict=True)]
        if all(of_queries(one) for one in answers):  # the row of a detector is that of its surest object
            labels = surest_objects(*answers)
            return replace(one, labels=labels[0]), replace(other, labels=labels[1])
    return one, other


def load_maps(
    run: Run, positions: Sequence[int], method: str = READOUT, *, layer: int = -1, site: str | None = None
) -> MapSet:
    """Maps of the images at ``positions``: stored attention rows ("readout") or a stored attribution.

    Raises UsageError where they are not there, with the command that makes them.
    """
    if method == READOUT:
        return readout_maps(run, positions, layer=layer, site=site)
    return attribution_maps(run, positions, method)


def readout_maps(run: Run, positions: Sequence[int], *, layer: int = -1, site: str | None = None) -> MapSet:
    """The attention row that the answer is read from, mean over heads, on the model's patches."""
    name, dataset = _site(run, site)
    at = _layer_index(dataset, layer, run)
    rows = dataset["attention"].isel(
        query=_query(dataset, name, of_queries(run.predictions)), layer=at, sample=list(positions)
    )
    if extra := [str(dim) for dim in rows.dims if dim not in ("sample", "head", "key")]:
        raise UsageError(f"{run.path}, site {name}: comparing maps over {', '.join(extra)} is not defined yet")
    weights = np.asarray(rows.transpose("sample", ..., "key").values, dtype=np.float64)
    weights = weights.mean(axis=1) if weights.ndim == 3 else weights
    tokens = run.tokens(name, "key")
    values, grid = on_finest(weights, tokens)
    special = (tokens.kind != TOKEN_KINDS.index("patch")) & (tokens.kind != TOKEN_KINDS.index("padding"))
    return MapSet(
        model=run.model_id,
        rule=MapRule(READOUT, layer=_layer_words(dataset, at), head="mean of heads"),
        values=values,
        grid=grid,
        geometry=tuple(run.geometry(int(i)) for i in positions),
        labels=("",) * len(positions),
        unplaced=weights[:, special].sum(axis=1),
    )


def _site(run: Run, site: str | None) -> tuple[str, xr.Dataset]:
    """The site by name, or the first whose readout rows over patches were kept."""
    for name in (site,) if site is not None else run.site_ids:
        dataset = run.site(name)
        if "attention" in dataset and TOKEN_KINDS.index("patch") in dataset["key_kind"].values:
            return name, dataset
    raise UsageError(
        f"{run.path}: no attention rows over patches" + (f" at site {site}" if site else ""),
        remedy="capture again with --rows readout",
    )


def _query(dataset: xr.Dataset, name: str, detector: bool) -> int:
    """Which kept row is the readout; of a detector it is no CLS row, even where there is one."""
    if dataset.sizes["query"] == 1:
        return 0
    kinds = [TOKEN_KINDS[int(code)] for code in dataset["query_kind"].values]
    for kind in () if detector else READS:
        if kinds.count(kind) == 1:
            return kinds.index(kind)
    raise UsageError(
        f"site {name}: {len(kinds)} rows were kept and none of them is plainly the readout",
        remedy="capture again with --rows readout, or compare stored maps: foveate attribute RUN "
        "-m rollout, then --method rollout",
    )


def _layer_index(dataset: xr.Dataset, layer: int, run: Run) -> int:
    """Index of a true layer number, or of a place from the model's own end."""
    layers = [int(number) for number in dataset["layer"].values]
    true = layer if layer >= 0 else _depth(dataset) + layer
    if true not in layers:
        raise UsageError(f"{run.path}: layer {layer} was not kept", remedy=f"one of {layers}")
    return layers.index(true)


def _layer_words(dataset: xr.Dataset, at: int) -> str:
    """The place from the model's end, which is what two models of different depth have in common."""
    before = _depth(dataset) - 1 - int(dataset["layer"].values[at])
    return "last layer" if before == 0 else f"{before} layers before the last"


def _depth(dataset: xr.Dataset) -> int:
    modules: dict[str, Any] = dict(dataset.attrs.get("modules", {}))
    kept = int(dataset["layer"].values.max())
    return 1 + max([kept, *(int(number) for number in modules.values())])


def attribution_maps(
    run: Run, positions: Sequence[int], method: str, targets: NDArray[np.int64] | None = None
) -> MapSet:
    """A stored attribution's maps with the answers that they explain.

    ``targets`` chooses one target an image (-1: none); without it every image must have one. A sample whose map
    has not converged, or that was not explained, has NaN. Raises UsageError where the method was not run or a
    sample has several targets.
    """
    dataset = stored(run, positions, method)
    if dataset["map"].dims != ("sample", "target", "y", "x") or (targets is None and dataset.sizes["target"] != 1):
        raise UsageError(
            f"{run.path}: attributions/{method} has dimensions {dict(dataset['map'].sizes)}; "
            "comparing needs one map an image",
            remedy="compare runs that both explain objects, or explain one: foveate attribute --object QUERY",
        )
    chosen = np.zeros(len(positions), np.int64) if targets is None else targets
    rows = np.arange(len(positions)), np.maximum(chosen, 0)
    values = np.asarray(dataset["map"].values[rows], dtype=np.float64)
    values[~np.asarray(dataset["converged"].values[rows], dtype=bool) | (chosen < 0)] = np.nan
    return MapSet(
        model=run.model_id,
        rule=_attribution_rule(method, dataset.attrs),
        values=values,
        grid=run.grid,
        geometry=tuple(run.geometry(int(i)) for i in positions),
        labels=tuple(str(label) for label in dataset["target_label"].values[rows]),
        unplaced=np.full(len(positions), np.nan),
    )


def stored(run: Run, positions: Sequence[int], method: str) -> xr.Dataset:
    """A stored attribution of the images at ``positions``. Raises UsageError where the method was not run."""
    product = f"attributions/{method}"
    if product not in run.products():
        known = [name.removeprefix("attributions/") for name in run.products() if name.startswith("attributions/")]
        raise UsageError(
            f"{run.path}: no attribution {method!r}; there are: {', '.join(known) or 'none'}",
            remedy=f"foveate attribute {run.path} --method {method}, or --method readout for attention",
        )
    return run.product(product).isel(sample=list(positions))


def _attribution_rule(method: str, attrs: dict[str, Any]) -> MapRule:
    return MapRule(
        method,
        target=str(attrs.get("target_kind", "")),
        scale=str(attrs.get("scale", "")),
        signed=bool(attrs.get("signed", False)),
        options=dict(attrs.get("options", {})),
    )
