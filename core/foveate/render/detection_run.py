"""From a run of a detector to its objects and their maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.attribution.levels import patches_by_level, tokens_on_cells
from foveate.detection.mass import box_shares, region_mass, union_share
from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS
from foveate.render.detection import CrossTable, DetectedObject
from foveate.render.panel import Panel, Rule
from foveate.render.selection import Head, count_keys, layer_index

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.geometry import Geometry
    from foveate.interfaces import TokenAxis

EDGES = ("top", "left", "bottom", "right")
LAYERS = "layer_answers"
"""The product in which ``foveate analyse --analysis readouts`` keeps every layer's answers."""
THRESHOLD = 0.5
"""Score above which an answer is an object, unless the model was opened with another ``threshold``."""


def objects_of(run: Run, position: int, *, at_most: int | None = None) -> list[DetectedObject]:
    """Objects of one sample above the threshold of the opened model, best first.

    Raises UsageError where the model answers for no objects, or none is above the threshold.
    """
    answers, threshold = answers_of(run, position), threshold_of(run)
    found = [one for one in answers if one.score > threshold][:at_most]
    if not found:
        best = f"best score {answers[0].score:.2f}" if answers else "no answer was kept"
        raise UsageError(
            f"sample {run.samples['id'].values[position]!r}: no object above the threshold {threshold:g} ({best})",
            remedy="choose another --sample, or capture again with --option threshold=0.1",
        )
    return found


def answers_of(run: Run, position: int) -> list[DetectedObject]:
    """Every stored answer of one sample, best first. Raises UsageError where answers belong to no queries."""
    if "object" not in run.predictions:
        raise UsageError(
            f"{run.path}: the answers of {run.model_id} belong to no object queries",
            remedy="capture a detector, or use --kind triptych",
        )
    row = run.predictions.isel(sample=position)
    return [_object(row, rank) for rank, query in enumerate(row["object"].values) if query >= 0]


def first_with_objects(run: Run) -> int:
    """Position of the first captured sample with an object above the threshold, else of the first captured one."""
    if not run.ok.size:
        raise UsageError(f"{run.path}: no sample was captured", remedy="foveate validate says what failed")
    best = run.predictions["confidence"].values[run.ok]
    return int(run.ok[int((best > threshold_of(run)).argmax())])


def threshold_of(run: Run) -> float:
    """The score above which the opened model's answers are objects."""
    return float(dict(run.attrs.get("open_options", {})).get("threshold", THRESHOLD))


def object_panels(
    run: Run,
    position: int,
    found: list[DetectedObject],
    *,
    site: str | None = None,
    layer: int = -1,
    head: Head = "mean",
) -> tuple[list[Panel], Rule]:
    """Each object's own attention row over the picture. Raises UsageError where rows of queries were not kept."""
    name, dataset = reading_site(run, site)
    at = layer_index(dataset, layer)
    rows = object_rows(dataset, position, found)[:, at]
    heads = [str(number) for number in dataset["head"].values]
    if head != "mean" and str(head) not in heads:
        raise UsageError(f"head {head} was not captured", remedy=f"one of {', '.join(heads)}, or mean")
    rows = rows.mean(axis=1) if head == "mean" else rows[:, heads.index(str(head))]
    tokens = run.tokens(name, "key", position)
    image, geometry = run.load_sample(position).pixels, run.geometry(position)
    panels = [_panel(run, image, geometry, row, tokens) for row in rows]
    layers = [int(number) for number in dataset["layer"].values]
    words = f"layer {layers[at]} of {layers[0]}–{layers[-1]}, {_heads(dataset, head)}"
    return panels, Rule(run.model_id, f"{name} row of each object's query, {words}", count_keys(tokens))


def layer_strips(
    run: Run, position: int, found: list[DetectedObject], *, site: str | None = None, head: Head = "mean"
) -> tuple[list[list[Panel]], list[int], Rule]:
    """Each object's attention row in every kept layer: panels ``(object, layer)`` and the layers' true numbers."""
    _, dataset = reading_site(run, site)
    layers = [int(number) for number in dataset["layer"].values]
    columns = []
    for layer in layers:
        panels, rule = object_panels(run, position, found, site=site, layer=layer, head=head)
        columns.append(panels)
    what = rule.what.replace(f"layer {layers[-1]} of", "layers")
    return [list(strip) for strip in zip(*columns, strict=True)], layers, Rule(rule.model, what, rule.keys)


def layer_answers(
    run: Run, position: int, found: list[DetectedObject], layers: list[int]
) -> list[list[DetectedObject]] | None:
    """What each object's query said at each layer, ``(object, layer)``; None where no analysis kept it."""
    if LAYERS not in run.products():
        return None
    table = run.product(LAYERS)
    numbers = [int(number) for number in table["layer"].values]
    one = table.isel(sample=position)
    if not set(layers) <= set(numbers) or not np.isfinite(one["score"].values).all():
        return None
    names = list(table.attrs["labels"])
    one = one.isel(layer=[numbers.index(layer) for layer in layers])
    boxes, scores, classes = (one[name].values for name in ("box", "score", "class_index"))
    return [
        [
            DetectedObject(
                names[int(classes[at, shown.query])] if names else str(int(classes[at, shown.query])),
                float(scores[at, shown.query]),
                shown.query,
                tuple(float(edge) for edge in boxes[at, shown.query]),  # type: ignore[arg-type]  # four edges
            )
            for at in range(len(layers))
        ]
        for shown in found
    ]


def cross_table(panels: list[Panel], found: list[DetectedObject]) -> CrossTable:
    """How much of each object's map lies in whose box, of what lies in the picture.

    Raises UsageError where no object has a box.
    """
    if not any(one.box is not None and np.isfinite(one.box).all() for one in found):
        raise UsageError(
            "the answers are segments without boxes, and a run keeps no masks: there is no region to sum over",
            remedy="use --kind objects",
        )
    boxes = np.array([one.box or (np.nan,) * 4 for one in found], np.float64)
    cut = [panel.visible_values for panel in panels]
    cells = cut[0][1]
    maps = np.stack([values for values, _ in cut])
    shares = box_shares(cells, boxes)
    regions = np.concatenate([shares, 1 - union_share(cells, boxes)[None]])
    chance = np.asarray((regions * cells.areas).sum((1, 2)) / cells.areas.sum())
    return CrossTable(region_mass(maps, regions), chance)


def cross_site(run: Run, site: str | None = None) -> tuple[str, xr.Dataset]:
    """The site whose queries are objects and whose keys lie in the picture, with kept rows: the last by default.

    Raises UsageError where there is none.
    """
    for name in [site] if site is not None else reversed(run.site_ids):
        dataset = run.site(name)
        keys = dataset["key_kind"].values
        if "attention" in dataset and dataset.attrs.get("kind") == "cross" and TOKEN_KINDS.index("patch") in keys:
            return name, dataset
    raise UsageError(
        f"{run.path}: no cross-attention of object queries to the picture was kept{f' at {site}' if site else ''}",
        remedy="capture again with --rows all (models whose objects read the picture in self-attention have none)",
    )


def reading_site(run: Run, site: str | None = None) -> tuple[str, xr.Dataset]:
    """Where objects read the picture, with kept rows: cross-attention, else self-attention that holds both.

    Encoder-only detectors read the picture where their detection tokens (YOLOS, EoMT), or the patches that are the
    objects (OWLv2), attend beside it. Raises UsageError where there is none.
    """
    try:
        return cross_site(run, site)
    except UsageError:
        patch, found = TOKEN_KINDS.index("patch"), []
        for name in [site] if site is not None else reversed(run.site_ids):
            dataset = run.site(name)
            if "attention" in dataset and patch in dataset["key_kind"].values and _is_whole(dataset):
                found.append((name, dataset))
        found.sort(key=lambda one: TOKEN_KINDS.index("object") not in one[1]["query_kind"].values)  # stable
        if not found:
            raise
        return found[0]


def _is_whole(dataset: xr.Dataset) -> bool:
    """Self-attention with every row kept, so that a row's place says whose it is."""
    whole = bool(dataset.sizes["query"] == dataset.sizes["key"])
    return dataset.attrs.get("kind") == "self" and whole and "window" not in dataset["attention"].dims


def _query_places(dataset: xr.Dataset) -> list[int]:
    """The object query of each row kept, -1 for others: of self-attention, the detection tokens or patches."""
    if not _is_whole(dataset):
        return [int(query) for query in dataset["query_index"].values]
    kinds, places = dataset["query_kind"].values, np.full(dataset.sizes["query"], -1)
    own = np.flatnonzero(kinds == TOKEN_KINDS.index("object"))
    own = own if own.size else np.flatnonzero(kinds == TOKEN_KINDS.index("patch"))
    places[own] = np.arange(own.size)
    return [int(place) for place in places]


def object_rows(dataset: xr.Dataset, position: int, found: list[DetectedObject]) -> NDArray[np.float64]:
    """Attention rows of the objects, ``(object, layer, head, key)``. Raises UsageError where one is missing."""
    kept = _query_places(dataset)
    missing = [one.query for one in found if one.query not in kept]
    if missing:
        raise UsageError(
            f"the attention rows of object queries {', '.join(map(str, missing))} were not kept",
            remedy="capture again with --rows all",
        )
    rows = dataset["attention"].isel(sample=position, query=[kept.index(one.query) for one in found])
    return np.asarray(rows.transpose("query", "layer", "head", "key").values, np.float64)


def _panel(
    run: Run, image: NDArray[np.uint8], geometry: Geometry, row: NDArray[np.float64], tokens: TokenAxis
) -> Panel:
    """A row over one feature map on its cells, or over a pyramid with its levels added up on the finest cells."""
    if len(patches_by_level(tokens)) < 2:
        return Panel.attention(image, geometry, row, tokens, "attention")
    even = np.full(len(tokens), 1.0 / count_keys(tokens))
    values, uniform = (tokens_on_cells(one, tokens, run.grid) for one in (row, even))
    return Panel(image, geometry, values, run.grid, float(uniform.mean()), "attention")


def _object(row: xr.Dataset, rank: int) -> DetectedObject:
    box = tuple(float(row[f"box_{edge}"].values[rank]) for edge in EDGES) if "box_top" in row else None
    return DetectedObject(
        str(row["label"].values[rank]),
        float(row["score"].values[rank]),
        int(row["object"].values[rank]),
        box,  # type: ignore[arg-type]  # four edges
    )


def _heads(dataset: xr.Dataset, head: Head) -> str:
    kept = int(dataset.sizes["head"])
    if head == "mean":
        return f"mean of {int(dataset.attrs.get('model_heads', kept))} heads"
    return f"head {head} of {kept}"
