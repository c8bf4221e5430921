"""Analyses of the rows that a run stored: objects and boxes, groups, levels, borders, patterns.

Numbers are means over heads (masses are linear in them), then over the objects of an image: the unit is the image.
Rows are stored in float16 unless the run says otherwise, which moves a mass by about 1e-3 of itself at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.detection.approximation import effective_rank
from foveate.detection.approximation_structure import axial_share, window_share
from foveate.detection.boundary import box_band, enrichment, shifted_boxes
from foveate.detection.levels import LevelMass, level_mass
from foveate.detection.mass import box_shares, mask_shares, region_mass, union_share
from foveate.detection.objects_mass import group_mass, object_exchange
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.study.detection import Finding
from foveate.study.detection_subject import Map, Subject, is_plain

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.interfaces import TokenAxis
    from foveate.render.detection import DetectedObject

BAND = 0.25
"""Width of the band around a box, as a share of the square root of the box's area."""
Array = Any


def objects(subject: Subject) -> Iterator[Finding]:
    """Mass of each object's cross-attention in its own and in other objects' boxes, and between object queries."""
    yield from _cross_boxes(subject)
    name, site = subject.self_site(objects=True)
    layers, nothing = layers_of(site), np.full(3, np.nan)
    table = np.full((len(subject.positions), len(layers), 3), np.nan)
    shares = np.tile(nothing, (len(subject.positions), 1))
    for place, found in enumerate(subject.objects):
        if found:
            queries = subject.row_numbers(site, [one.query for one in found])
            mass, shares[place] = object_exchange(subject.rows(site, place), queries)
            table[place] = mass.mean(1)
        if len(found) < 2:
            table[place, :, 1] = np.nan  # nothing to exchange with
    for number, what in enumerate(("own query", "other objects' queries", "queries without an object")):
        yield from _by_layer(
            f"mass on {what}", "share", name, layers, table[..., number], shares[:, number], "share of queries"
        )


def _cross_boxes(subject: Subject) -> Iterator[Finding]:
    name, site = subject.cross
    layers = layers_of(site)
    own, others, nowhere = (np.full((len(subject.positions), len(layers)), np.nan) for _ in range(3))
    area = np.full((len(subject.positions), 3), np.nan)
    for place, found in with_boxes(subject):
        laid = object_maps(subject, name, site, place, found)
        boxes = boxes_of(found)
        shares = box_shares(laid.grid, boxes)
        free = 1 - union_share(laid.grid, boxes)[None]
        for layer in range(len(layers)):
            mass = region_mass(laid.values[:, layer], np.concatenate([shares, free]))
            own[place, layer], others[place, layer] = _own_and_others(mass[:, :-1])
            nowhere[place, layer] = mass[:, -1].mean()
        region = (np.concatenate([shares, free]) * laid.grid.areas).sum((1, 2)) / laid.grid.areas.sum()
        area[place] = region[:-1].mean(), region[:-1].mean() if len(found) > 1 else np.nan, region[-1]
    named = (
        ("mass in the own box", own),
        ("mass in each other object's box", others),
        ("mass outside every box", nowhere),
    )
    for number, (what, values) in enumerate(named):
        yield from _by_layer(what, "share", name, layers, values, area[:, number], "share of the area")


def _own_and_others(mass: NDArray[np.float64]) -> tuple[float, float]:
    """Means of the diagonal and of all else, ``(object, region)``."""
    off = mass[~np.eye(len(mass), dtype=np.bool_)]
    return float(np.diag(mass).mean()), float(off.mean()) if off.size else float("nan")


def groups(subject: Subject) -> Iterator[Finding]:
    """The encoder's cells by what they show: each object (mask, else box) and the background."""
    name, site = subject.self_site(objects=False)
    layers = layers_of(site)
    wanted = ("object to itself", "object to other objects", "object to background", "background to objects")
    table = np.full((len(subject.positions), len(layers), 4), np.nan)
    shares = np.full((len(subject.positions), 4), np.nan)
    for place in range(len(subject.positions)):
        members = _members(subject, name, place)
        if members is None:
            continue
        rows = subject.rows(site, place).mean(1)
        padding = np.ones(rows.shape[-1], np.bool_)
        padding[subject.visible(name, "key", place)] = False
        rows[..., padding] = np.nan
        mass, share = group_mass(rows, members, members)
        table[place] = np.stack([_summary(one) for one in mass])
        shares[place] = _summary(np.broadcast_to(share, (len(share), len(share))))
    for number, what in enumerate(wanted):
        yield from _by_layer(
            f"mass from {what}", "share", name, layers, table[..., number], shares[:, number], "share of cells"
        )


def _members(subject: Subject, name: str, place: int) -> NDArray[np.float64] | None:
    """Membership of every key in each object and, last, in the background: ``(group, key)``; 0 for padding."""
    position, truth = subject.positions[place], subject.true_objects(place)
    tokens, geometry = subject.run.tokens(name, "key", position), subject.run.geometry(position)
    boxes = truth.boxes if truth is not None else boxes_of(subject.objects[place])
    masks = None if truth is None else truth.masks
    if not len(boxes) or not np.isfinite(boxes).all():
        return None
    shares = np.zeros((len(boxes) + 1, len(tokens)))
    for key in np.intersect1d(tokens.where("patch"), subject.visible(name, "key", place)):
        cell = geometry.grid_to_original(_cell(tokens, int(key)))
        part = box_shares(cell, boxes) if masks is None else mask_shares(cell, masks)
        shares[:-1, key] = part[:, 0, 0]
        shares[-1, key] = max(0.0, 1 - part.sum())
    return shares


def _cell(tokens: TokenAxis, key: int) -> CellGrid:
    """One token's own cell, in input pixels: levels of a pyramid have cells of their own."""
    around = np.array([-0.5, 0.5])
    return CellGrid(tokens.y[key] + around * tokens.height[key], tokens.x[key] + around * tokens.width[key])


def _summary(mass: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of ``(group, group)`` with the background last: to itself, to others together, to background, back."""
    things = mass[:-1, :-1]
    own, others = np.diag(things), things.sum(1) - np.diag(things)
    among = _mean(others) if len(things) > 1 else np.nan
    return np.array([_mean(own), among, _mean(mass[:-1, -1]), mass[-1, :-1].sum()])


def levels(subject: Subject) -> Iterator[Finding]:
    """Mass that object queries, and cells of each level, put on each level of a pyramid."""
    made = False
    for name in subject.run.site_ids:
        site = subject.run.site(name)
        if not is_plain(site) or np.unique(site["key_level"].values).clip(0).max(initial=0) < 1:
            continue
        made = True
        masses = [_level_mass(subject, name, site, place) for place in range(len(subject.positions))]
        first = masses[0]
        table = np.stack([one.mass for one in masses])
        for i, query in enumerate(first.query_levels):
            who = "objects" if query < 0 else f"level {query}"
            for j, key in enumerate(first.key_levels):
                what = f"mass of {who} on level {key} ({first.share[j]:.0%} of cells)"
                yield from _by_layer(
                    what, "share", name, layers_of(site), table[:, :, i, j], first.equal, "equal levels"
                )
    if not made:
        raise UsageError(f"{subject.run.path}: no site with several pyramid levels was kept")


def _level_mass(subject: Subject, name: str, site: xr.Dataset, place: int) -> LevelMass:
    rows, query, key = subject.seen(name, site, place)
    return level_mass(rows.mean(1), query, key)


def borders(subject: Subject) -> Iterator[Finding]:
    """Mass in a band around each object's own box, over its share of the area; null: the same box elsewhere."""
    name, site = subject.cross
    layers = layers_of(site)
    values, null = (np.full((len(subject.positions), len(layers)), np.nan) for _ in range(2))
    for place, found in with_boxes(subject):
        laid = object_maps(subject, name, site, place, found)
        pairs = np.array(
            [_band_pairs(laid, number, one, subject.size(place), subject.seed) for number, one in enumerate(found)]
        )
        values[place], null[place] = _mean_over_objects(pairs)
    what = f"enrichment of a band of {BAND:g} sqrt(area) around the box"
    for number, layer in enumerate(layers):
        yield Finding(what, "ratio", values[:, number], null[:, number], "shifted boxes", name, layer)


def _band_pairs(
    laid: Map, number: int, one: DetectedObject, size: tuple[float, float], seed: int
) -> NDArray[np.float64]:
    """(own, mean of shifted) by layer, ``(2, layer)``; bands are cut once for all layers."""
    assert one.box is not None
    top, left, bottom, right = one.box
    width = BAND * max(1.0, (bottom - top) * (right - left)) ** 0.5
    bands = [box_band(laid.grid, box, width) for box in [one.box, *shifted_boxes(one.box, size, seed=seed)]]
    table = np.array(
        [[enrichment(layer, band, laid.grid.areas) for layer in laid.values[number]] for band in bands]
    )
    return np.stack([table[0], [_mean(column) for column in table[1:].T]])


def patterns(subject: Subject) -> Iterator[Finding]:
    """How local the encoder is, and the effective rank of its matrices and of the decoder's."""
    name, site = subject.self_site(objects=False)
    layers, count = layers_of(site), len(subject.positions)
    shares: dict[str, tuple[Array, Array]] = {}
    for place in range(count):
        rows, query, key = subject.seen(name, site, place)
        found = {
            f"mass in a window of {2 * r + 1} x {2 * r + 1} cells": window_share(rows, query, key, r)
            for r in (1, 2)
        }
        found["mass in the own row and column"] = axial_share(rows, query, key)
        for what, share in found.items():
            shares.setdefault(what, (np.full((count, len(layers)), np.nan), np.full(count, np.nan)))
            shares[what][0][place], shares[what][1][place] = share.mass.mean(1), share.uniform
    for what, (values, uniform) in shares.items():
        yield from _by_layer(what, "share", name, layers, values, uniform, "uniform attention")
    for which, data in {name: site, subject.cross[0]: subject.cross[1]}.items():
        ranks = np.stack(
            [effective_rank(np.nan_to_num(subject.seen(which, data, p)[0])).mean(1) for p in range(count)]
        )
        most = min(data.sizes["query"], data.sizes["key"])
        yield from _by_layer(f"effective rank (largest {most})", "rank", which, layers_of(data), ranks)


def layers(subject: Subject) -> Iterator[Finding]:
    """Metrics of foveate by site and layer, beside a uniform row: all of them are in ``foveate metrics``."""
    from foveate.metrics.labelled import measure
    from foveate.study.measure import allowed_keys, load_metrics

    chosen = load_metrics(["attention_distance_relative", "top10_mass", "head_diversity"])[0]
    for name in subject.run.site_ids:
        site = subject.run.site(name)
        if not is_plain(site):
            continue
        query, key = (subject.run.tokens(name, axis, subject.positions[0]) for axis in ("query", "key"))
        everything = bool(len(query) == site.sizes.get("token"))
        for metric in chosen:
            if (
                metric.info.needs
                and {"key_positions", "query_positions"} & set(metric.info.needs)
                and (np.isnan(query.y).any() or not np.isfinite(key.y).any())
            ):
                continue  # no distance between words and places
            options: dict[str, Any] = {"query": query, "key": key, "keys": "all", "all_rows": everything}
            options["allowed"] = allowed_keys(site, "query")
            rows = site["attention"].isel(sample=subject.positions).load().astype(np.float32)
            values = measure(rows, [metric], **options)[metric.info.name]
            flat = measure(rows[:1] * 0 + np.float32(1 / len(key)), [metric], **options)[metric.info.name]
            table, uniform = (_image_layer(one) for one in (values, flat))
            yield from _by_layer(
                metric.info.name,
                metric.info.unit,
                name,
                layers_of(site),
                table,
                float(uniform[0, 0]),
                "uniform rows",
            )


def _image_layer(values: xr.DataArray) -> NDArray[np.float64]:
    others = [dim for dim in values.dims if dim not in ("sample", "layer")]
    return np.asarray(values.mean(others).transpose("sample", "layer").values, np.float64)


# --------------------------------------------------------------------------------- shared


def with_boxes(subject: Subject) -> Iterator[tuple[int, list[DetectedObject]]]:
    """Images with objects that have boxes."""
    for place, found in enumerate(subject.objects):
        boxed = [one for one in found if one.box is not None and np.isfinite(one.box).all()]
        if boxed:
            yield place, boxed


def boxes_of(found: Sequence[DetectedObject]) -> NDArray[np.float64]:
    """Boxes ``(object, 4)`` in original pixels; NaN where an object has none."""
    return np.array([one.box or (np.nan,) * 4 for one in found], np.float64).reshape(-1, 4)


def object_maps(subject: Subject, name: str, site: xr.Dataset, place: int, found: list[DetectedObject]) -> Map:
    """Each object's row as masses on the picture, mean over heads: ``(object, layer, row, column)``."""
    queries = subject.row_numbers(site, [one.query for one in found])
    rows = subject.rows(site, place).mean(1)[:, queries].swapaxes(0, 1)
    return subject.lay(name, place, rows)


def layers_of(site: xr.Dataset) -> list[int]:
    """True numbers of the layers that were kept."""
    return [int(layer) for layer in site["layer"].values]


def _by_layer(
    quantity: str,
    unit: str,
    site: str,
    numbers: list[int],
    table: NDArray[np.float64],
    baseline: NDArray[np.float64] | float = float("nan"),
    baseline_is: str = "",
) -> Iterator[Finding]:
    """A finding a layer from ``(image, layer)``."""
    for column, layer in enumerate(numbers):
        yield Finding(quantity, unit, table[:, column], baseline, baseline_is, site, layer)


def _mean_over_objects(pairs: NDArray[np.float64]) -> NDArray[np.float64]:
    """``(object, 2, layer)`` to ``(2, layer)``; objects without a number do not count."""
    return np.array([[_mean(column) for column in row.T] for row in pairs.swapaxes(0, 1)])


def _mean(values: Any) -> float:
    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    return float(known.mean()) if known.size else float("nan")
