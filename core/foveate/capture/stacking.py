"""From the arrays of single calls, ``(batch, ...)``, to one array a site, ``(sample, *group, layer, ...)``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from foveate.capture.labels import split_leading
from foveate.errors import CaptureError
from foveate.interfaces import CallKey, CallLabels, Site


def stack_calls(arrays: Mapping[CallKey, Tensor], labels: Mapping[CallKey, CallLabels], site: Site) -> Tensor:
    """All calls of a site, layers ascending.

    A call's own batch axes (windows, frames) become axes; where a layer runs several times in a forward (a
    tracker, once a frame), its calls lie along the one group axis that they lack. Raises CaptureError where the
    site's declared group does not fit what ran.
    """
    layers = sorted({call.layer for call in arrays})
    stacks = [_layer({c: a for c, a in arrays.items() if c.layer == layer}, labels, site) for layer in layers]
    return torch.stack(stacks, 1 + len(site.group))


def _layer(arrays: Mapping[CallKey, Tensor], labels: Mapping[CallKey, CallLabels], site: Site) -> Tensor:
    """One layer's calls, ``(sample, *group, ...)``."""
    calls = sorted(arrays)
    inside = [name for name, _ in labels[calls[0]].leading]
    across = [name for name in site.group if name not in inside]
    known = {"sample", *site.group}.issuperset(inside)
    if not known or len(across) > 1 or (not across and len(calls) > 1):
        raise CaptureError(
            f"{site.id} layer {calls[0].layer}: ran {len(calls)} times with leading axes {inside}, "
            f"but the site declares the group {site.group}",
            remedy="declare in Site.group each axis besides sample, one of them for repeated calls",
        )
    order = ["sample", *(name for name in site.group if name in inside)]
    parts = [split_leading(arrays[call], labels[call], order) for call in calls]
    return _side_by_side(parts, 1 + site.group.index(across[0])) if across else parts[0]


def _side_by_side(parts: list[Tensor], axis: int) -> Tensor:
    """Repeated calls along a new axis; they must be of one size."""
    sizes = {tuple(part.shape) for part in parts}
    if len(sizes) > 1:
        raise CaptureError(
            f"capture: repeated calls differ in size: {sorted(sizes)}", remedy="declare one site for each size"
        )
    return torch.stack(parts, axis)
