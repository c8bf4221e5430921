"""From the arrays of single calls, ``(batch, ...)``, to one array a site, ``(sample, *group, layer, ...)``.

A call may hold all of a batch, or a block of frames, or one frame with the tokens that exist in it: its labels say
where it lies. What no call holds is left at the array's value for "not there".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.capture.labels import positions, split_leading
from foveate.errors import CaptureError
from foveate.interfaces import CallKey, CallLabels, Site

ABSENT = {"attention": 0.0, "head_mean": 0.0, "allowed": False, "topk_index": -1}
"""What a row or key that does not exist has at a site with ragged axes; NaN where not listed."""

Cells = dict[CallKey, list[list[int]]]
"""Of each call, its positions along sample and along every group axis."""


def absent(name: str, dtype: torch.dtype, *, ragged: bool) -> float:
    """The value for "not there" of an array: see :data:`ABSENT`; at other sites what is lacking is never a 0."""
    if ragged and name in ABSENT:
        return ABSENT[name]
    if dtype.is_floating_point:
        return float("nan")
    return False if dtype == torch.bool else -1


def stack_calls(
    arrays: Mapping[CallKey, Tensor],
    labels: Mapping[CallKey, CallLabels],
    site: Site,
    *,
    fill: float = float("nan"),
    ranked: bool = False,
) -> Tensor:
    """All calls of a site, layers ascending; ``fill`` where no call lies.

    A call's own batch axes (windows, frames) become axes; where a layer runs several times in a forward (a
    tracker, once a frame) and its labels do not say where each run lies, its calls lie in order along the one
    group axis that they lack. ``ranked`` arrays may differ in the length of their last axis. Raises CaptureError
    where the site's declared group does not fit what ran.
    """
    layers = sorted({call.layer for call in arrays})
    cells = _cells(sorted(arrays), labels, site)
    rest = _common_shape([tuple(array.shape[1:]) for array in arrays.values()], ranked=ranked)
    first = next(iter(arrays.values()))
    lengths = _lengths(cells, labels, site)
    whole = first.new_full((*lengths, len(layers), *rest), fill)
    taken = torch.zeros(*lengths, len(layers), dtype=torch.bool)
    for call, where in cells.items():
        axes: list[Tensor] = [torch.tensor(part, dtype=torch.long) for part in where]
        index: tuple[Any, ...] = (*torch.meshgrid(*axes, indexing="ij"), layers.index(call.layer))
        if bool(taken[index].any()):
            raise _misfit(call, arrays, labels, site)
        taken[index] = True
        own = split_leading(arrays[call], labels[call], _inside(labels[call], site))
        # Axes that the call does not have are one entry long, so the cells' shape fits.
        own = own.reshape(*(len(part) for part in where), *arrays[call].shape[1:])
        whole[(*index, ..., slice(own.shape[-1])) if ranked else index] = own
    return whole


def _cells(calls: Sequence[CallKey], labels: Mapping[CallKey, CallLabels], site: Site) -> Cells:
    """Where every call lies. Raises CaptureError where the site's group does not tell."""
    order = ("sample", *site.group)
    cells: Cells = {}
    for call in calls:
        known = {name for name, _ in labels[call].leading} | set(labels[call].at)
        unknown = [name for name in order if name not in known]
        if not known.issubset(order) or len(unknown) > 1:
            raise _misfit(call, calls, labels, site)
        cells[call] = [
            [_ordinal(call, calls)] if name in unknown else positions(labels[call], name) for name in order
        ]
    return cells


def _ordinal(call: CallKey, calls: Sequence[CallKey]) -> int:
    """How many runs of its layer came before a call."""
    return sum(other.layer == call.layer and other < call for other in calls)


def _inside(labels: CallLabels, site: Site) -> list[str]:
    names = [name for name, _ in labels.leading]
    return [name for name in ("sample", *site.group) if name in names]


def _lengths(cells: Cells, labels: Mapping[CallKey, CallLabels], site: Site) -> list[int]:
    """Size of sample and of every group axis: as said, or as many as there are positions."""
    lengths = []
    for axis, name in enumerate(("sample", *site.group)):
        said = [said.at[name].size for said in labels.values() if name in said.at]
        lengths.append(max([*said, *(max(where[axis]) + 1 for where in cells.values() if where[axis])], default=0))
    return lengths


def _common_shape(shapes: Sequence[tuple[int, ...]], *, ranked: bool) -> tuple[int, ...]:
    """The one shape of all calls besides their batch; the largest last axis where ``ranked``."""
    alike = {shape[:-1] if ranked else shape for shape in shapes}
    if len(alike) > 1:
        raise CaptureError(
            f"capture: repeated calls differ in size: {sorted(set(shapes))}",
            remedy="declare one site for each size, or Site.ragged with places where tokens come and go",
        )
    return max(shapes)


def _misfit(
    call: CallKey,
    calls: Sequence[CallKey] | Mapping[CallKey, Tensor],
    labels: Mapping[CallKey, CallLabels],
    site: Site,
) -> CaptureError:
    inside = [name for name, _ in labels[call].leading]
    count = sum(other.layer == call.layer for other in calls)
    return CaptureError(
        f"{site.id} layer {call.layer}: ran {count} times with leading axes {inside}, "
        f"but the site declares the group {site.group}",
        remedy="declare in Site.group each axis besides sample, one of them for repeated calls, or say in "
        "CallLabels.at where each call lies",
    )
