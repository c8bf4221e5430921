"""What was captured of a wrapped model, as labelled arrays.

The same records, checks and reductions as everywhere; only the matching differs: calls are known by module path
and number, as the example showed them, and not by a plugin's declaration.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from foveate.capture.certificate import Certificate, check_record
from foveate.capture.records import Check, Record, Shape
from foveate.capture.reductions import REDUCTIONS, Full, check_reductions, reduce_rows
from foveate.capture.wrap_group import Call, FoundSite
from foveate.capture.wrap_observe import refuse_hidden
from foveate.capture.wrap_samples import ratio
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey, TokenAxis

if TYPE_CHECKING:
    import xarray as xr

Rows = Literal["all"] | Sequence[int] | None
LARGEST = 4 << 30
"""Bytes of full matrices above which ``rows="all"`` is refused; fewer rows or reductions stay linear."""

DIMS = {
    "attention": ("layer", "head", "query", "key"),
    "entropy": ("layer", "head", "token"),
    "received": ("layer", "head", "key"),
    "head_mean": ("layer", "token", "key"),
    "topk_value": ("layer", "head", "token", "rank"),
    "topk_index": ("layer", "head", "token", "rank"),
}
"""Dims after (sample, *group); ``query`` are the rows kept, ``token`` all queries."""


@dataclass(frozen=True, eq=False)
class WrappedCapture:
    """One captured forward: the model's outputs, one dataset a site, and the proof that rows are exact.

    ``captured["blocks.attn"]`` is an ``xarray.Dataset`` with any of ``attention`` (sample, *group, layer, head,
    query, key), ``entropy`` in nats, ``received``, ``head_mean``, ``topk_value`` and ``topk_index``.
    """

    outputs: Any
    datasets: Mapping[str, xr.Dataset]
    certificate: Certificate

    def __getitem__(self, site: str) -> xr.Dataset:
        if site not in self.datasets:
            raise UsageError(f"capture: no site {site!r}", remedy=f"choose from {', '.join(self.datasets)}")
        return self.datasets[site]

    @property
    def tree(self) -> xr.DataTree:
        """All sites below one root, whose attributes hold the certificate."""
        import xarray as xr

        tree = xr.DataTree.from_dict({f"/sites/{name}": dataset for name, dataset in self.datasets.items()})
        tree.attrs.update(self.certificate.summary())
        return tree


@dataclass(eq=False)
class Collector:
    """Reduces records as they come; ``rows`` and ``wanted`` are by site."""

    sites: Mapping[str, FoundSite]
    wanted: Mapping[str, Rows]
    reductions: tuple[str, ...] = ()
    topk: int = 16
    checks: dict[CallKey, Check] = field(default_factory=dict)
    shapes: dict[CallKey, Shape] = field(default_factory=dict)
    arrays: dict[CallKey, dict[str, Tensor]] = field(default_factory=dict)
    bytes: int = 0

    def __post_init__(self) -> None:
        check_reductions(self.reductions)
        self._matcher = Matcher(self.sites)

    def take(self, record: Record) -> None:
        """Check one call and keep what is wanted of it."""
        refuse_hidden(record)
        call = self._matcher.take(record)
        self.checks[call] = check_record(record)
        if call.site not in self.wanted:
            return
        self.shapes[call] = record.shape
        rows = self.wanted[call.site]
        folds = [REDUCTIONS[name] for name in self.reductions]
        if rows == "all":
            self._afford(record.shape)
            folds.insert(0, Full)
        found = reduce_rows(record, folds, topk=self.topk)
        if rows is not None and rows != "all":
            found["attention"] = record.rows(self._positions(call, rows, record.shape))
        self.arrays[call] = {name: array.cpu() for name, array in found.items()}

    def finish(self, samples: int) -> dict[str, xr.Dataset]:
        """Datasets by site. Raises CaptureError where a call of the example did not come."""
        self._matcher.require(self.wanted)
        return {name: self._dataset(self.sites[name], samples) for name in self.sites if name in self.wanted}

    def _afford(self, shape: Shape) -> None:
        self.bytes += 4 * shape.batch * shape.heads * shape.queries * shape.keys
        if self.bytes > LARGEST:
            raise UsageError(
                f"capture: all rows of all layers take more than {LARGEST >> 30} GiB",
                remedy="name rows=[...] or sites=[...], or take reductions only (rows=None)",
            )

    @staticmethod
    def _positions(call: CallKey, rows: Sequence[int], shape: Shape) -> list[int]:
        wrong = [row for row in rows if not 0 <= row < shape.queries]
        if wrong:
            raise UsageError(
                f"capture: {call.site} has queries 0 to {shape.queries - 1}, not {wrong}",
                remedy='give rows by site: rows={"' + call.site + '": [...]}',
            )
        return list(rows)

    def _dataset(self, found: FoundSite, samples: int) -> xr.Dataset:
        import xarray as xr

        calls = sorted(call for call in self.arrays if call.site == found.site.id)
        shapes = {self.shapes[call] for call in calls}
        if len(shapes) > 1:
            raise CaptureError(
                f"capture: layers of {found.site.id} differ in shape here: {sorted(shapes)}",
                remedy="wrap the model again with inputs of this size",
            )
        (shape,) = shapes
        leading = leading_axes(found, shape.batch, samples)
        names = sorted((name for name, _ in leading), key=lambda name: name != "sample")
        repeats = found.repeats > 1
        axes = [*names, *((found.site.group[-1],) if repeats else ())]
        variables = {}
        for name in self.arrays[calls[0]]:
            stacked = _stack({call: self.arrays[call][name] for call in calls}, leading, repeats)
            variables[name] = ((*axes, *DIMS[name]), stacked.numpy())
        rows = self.wanted[found.site.id]
        kept = list(range(shape.queries)) if rows == "all" else list(rows or ())
        coords = _coordinates(found, calls, shape, kept if "attention" in variables else None)
        dataset = xr.Dataset(variables, coords)
        site = found.site
        dataset.attrs.update(
            site=site.id, kind=site.kind, reason=found.reason, modules=list(site.modules), form=site.form
        )
        return dataset


class Matcher:
    """Which site, layer and call a record is, by its module's path and how often that has run."""

    def __init__(self, sites: Mapping[str, FoundSite]) -> None:
        self._known: dict[Call, CallKey] = {
            call: CallKey(name, *place) for name, found in sites.items() for call, place in found.calls.items()
        }
        self._runs: Counter[str] = Counter()
        self._seen: set[CallKey] = set()

    def take(self, record: Record) -> CallKey:
        """Name one call. Raises CaptureError for one that the example did not show."""
        call = (record.name, self._runs[record.name])
        self._runs[record.name] += 1
        if call not in self._known:
            raise CaptureError(
                f"capture: {record.name or 'the model'} attends for the {call[1] + 1}. time, which the example "
                "did not show",
                remedy="wrap the model again with such inputs",
            )
        key = self._known[call]
        self._seen.add(key)
        return key

    def require(self, sites: Iterable[str]) -> None:
        """Raise CaptureError where a call of ``sites`` did not come."""
        wanted = set(sites)
        missing = [call for call in self._known.values() if call.site in wanted and call not in self._seen]
        if missing:
            shown = ", ".join(f"{call.site} layer {call.layer}" for call in missing[:6])
            raise CaptureError(
                f"capture: attention that the example showed was not seen: {shown}",
                remedy="wrap the model again with such inputs; threads and other kernels cannot be seen",
            )


def leading_axes(found: FoundSite, batch: int, samples: int) -> list[tuple[str, int]]:
    """A call's batch axis as axes in order: (sample, group) or (group, sample); ``batch`` where not known.

    Raises UsageError where the example had one sample, so that it did not show how several lie.
    """
    groups = ratio(batch, samples)
    if groups == 1:
        return [("sample", samples)]
    if groups == 0 or found.per_sample == 0:
        return [("batch", batch)]
    if samples > 1 and not found.order:
        raise UsageError(
            f"wrap: {found.site.id} has {groups} calls a sample, and an example of one sample does not show in "
            "which order those of several lie",
            remedy="wrap the model with an example of at least two samples",
        )
    axes = [("sample", samples), (found.site.group[0] if found.site.group else "window", groups)]
    return axes[::-1] if found.order == "fast" else axes


def _stack(arrays: Mapping[CallKey, Tensor], leading: list[tuple[str, int]], repeats: bool) -> Tensor:
    """Calls ``(batch, ...)`` as ``(sample, group, [call], layer, ...)``."""
    by_layer: dict[int, list[Tensor]] = defaultdict(list)
    for call in sorted(arrays):
        array = arrays[call]
        split = array.reshape(*(size for _, size in leading), *array.shape[1:])
        by_layer[call.layer].append(split.transpose(0, 1) if leading[-1][0] == "sample" and leading[1:] else split)
    axis = len(leading)
    layers = [torch.stack(parts, axis) if repeats else parts[0] for _, parts in sorted(by_layer.items())]
    return torch.stack(layers, axis + repeats)


def _coordinates(found: FoundSite, calls: list[CallKey], shape: Shape, kept: list[int] | None) -> dict[str, Any]:
    """Layer numbers, heads, positions of rows, and token tables where the user or a guess gave them."""
    coords: dict[str, Any] = {
        "layer": sorted({call.layer for call in calls}),
        "head": np.arange(shape.heads),
    }
    tables: dict[str, TokenAxis] = {}
    if found.key is not None:
        tables["key"] = _fitting(found.key, shape.keys, found, "key")
    if found.query is not None:
        tables["token"] = _fitting(found.query, shape.queries, found, "query")
    if kept is not None:
        coords["query"] = kept
        if found.query is not None:
            tables["query"] = tables["token"].take(kept)
    return {**coords, **_tables(tables)}


def _tables(tables: Mapping[str, TokenAxis]) -> dict[str, Any]:
    from foveate.data.labels import token_coordinates

    return {
        name: (coordinate.dims, coordinate.values, dict(coordinate.attrs))
        for axis, tokens in tables.items()
        for name, coordinate in token_coordinates(axis, tokens).items()
    }


def _fitting(tokens: TokenAxis, count: int, found: FoundSite, side: str) -> TokenAxis:
    if len(tokens) != count:
        raise UsageError(
            f"capture: {found.site.id} has {count} {side} tokens here, its labels are for {len(tokens)}",
            remedy=f"relabel({found.site.id!r}, {side}=...) for inputs of this size",
        )
    return tokens
