"""Analyses that run the model again: decoder layers as answers, heads, approximations, resized pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.capture.dense import DenseRecord
from foveate.capture.gradients import gradient_rounds
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads
from foveate.capture.materialised import MaterialisedRecord
from foveate.capture.trace import Trace, trace
from foveate.detection.approximation import METHODS, errors_at
from foveate.detection.importance import importance
from foveate.detection.readouts import layer_stability
from foveate.detection.redundancy import overlaps
from foveate.detection.scale import scale_divergence
from foveate.errors import FoveateError, UsageError
from foveate.interfaces import BoundTarget, CallKey, Prediction, Target
from foveate.stats.ranks import spearman
from foveate.study.detection import Finding
from foveate.study.detection_subject import Map, Subject, lay

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, Site

BUDGET = 0.125
"""Numbers kept a query, as a share of the keys."""
SCALES = (0.75, 1.5)
"""Sides of the resized input over those of the run's own."""


# ------------------------------------------------------------------------------- decoder layers


def readouts(subject: Subject) -> Iterator[Finding]:
    """Every decoder layer read by the model's own heads, and matched to true objects, else the last layer's."""
    tables: dict[int, Any] = {}
    queries = 1
    for place, (p, b) in enumerate(subject.layered):
        queries = p.shape[1]
        classes, boxes = _wanted(subject, place, p[-1], b[-1])
        tables[place] = layer_stability(p, b, classes, boxes, size=subject.size(place))
    named = (
        ("same_query", "objects matched to the same query as at the last layer", 1 / queries, "random matching"),
        ("overlap", "IoU of an object's box with its box at the last layer", float("nan"), ""),
        ("same_class", "objects of the same class as at the last layer", float("nan"), ""),
        ("score", "probability of the object's class", float("nan"), ""),
    )
    site = subject.cross[0]
    for name, what, baseline, said in named:
        table = np.stack([getattr(tables[place], name) for place in sorted(tables)])
        for layer in range(table.shape[1]):
            yield Finding(what, "share", table[:, layer], baseline, said, site, layer)


def _wanted(
    subject: Subject, place: int, p: NDArray[np.float64], b: NDArray[np.float64]
) -> tuple[list[int], NDArray[np.float64]]:
    """Classes and boxes that all layers are matched to."""
    truth = subject.true_objects(place)
    names = list(getattr(subject.source, "labels", []))
    if truth is not None and all(label in names for label in truth.labels):
        return [names.index(label) for label in truth.labels], truth.boxes
    sure = p.max(-1) > float(getattr(subject.source, "threshold", 0.5))
    return [int(c) for c in p[sure].argmax(-1)], b[sure]


# ------------------------------------------------------------------------------- heads


def heads(subject: Subject) -> Iterator[Finding]:
    """Michel et al. 2019 by gradient (logit of each object), and the loss of probability with a head switched off.

    Switching off sets a head's output to zero. Baseline of the importance: equal heads, 1 / sqrt(heads).
    """
    sites = [site for site in subject.source.sites if site.form == "dense" and site.normalised_over == "key"]
    gates = {site.id: np.full((len(subject.positions), len(site.layers), site.heads), np.nan) for site in sites}
    drops = {name: np.full_like(table, np.nan) for name, table in gates.items()}
    for places, batch in subject.batches():
        traced = trace(subject.source, batch, grad=True, sites=[site.id for site in sites])
        bound = subject.source.bind(traced.outputs, traced.batch, Target())
        if len(bound):
            _gates_of(traced, bound, places, sites, gates)
            _drops_of(subject.source, batch, bound, places, sites, drops)
    if not any(np.isfinite(table).any() for table in gates.values()):
        raise UsageError("heads: no object above the threshold in any image")
    for site in sites:
        yield from _head_findings(site, gates[site.id], drops[site.id])
    both = [(importance(gates[site.id]), np.nanmean(drops[site.id], 0)) for site in sites]
    rank = spearman(*(np.concatenate([pair[side].ravel() for pair in both]) for side in (0, 1)))
    yield Finding(
        "rank correlation of both importances over all heads",
        "rho",
        np.array([float(rank)]),
        0.0,
        "unrelated",
        whole=True,
        n=len(subject.positions),
    )


def _head_findings(site: Site, gates: NDArray[np.float64], drops: NDArray[np.float64]) -> Iterator[Finding]:
    norm = np.sqrt((np.nanmean(np.abs(gates), 0) ** 2).sum(-1))
    for i, layer in enumerate(site.layers):
        for head in range(site.heads):
            share = np.abs(gates[:, i, head]) / norm[i] if norm[i] > 0 else 0 * gates[:, i, head]
            even = site.heads**-0.5
            yield Finding(
                "importance by gradient", "share of l2", share, even, "equal heads", site.id, layer, head
            )
            yield Finding(
                "probability lost without the head",
                "probability",
                drops[:, i, head],
                0.0,
                "no loss",
                site.id,
                layer,
                head,
            )


def _gates_of(
    traced: Trace,
    bound: BoundTarget,
    places: list[int],
    sites: Sequence[Site],
    gates: dict[str, NDArray[np.float64]],
) -> None:
    """Mean over an image's objects of |sum A dL/dA|, into ``gates``."""
    found: dict[tuple[str, int, int], list[NDArray[np.float64]]] = {}
    for backward in gradient_rounds(traced, bound.at("logit")):
        for site in sites:
            for i, layer in enumerate(site.layers):
                gate = _gate(traced, CallKey(site.id, layer), backward.gradients, len(places))
                for row in backward.rows:
                    sample = bound.rows[row].sample
                    found.setdefault((site.id, i, sample), []).append(np.abs(gate[sample]))
    for (name, i, sample), values in found.items():
        gates[name][places[sample], i] = np.mean(values, 0)


def _gate(traced: Trace, call: CallKey, gradients: Any, samples: int) -> NDArray[np.float64]:
    """``(sample, head)``; 0 where the score does not depend on the call."""
    record = traced.record(call)
    batch, count = record.shape[:2]
    total = torch.zeros(batch, count, dtype=torch.float64)
    if call in gradients:
        ready = record.prepared()
        for positions, block in ready.blocks():
            total += (block * ready.weight_gradient(positions, gradients[call])).sum((-1, -2)).detach().cpu()
    return np.asarray(total.reshape(samples, -1, count).sum(1))  # windows of a sample together


def _drops_of(
    source: AttentionSource,
    batch: Batch,
    bound: BoundTarget,
    places: list[int],
    sites: Sequence[Site],
    drops: dict[str, NDArray[np.float64]],
) -> None:
    """Mean over an image's objects of the probability lost without each head, into ``drops``."""
    samples = np.array([row.sample for row in bound.rows])
    with torch.no_grad():
        whole = source.score(source.forward(batch), batch, bound).double().cpu().numpy()
        for site in sites:
            for i, layer in enumerate(site.layers):
                for head in range(site.heads):
                    with intervene(source, [AblateHeads(site.id, layers=layer, heads=head)]):
                        left = source.score(source.forward(batch), batch, bound).double().cpu().numpy()
                    for sample in np.unique(samples):
                        drops[site.id][places[sample], i, head] = (whole - left)[samples == sample].mean()


# ------------------------------------------------------------------------------- approximations


def approximations(subject: Subject) -> Iterator[Finding]:
    """Error of the output of each head by cheaper matrices that store :data:`BUDGET` of the numbers.

    Of attention that the model made itself (a softmax, then a product) queries and keys are not known: such sites
    have no linear approximation.
    """
    tables: dict[tuple[str, int, str], NDArray[np.float64]] = {}
    budgets: dict[str, int] = {}
    for places, batch in subject.batches():
        for call, record in trace(subject.source, batch, grad=True).records.items():
            if not isinstance(record, DenseRecord | MaterialisedRecord) or record.v is None:
                continue
            if record.shape.batch != len(batch):
                continue
            budgets[call.site] = max(1, round(BUDGET * record.shape.keys))
            for name, errors in _errors(record, budgets[call.site], subject.seed).items():
                key = (call.site, call.layer, name)
                table = tables.setdefault(key, np.full(len(subject.positions), np.nan))
                table[places] = errors.mean(1)
    if not tables:
        raise UsageError(f"{subject.run.model_id}: no attention whose values were seen, one row a picture")
    for (site, layer, name), values in tables.items():
        if name != "uniform":
            what = f"output error, {name.replace('_', '-')}, {budgets[site]} numbers a query"
            uniform = tables[site, layer, "uniform"]
            yield Finding(what, "share of |AV|", values, uniform, "uniform attention", site, layer)


def _errors(record: DenseRecord | MaterialisedRecord, budget: int, seed: int) -> dict[str, NDArray[np.float64]]:
    """Method -> ``(sample, head)``; "linear" only where queries and keys are known and no key is masked."""
    rows = record.rows(slice(None)).double().cpu().numpy()
    if isinstance(record, MaterialisedRecord):
        values = record.v.double().cpu().numpy()  # type: ignore[union-attr]
        found = errors_at(rows, values, budget, seed=seed)
        return {name: found[name] for name in METHODS if name in found}
    q, k, v = (t.double().cpu().numpy() for t in (record.q, record.k, record.v))  # type: ignore[union-attr]
    groups = q.shape[1] // k.shape[1]
    k, v = (np.repeat(t, groups, 1) for t in (k, v))
    free = not record.causal and bool(torch.isfinite(record.scores(slice(None))).all())
    q, k = (q, k) if free else (None, None)
    found = errors_at(rows, v, budget, q=q, k=k, scale=record.scale, seed=seed)
    return {name: found[name] for name in METHODS if name in found}


# ------------------------------------------------------------------------------- resized pictures


def scale(subject: Subject) -> Iterator[Finding]:
    """Divergence of each object's cross-attention between the run's input size and others, last layer, head mean.

    The object at the other size is the answer of the same label with the largest IoU of at least 0.5. Null: maps
    of objects in other images, at the other size. Needs a detector that takes the option ``image_size``.
    """
    base, before = subject.source, _maps(subject, subject.source)
    batch = next(subject.batches())[1]
    height, width = (int(side) for side in batch.inputs.shape[-2:])
    step = math.lcm(16, int(getattr(base, "size_step", 1)))
    for factor in SCALES:
        size = [max(1, round(side * factor / step)) * step for side in (height, width)]
        try:
            other = subject.run.open_source(**{**subject.overrides, "image_size": size})
        except FoveateError as error:
            raise UsageError(f"{base.card.id} cannot be opened at another input size: {error.message}") from error
        after = _maps(subject, other)
        pairs = [_pair_up(a, b) for a, b in zip(before, after, strict=True)]
        values = np.array([_mean_divergence(pair) for pair in pairs])
        null = np.array([_mean_divergence(_strangers(before, after, place)) for place in range(len(before))])
        yield Finding(
            f"divergence of an object's map at {size[0]} x {size[1]} pixels from {height} x {width}",
            "JS / ln 2",
            values,
            null,
            "objects of other images",
            subject.cross[0],
            _last_layer(base, subject.cross[0]),
        )
        kept = [len(pair) / len(a) if a else float("nan") for pair, a in zip(pairs, before, strict=True)]
        yield Finding(f"objects found again at {size[0]} x {size[1]} pixels", "share", np.array(kept))


Seen = list[tuple[Prediction, Map]]


def _maps(subject: Subject, source: AttentionSource) -> list[Seen]:
    """Per image, objects above the threshold with the map of their query."""
    site = subject.cross[0]
    found: list[Seen] = []
    threshold = float(getattr(source, "threshold", 0.5))
    for places, batch in subject.batches(source):
        traced = trace(source, batch, sites=[site])
        call = CallKey(site, _last_layer(source, site))
        tokens, record = traced.labels(call).key, traced.record(call)
        for row, listed in enumerate(source.predictions(traced.outputs, batch)):
            sure = [one for one in listed if one.score > threshold and one.object is not None and one.box]
            queries = [int(one.object or 0) for one in sure]
            rows = record.rows(queries)[row].mean(0).double().cpu().numpy() if sure else np.zeros((0, len(tokens)))
            position = subject.positions[places[row]]
            laid = [lay(one, tokens, subject.run, position, batch.geometry[row]) for one in rows]
            found.append(list(zip(sure, laid, strict=True)))
    return found


def _pair_up(before: Seen, after: Seen) -> list[tuple[Map, Map]]:
    """The same object at both sizes: same label, IoU of at least 0.5, the largest."""
    pairs = []
    for one, laid in before:
        same = [(other, seen) for other, seen in after if other.label == one.label]
        reach = overlaps(_boxes(one), _boxes(*(other for other, _ in same)))[0]
        if reach.size and reach.max() >= 0.5:
            pairs.append((laid, same[int(reach.argmax())][1]))
    return pairs


def _boxes(*answers: Prediction) -> NDArray[np.float64]:
    return np.array([one.box for one in answers], np.float64).reshape(-1, 4)


def _strangers(before: list[Seen], after: list[Seen], place: int) -> list[tuple[Map, Map]]:
    """Objects of one image beside all objects of the next image that has any."""
    others = [seen for shift in range(1, len(after)) for seen in after[(place + shift) % len(after)]]
    return [(laid, seen) for _, laid in before[place] for _, seen in others[:8]]


def _mean_divergence(pairs: list[tuple[Map, Map]]) -> float:
    if not pairs:
        return float("nan")
    return float(np.mean([scale_divergence(a.values, a.grid, b.values, b.grid) for a, b in pairs]))


def _last_layer(source: AttentionSource, site: str) -> int:
    return next(one for one in source.sites if one.id == site).layers[-1]
