"""Sampling points of one object of a run: the model is run again where the run keeps rows only."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.attribution.levels import patches_by_level, tokens_on_cells
from foveate.capture.sampling import SamplingPoints, reference_point, sampling_points
from foveate.capture.trace import trace
from foveate.errors import UsageError
from foveate.interfaces import CallKey
from foveate.render.panel import Panel, Rule
from foveate.render.selection import Head, count_keys

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.trace import Trace
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Sample, Site


def sampled(
    run: Run, position: int, query: int, *, site: str | None = None, layer: int = -1, head: Head = "mean"
) -> tuple[SamplingPoints, Panel, Rule]:
    """Points of a query with their reference, the row they make on the finest cells, and the words for both.

    ``layer`` is a true number, negative ones count from the last. Raises UsageError where the model does not
    attend deformably, or has no such site, layer, head or query.
    """
    source, sample = run.open_source(), run.load_sample(position)
    chosen = _site(source, site)
    layers = chosen.layers
    if layer not in layers and not -len(layers) <= layer < 0:
        raise UsageError(f"{chosen.id} has no layer {layer}", remedy=f"one of {', '.join(map(str, layers))}")
    call = CallKey(chosen.id, layer if layer in layers else layers[layer])
    batch = source.encode([sample])
    with torch.no_grad():
        traced = trace(source, batch, sites=[chosen.id])
        points = sampling_points(traced, call, query, head=head)
        reference = reference_point(source, batch, call, query)
    panel, keys = _splat(traced, call, query, head, sample)
    heads = f"mean of {chosen.heads} heads" if head == "mean" else f"head {head} of {chosen.heads}"
    words = f"{chosen.id}, query {query}, layer {call.layer} of {layers[0]}–{layers[-1]}, {heads}"
    return replace(points, reference=reference), panel, Rule(run.model_id, words, keys)


def _site(source: AttentionSource, name: str | None) -> Site:
    """The site by name, or the last deformable one that objects read from."""
    if name is not None:
        for site in source.sites:
            if site.id == name:
                return site
        raise UsageError(f"no site {name!r}", remedy=f"one of {', '.join(site.id for site in source.sites)}")
    deformable = [site for site in source.sites if site.form == "deformable"]
    if not deformable:
        raise UsageError(
            f"{source.card.id} attends densely: it has no sampling points", remedy="use --kind objects"
        )
    return ([site for site in deformable if site.kind == "cross"] or deformable)[-1]


def _splat(traced: Trace, call: CallKey, query: int, head: Head, sample: Sample) -> tuple[Panel, int]:
    """The dense row of a query on the cells of the finest level, levels added up; and its number of keys."""
    tokens = traced.labels(call).key
    rows: NDArray[np.float64] = traced.record(call).rows([query])[0, :, 0].double().cpu().numpy()
    row = rows.mean(axis=0) if head == "mean" else rows[head]
    cells = traced.source.cells(traced.batch)
    keys = count_keys(tokens)
    values, even = (tokens_on_cells(one, tokens, cells) for one in (row, np.full(len(tokens), 1.0 / keys)))
    title = "splat" if len(patches_by_level(tokens)) < 2 else "splat, all levels"
    geometry = traced.batch.geometry[0]
    return Panel(sample.pixels, geometry, values, cells, float(even.mean()), title), keys
