"""Where an intervention acts: modules by site and layer, edges by label, mask and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from foveate.capture.claims import Claims
from foveate.capture.edges import Edges, edge_mask, unlabelled
from foveate.capture.forward import tapped_forward
from foveate.capture.interventions import Here, Intervention, numbers
from foveate.capture.labels import call_labels
from foveate.capture.records import Shape
from foveate.capture.trace import Trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionSource, Batch, CallKey, CallLabels, Site

Labels = CallLabels | Mapping[CallKey, CallLabels]

_OTHER = "choose another site: only attention over keys can be changed"


def chosen_edges(intervention: Intervention, shape: Shape, labels: CallLabels | None, here: Here) -> Tensor:
    """Edges chosen by tokens, in the chosen heads: ``(1, head | 1, query, key)``."""
    query = unlabelled(shape.queries) if labels is None else labels.query
    key = unlabelled(shape.keys) if labels is None else labels.key
    if (len(query), len(key)) != (shape.queries, shape.keys):
        raise CaptureError(
            f"intervene: {here.where} has {shape.queries} queries and {shape.keys} keys, but labels for "
            f"{len(query)} and {len(key)}",
            remedy="pass on= the batch that is run",
        )
    edges = torch.from_numpy(edge_mask(Edges(intervention.query, intervention.key), query, key).copy())[None, None]
    heads = numbers(intervention.heads)
    if heads is None:
        return edges
    wrong = [head for head in heads if not 0 <= head < shape.heads]
    if wrong:
        raise UsageError(f"{intervention.name}: {here.where} has heads 0 to {shape.heads - 1}, not {wrong}")
    chosen = torch.zeros(1, shape.heads, 1, 1, dtype=torch.bool)
    chosen[:, list(heads)] = True
    return edges & chosen


def chosen_by_mask(intervention: Intervention, shape: Shape, here: Here) -> Tensor:
    """The intervention's own mask, checked against the call."""
    mask = torch.as_tensor(intervention.mask)
    try:
        mask.expand(shape)
    except RuntimeError:
        raise UsageError(
            f"{intervention.name}: a mask {tuple(mask.shape)} does not fit {here.where}, which is {tuple(shape)}",
            remedy="give (batch, head, query, key); 1 where an axis is to be repeated",
        ) from None
    return mask


def source_places(
    source: AttentionSource, claims: Claims, intervention: Intervention
) -> dict[str, tuple[str, int]]:
    """Modules of a source that an intervention concerns: path -> (site, layer). Raises UsageError for none."""
    sites = [site for site in source.sites if fnmatchcase(site.id, intervention.site)]
    if not sites:
        raise UsageError(
            f"{intervention.name}: no site {intervention.site!r} in {source.card.id}",
            remedy=f"choose from {', '.join(site.id for site in source.sites)}",
        )
    for site in sites:
        _check_site(intervention, site)
    layers = numbers(intervention.layers)
    known = {layer for site in sites for layer in site.layers}
    _check_layers(intervention, layers, known)
    return {
        path: (site.id, layer)
        for path, (site, layer) in claims.declared.items()
        if site in sites and (layers is None or layer in layers)
    }


def _check_site(intervention: Intervention, site: Site) -> None:
    if site.form != "deformable" and site.normalised_over != "key":
        raise UsageError(
            f"{intervention.name}: {site.id} is {site.form} and normalised over its {site.normalised_over}s",
            remedy=_OTHER,
        )
    wrong = [head for head in numbers(intervention.heads) or () if not 0 <= head < site.heads]
    if wrong:
        raise UsageError(f"{intervention.name}: {site.id} has heads 0 to {site.heads - 1}, not {wrong}")


def module_places(module: nn.Module, intervention: Intervention) -> dict[str, tuple[str, int]]:
    """Modules whose path matches the pattern, each segment by itself, numbered in the model's order."""
    pattern = intervention.site.split(".") if intervention.site else [""]
    paths = [
        path
        for path, _ in module.named_modules()
        if len(parts := path.split(".")) == len(pattern)
        and all(fnmatchcase(part, wanted) for part, wanted in zip(parts, pattern, strict=True))
    ]
    if not paths:
        raise UsageError(
            f"{intervention.name}: no module of {type(module).__name__} matches {intervention.site!r}",
            remedy="give a path of module.named_modules(), with * for one segment: 'blocks.*.attn'",
        )
    layers = numbers(intervention.layers)
    _check_layers(intervention, layers, set(range(len(paths))))
    return {
        path: (intervention.site, layer) for layer, path in enumerate(paths) if layers is None or layer in layers
    }


def _check_layers(intervention: Intervention, layers: tuple[int, ...] | None, known: set[int]) -> None:
    unknown = sorted(set(layers or ()) - known)
    if unknown:
        raise UsageError(
            f"{intervention.name}: {intervention.site} has no layers {unknown}",
            remedy=f"choose from {sorted(known)}",
        )


def intact_labels(
    source: AttentionSource, interventions: Sequence[Intervention], on: Batch | Trace | CallLabels | None
) -> Labels | None:
    """Labels of the intact model's calls at the sites that are named."""
    require_labels(interventions, on)
    if on is None or isinstance(on, CallLabels):
        return on
    shapes: dict[CallKey, Shape] = {}
    if isinstance(on, Trace):
        shapes, batch, outputs = {c: r.shape for c, r in on.records.items()}, on.batch, on.outputs
    else:
        batch = on
        with torch.no_grad():
            outputs, _ = tapped_forward(source, on, lambda c, r: shapes.update({c: r.shape}), needed=())
    return {
        call: call_labels(source, call, batch, outputs, shape)
        for call, shape in shapes.items()
        if any(fnmatchcase(call.site, one.site) for one in interventions)
    }


def require_labels(interventions: Sequence[Intervention], on: object) -> None:
    """Raise UsageError where tokens are chosen by label and nothing gives labels."""
    for intervention in interventions:
        if on is None and intervention.needs_labels:
            raise UsageError(
                f"{intervention.name}: query={intervention.query!r} and key={intervention.key!r} need labels",
                remedy="pass on=batch (or a trace, or CallLabels) to intervene, or choose by position",
            )
