"""What an opened model is, in plain data: found by running it once on a grey picture or clip, not by its name."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from foveate.interfaces import TOKEN_KINDS, CallKey, Sample

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource, Batch, Outputs, Site, TokenAxis

PROBE = (192, 256)
"""Height and width of the grey picture: not square, so that cropping and stretching can be told apart."""
FRAMES = 4
"""Frames of the grey clip."""


def inspect_source(source: AttentionSource) -> dict[str, Any]:
    """Card, facts, grid, targets, and every site with its layers, heads, tokens and readout rule.

    Runs one forward without gradients. Raises what the source's own methods raise.
    """
    batch = source.encode([probe(source.media)])
    outputs = source.forward(batch)
    readouts = source.readout(batch, outputs)
    parameters = sum(parameter.numel() for parameter in source.module.parameters())
    return {
        "card": asdict(source.card),
        "facts": dict(source.facts()),
        "parameters": parameters,
        "input": list(batch.inputs.shape[1:]),
        "media": source.media,
        "grid": _grid(source, batch),
        "frame_cells": max(source.frame_cells(batch), default=-1) + 1,
        "visible": _visible(batch),
        "targets": list(source.targets),
        "sites": [_site(source, site, batch, outputs, readouts) for site in source.sites],
        "ignored": dict(source.ignored),
    }


def probe(media: str = "image") -> Sample:
    """The grey picture, with a caption for models that read text; or the grey clip."""
    import numpy as np

    shape = (FRAMES, *PROBE, 3) if media == "clip" else (*PROBE, 3)
    pixels = np.full(shape, 127, np.uint8)
    return Sample(id="probe", pixels=pixels, columns={"text": "a grey picture"})


def _site(source: AttentionSource, site: Site, batch: Batch, outputs: Outputs, readouts: Any) -> dict[str, Any]:
    labels = source.label(CallKey(site.id, site.layers[0]), batch, outputs)
    return {
        "id": site.id,
        "kind": site.kind,
        "form": site.form,
        "layers": list(site.layers),
        "heads": site.heads,
        "group": {name: size for name, size in labels.leading if name != "sample"},
        "query": _tokens(labels.query),
        "key": _tokens(labels.key),
        "readout": readouts[site.id].rule if site.id in readouts else None,
        "modules": list(site.modules),
        "summary": site.summary,
    }


def _tokens(axis: TokenAxis) -> dict[str, int]:
    """How many tokens of each kind, in the order in which they first appear."""
    return dict(Counter(TOKEN_KINDS[int(code)] for code in axis.kind))


def _grid(source: AttentionSource, batch: Batch) -> list[int] | None:
    """Cells of the input, or None for a source whose input is no picture."""
    from foveate.errors import UsageError

    try:
        return list(source.cells(batch).shape)
    except UsageError:
        return None


def _visible(batch: Batch) -> float:
    """Share of the probe's area that reaches the model."""
    top, left, bottom, right = batch.geometry[0].visible
    height, width = batch.geometry[0].original_height, batch.geometry[0].original_width
    return max(0.0, bottom - top) * max(0.0, right - left) / (height * width)
