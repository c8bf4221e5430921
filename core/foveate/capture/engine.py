"""Capture: one forward, and of each site exactly the rows and reductions that the plan asks for.

A record is reduced the moment its call is complete and then let go, so that no q, k or v outlives its layer.
Only rows that depend on the answer (matched objects, tracks) wait for it, with q and k held until then.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.capture.allowed import allowed, allowed_counts, allowed_rows, hidden_counts
from foveate.capture.certificate import Certificate, check_record
from foveate.capture.deformable import DeformableRecord
from foveate.capture.forward import tapped_forward
from foveate.capture.labels import call_labels, join_leading, on_axis
from foveate.capture.plan import SiteJob, site_jobs
from foveate.capture.points import ARRAYS, POINTS, kept_points, on_input, sizes_of
from foveate.capture.records import Check, Record, Shape
from foveate.capture.reductions import reduce_rows
from foveate.capture.references import ReferencePoints
from foveate.capture.selection import Selection
from foveate.capture.stacking import absent, stack_calls
from foveate.capture.tap import quiet
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import (
    AttentionSource,
    Batch,
    CallKey,
    CallLabels,
    CapturePlan,
    Outputs,
    Readout,
    TokenAxis,
)

HEAD_AXIS = {"attention": -3, "entropy": -2, "received": -2}
"""What ``heads="mean"`` averages, and where its head axis is; so all arrays of a site agree on the axis."""

ROW_AXES = {
    "attention": -2,
    "allowed": -2,
    "entropy": -1,
    "head_mean": -2,
    "topk_value": -2,
    "topk_index": -2,
    "location": -3,
    "weight": -2,
    "inside": -2,
    "level": -2,
    "reference": -2,
    "key_count": -1,
}
"""Where each array has the query axis."""
KEY_AXES = {"attention": -1, "allowed": -1, "received": -1, "head_mean": -1, "reader_share": -1}
"""Where each array has the key axis."""


@dataclass(frozen=True, eq=False)
class SiteCapture:
    """What was kept of one site.

    ``arrays`` are float32 (``topk_index`` int32), leading axes (sample, *site.group):

    - ``attention`` (..., layer, head, query, key), over the rows kept (head has size 1 for ``heads="mean"``)
    - ``entropy`` (..., layer, head, token) in nats and ``topk_value``, ``topk_index`` (..., layer, head,
      token, rank), over the whole query axis
    - ``received`` (..., layer, head, key), mean over the whole query axis; with ``heads="mean"`` this and
      ``entropy`` are means over heads too, head again of size 1
    - ``head_mean`` (..., layer, token, key), the whole query axis
    - ``allowed`` bool (..., layer, query, key), over the rows kept, at sites with masks besides a causal one
      and at ragged ones: False where no head of the row could read the key, where ``CallLabels.valid`` hides it
      from the sample, and where the row or the key does not exist

    - ``key_count`` int32 (..., layer, token): how many keys each row may read (K, in any head), and
      ``reader_share`` (..., layer, key): which share of the queries may read each key; at the same sites,
      beside ``entropy`` and ``received``
    - ``location`` (..., layer, head, query, point, 2): (y, x) in pixels of the model's input, ``weight``,
      ``inside`` (bool) and ``level`` (int32) (..., layer, head, query, point): the sampling points of the rows
      kept, where the plan's reductions name ``points`` (:mod:`foveate.capture.points`); with them, where the
      module was told it, ``reference`` (..., layer, query, 4): (y, x, height, width) of the reference point or
      box in input pixels, height and width 0 for points

    At a site with ragged axes a row or key that does not exist in a frame (a track before its birth) has attention
    0 and is not ``allowed``; ``entropy``, ``received`` and ``topk_value`` are NaN there, ``topk_index`` -1. At
    any other site all that no call held (frames that a sample lacks) is NaN, -1 or False.

    ``query`` labels the rows kept, ``token`` the whole query axis. ``query_index`` holds the positions kept, -1
    for a weighted readout row; ``rule`` says in words what was chosen.
    """

    site: str
    layers: tuple[int, ...]
    query: TokenAxis
    token: TokenAxis
    key: TokenAxis
    query_index: tuple[int, ...]
    rule: str
    arrays: Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, eq=False)
class Captured:
    """One captured batch: the model's own outputs, what was kept, and the proof that it is exact."""

    outputs: Outputs
    sites: Mapping[str, SiteCapture]
    certificate: Certificate


def capture_batch(source: AttentionSource, batch: Batch, plan: CapturePlan) -> Captured:
    """Run the source's forward once and keep what ``plan`` asks for.

    Raises UsageError for sites, layers, rows or reductions that do not exist, and CaptureError where a
    layer was missed, rows do not reproduce the model's output, or the source's labels do not fit.
    An optional site that did not run is not among the captured ones.
    """
    collector = _Collector(site_jobs(source, plan), source.fixed_readout(batch))
    needed = [job.site for job in collector.jobs.values()]
    with torch.no_grad(), collector.listen(source, batch):
        outputs, claims = tapped_forward(source, batch, collector.take, needed=needed)
    certificate = Certificate(collector.checks, dict(claims.undeclared))
    certificate.require()
    with quiet():
        collector.finish(source, batch, outputs)
        ran = {site_id: part for site_id, part in collector.parts.items() if part.shapes}
        sites = {site_id: _assemble(part, source, batch, outputs) for site_id, part in ran.items()}
    return Captured(outputs, sites, certificate)


@dataclass(eq=False)
class _Part:
    """One site on its way: arrays of each call, ``(batch, ...)``, and the records that wait."""

    job: SiteJob
    selection: Selection | None
    shapes: dict[CallKey, Shape] = field(default_factory=dict)
    arrays: dict[CallKey, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    waiting: dict[CallKey, Record] = field(default_factory=dict)
    levels: dict[CallKey, list[tuple[int, int]]] = field(default_factory=dict)
    references: dict[CallKey, Tensor | None] = field(default_factory=dict)

    def keep_points(self, call: CallKey, record: Record, selection: Selection, labels: CallLabels | None) -> None:
        """Sampling points of the rows kept; their levels' sizes until the keys are labelled."""
        where, reference = f"{call.site} layer {call.layer}", self.references.get(call)
        self.arrays[call].update(kept_points(record, selection, labels, where, reference))
        self.levels[call] = sizes_of(record)

    @property
    def counted(self) -> bool:
        """Whether reductions are kept that blocked keys must not be counted in."""
        return bool({"entropy", "received"} & set(self.job.plan.reductions))

    @property
    def masked(self) -> bool:
        """Whether masks must be kept with the rows; a causal one follows from the positions alone."""
        site = self.job.site
        return bool(site.ragged) or (bool(set(site.masks) - {"causal"}) and site.form == "dense")


class _Collector:
    """Reduces records as they come, or holds what cannot be decided before the answer is known."""

    def __init__(self, jobs: Mapping[str, SiteJob], fixed: Mapping[str, Readout]) -> None:
        self.jobs = jobs
        self.checks: dict[CallKey, Check] = {}
        self.parts = {site_id: _Part(job, job.selection(fixed)) for site_id, job in jobs.items()}
        self.references: ReferencePoints | None = None
        self.size: tuple[int, ...] = ()

    @contextmanager
    def listen(self, source: AttentionSource, batch: Batch) -> Iterator[None]:
        """Hear, for one forward, the reference points of the sites whose sampling points are kept."""
        wanted = [job.site for job in self.jobs.values() if POINTS in job.plan.reductions]
        self.size = tuple(batch.inputs.shape[-2:]) if wanted else ()
        with ReferencePoints(source.module, [path for site in wanted for path in site.modules]) as self.references:
            yield

    def take(self, call: CallKey, record: Record) -> None:
        """Check one call and keep of it what the plan wants."""
        self.checks[call] = check_record(record)
        part = self.parts.get(call.site)
        if part is None or call.layer not in part.job.layers:
            return
        part.shapes[call] = record.shape
        found = reduce_rows(record, part.job.folds, topk=part.job.plan.topk, hidden=_hidden(part, record))
        part.arrays[call] = {name: array.cpu() for name, array in found.items()}
        if part.masked and part.job.plan.rows == "all":
            part.arrays[call]["allowed"] = allowed(record, slice(None)).cpu()
        if part.masked and part.counted:
            part.arrays[call] |= {name: array.cpu() for name, array in allowed_counts(record).items()}
        if POINTS in part.job.plan.reductions and self.references is not None:
            part.references[call] = self.references.at(record.name, record.shape.batch, self.size)
        if POINTS in part.job.plan.reductions and part.job.plan.rows == "all":
            part.keep_points(call, record, Selection("all"), None)
        if part.selection is not None and part.selection.ready(record):
            self._keep(part, call, record, None)
        else:
            part.waiting[call] = record.light()

    def finish(self, source: AttentionSource, batch: Batch, outputs: Outputs) -> None:
        """Take the rows that waited for the answer."""
        waiting = [part for part in self.parts.values() if part.waiting]
        readouts = source.readout(batch, outputs) if waiting else {}
        for part in waiting:
            part.selection = part.selection or part.job.selection(readouts, fixed=False) or Selection("none")
            for call, record in part.waiting.items():
                self._keep(part, call, record, call_labels(source, call, batch, outputs, record.shape))
            part.waiting.clear()

    @staticmethod
    def _keep(part: _Part, call: CallKey, record: Record, labels: CallLabels | None) -> None:
        selection = part.selection
        if selection is None or not selection.query_index:
            return
        queries = record.shape.queries if labels is None else len(labels.query_axis)
        if max(selection.query_index) >= queries or min(selection.index, default=0) < 0:
            raise UsageError(
                f"capture plan: {call.site} has queries 0 to {queries - 1}, not {list(selection.query_index)}"
            )
        part.arrays[call]["attention"] = selection.take(record, labels).float().cpu()
        if part.masked:
            part.arrays[call]["allowed"] = allowed_rows(record, selection, labels).cpu()
        if POINTS in part.job.plan.reductions:
            part.keep_points(call, record, selection, labels)


def _assemble(part: _Part, source: AttentionSource, batch: Batch, outputs: Outputs) -> SiteCapture:
    """Name and stack one site's calls."""
    job = part.job
    labels = {call: call_labels(source, call, batch, outputs, shape) for call, shape in part.shapes.items()}
    first = labels[min(labels)]
    _hide(part, labels)
    _place(part, labels)
    for call, sizes in part.levels.items():
        found = part.arrays[call]
        found["location"] = on_input(found["location"], found["level"], sizes, labels[call].key)
    if not all("reference" in part.arrays[call] for call in labels):  # some layer was told none
        for found in part.arrays.values():
            found.pop("reference", None)
    arrays = {}
    for name, example in part.arrays[min(labels)].items():
        arrays[name] = _stacked(part, labels, name, absent(name, example.dtype, ragged=bool(job.site.ragged)))
    index, rule = _kept(part, len(first.query_axis))
    query = _kept_axis(first.query_axis, index)
    return SiteCapture(job.site.id, job.layers, query, first.query_axis, first.key_axis, index, rule, arrays)


def _stacked(part: _Part, labels: Mapping[CallKey, CallLabels], name: str, fill: float) -> NDArray[np.generic]:
    """One array of all calls."""
    calls = {call: part.arrays[call][name] for call in labels}
    stacked = stack_calls(calls, labels, part.job.site, fill=fill, ranked=name.startswith("topk"))
    if part.job.plan.heads == "mean" and name in HEAD_AXIS:
        stacked = stacked.mean(HEAD_AXIS[name], keepdim=True)
    found: NDArray[np.generic] = stacked.numpy()
    return found


def _place(part: _Part, labels: Mapping[CallKey, CallLabels]) -> None:
    """Move the tokens of every call to their places on the axes that all calls share.

    Raises CaptureError for places that the site does not announce (rows were then taken too early) or that lie on
    axes of different lengths.
    """
    site = part.job.site
    for side in ("query", "key"):
        lengths = {len(getattr(said, f"{side}_axis")) for said in labels.values()}
        placed = any(getattr(said, f"{side}_place") is not None for said in labels.values())
        if placed and (side not in site.ragged or len(lengths) > 1):
            raise CaptureError(
                f"{site.id}: calls place their {side} tokens on axes of {sorted(lengths)}, and the site declares "
                f"ragged axes {site.ragged}",
                remedy=f"declare Site.ragged with {side!r}, and give all calls of a batch the same axis",
            )
    for call, said in labels.items():
        arrays = part.arrays[call]
        for name in arrays:
            arrays[name] = _placed(name, arrays[name], said, rows=part.job.plan.rows == "all")


def _placed(name: str, array: Tensor, said: CallLabels, *, rows: bool) -> Tensor:
    """One array of one call on the common axes. Kept ``rows`` are there already, unless all are kept."""
    fill = absent(name, array.dtype, ragged=True)
    over_rows = rows or name not in ("attention", "allowed", *ARRAYS)
    if said.key_place is not None and name == "topk_index":
        array = torch.tensor(said.key_place.index, dtype=array.dtype)[array.long()]
    if said.query_place is not None and name in ROW_AXES and over_rows:
        array = on_axis(array, ROW_AXES[name], said.query_place, fill)
    if said.key_place is not None and name in KEY_AXES:
        array = on_axis(array, KEY_AXES[name], said.key_place, fill)
    return array


def _hidden(part: _Part, record: Record) -> Tensor | None:
    """Padding of deformable attention ``(batch, key)``, before the source can say where it is: values that are
    0."""
    wanted = "padding" in part.job.site.masks and "entropy" in part.job.plan.reductions
    if not wanted or not isinstance(record, DeformableRecord):
        return None
    return (record.values() == 0).all(-1).all(1)


def _hide(part: _Part, labels: Mapping[CallKey, CallLabels]) -> None:
    """Mark keys that the source says are hidden from a sample as not allowed, beside what masks blocked."""
    for call, said in labels.items():
        rows = part.arrays[call].get("attention")
        if said.valid is not None and rows is not None:
            valid = join_leading(said.valid.cpu(), said)[:, None]
            free = part.arrays[call].get("allowed", torch.ones((), dtype=torch.bool))
            part.arrays[call]["allowed"] = (free & valid).expand(-1, rows.shape[-2], -1)
        if said.valid is not None and part.counted:
            if part.masked:  # what masks and source hide together was not counted
                del part.arrays[call]["key_count"], part.arrays[call]["reader_share"]
            else:
                valid = join_leading(said.valid.cpu(), said)
                part.arrays[call] |= hidden_counts(valid, part.shapes[call].queries)


def _kept(part: _Part, queries: int) -> tuple[tuple[int, ...], str]:
    """Positions of the rows kept, and the rule in words."""
    if part.job.plan.rows == "all":
        return tuple(range(queries)), "all"
    selection = part.selection
    if selection is None or not selection.query_index:
        return (), "none"
    return selection.query_index, selection.rule


def _kept_axis(queries: TokenAxis, index: tuple[int, ...]) -> TokenAxis:
    """Labels of the rows kept; a weighted row is a token of kind ``readout``."""
    if index == (-1,):
        return TokenAxis.of_kind("readout", 1)
    return queries.take(index)
