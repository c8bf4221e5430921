"""``with intervene(...)``: attention is changed while the model runs, and nothing of the model is.

The calls are changed where the tap sees them: a fused call gets another mask (or q, or v) and stays a
fused call, a softmax gets other scores. Taps inside or outside the context record what really ran, so captures,
rollout and relevance of the changed model are made in the usual way::

    with intervene(source, [Knockout("vision.encoder.self", layers=[3, 4], query="cls", key="patch")], on=batch):
        changed = trace(source, batch)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.capture import editing
from foveate.capture.claims import Claims
from foveate.capture.editing import Run
from foveate.capture.follow import CARRIERS, PRODUCTS, Follower, Pending, operands_of
from foveate.capture.forward import eager_stance
from foveate.capture.interventions import Here, Intervention
from foveate.capture.owners import Owners, Places
from foveate.capture.records import Record
from foveate.capture.sampled_edits import SAMPLING, SampledEdits
from foveate.capture.scores import GivenScores, ProductScores, Scores
from foveate.capture.tap import SOFTMAXES, Tap, head_count, own_work, unseen
from foveate.capture.targets import (
    Labels,
    chosen_by_mask,
    chosen_edges,
    intact_labels,
    module_places,
    require_labels,
    source_places,
)
from foveate.capture.trace import Trace
from foveate.capture.values import HeadValues, changed_product, constant_values
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionSource, Batch, CallKey, CallLabels


class Job(NamedTuple):
    """One intervention and the modules it concerns: path -> (site, layer)."""

    intervention: Intervention
    places: Mapping[str, tuple[str, int]]


class Applied(NamedTuple):
    """What one intervention did at one layer: calls changed, and edges chosen in the last of them."""

    intervention: str
    site: str
    layer: int
    calls: int
    edges: int


@contextmanager
def intervene(
    target: AttentionSource | nn.Module,
    interventions: Sequence[Intervention],
    *,
    on: Batch | Trace | CallLabels | None = None,
) -> Iterator[Intervening]:
    """Change the attention of everything ``target`` runs in this context, on this thread.

    ``target`` is a source, whose sites are named by id, or a plain module, whose modules are named by path.
    ``on`` gives tokens their labels: a batch (run once, unchanged, so that labels are those of the intact model),
    a trace of it, or the labels themselves. Choices by position and masks do without. Contexts nest: the inner
    one acts first. Yields the editor, whose ``applied`` says what was done.

    Raises UsageError for a site, layer or head that does not exist, for labels that are needed but not given,
    and for softmaxes over queries (slots); CaptureError for a row without keys, for labels that do not fit, and,
    at the end, for a chosen layer that never ran. The model is untouched whatever happens.
    """
    editor = _editor(target, interventions, on)
    root = target if isinstance(target, nn.Module) else target.module
    kernels = () if isinstance(target, nn.Module) else target.kernels
    with eager_stance(root), Tap(root, _forget, heads=editor.heads, kernels=kernels), editing.active(editor):
        yield editor
    editor.require_all_ran()


class Intervening:
    """The editor that interventions make: changes each chosen call before it runs."""

    def __init__(
        self,
        owners: Owners,
        jobs: Sequence[Job],
        declared: Mapping[str, Hashable],
        heads: Callable[[str], int | None],
        labels: Labels | None = None,
        deformable: Collection[str] = (),
    ) -> None:
        self.heads = heads
        self._deformable = frozenset(deformable)
        self._owners, self._jobs, self._declared, self._labels = owners, jobs, declared, labels
        self._outer = editing.outer()
        self._places = Places(declared)
        self._started: Counter[str] = Counter()
        self._ran: Counter[Hashable] = Counter()
        self._done: dict[tuple[int, str, int], list[int]] = {}
        self._follower = Follower(_forget, _forget)
        self._silenced: dict[Pending, tuple[int, HeadValues]] = {}
        self._sampled = SampledEdits[list[tuple[int, Here]]](
            owners, lambda scores, calls: self._change(scores, calls)[1]
        )
        self._masks: dict[Hashable, Tensor] = {}

    @property
    def applied(self) -> list[Applied]:
        """What was done so far; an intervention whose choice was empty at a layer has 0 edges there."""
        return [
            Applied(self._jobs[i].intervention.name, site, layer, calls, edges)
            for (i, site, layer), (calls, edges) in sorted(self._done.items())
        ]

    def require_all_ran(self) -> None:
        """Raise CaptureError where a chosen layer never ran, or ablated values were never met."""
        missing = [
            f"{job.intervention.name}: {site} layer {layer} ({path})"
            for i, job in enumerate(self._jobs)
            for path, (site, layer) in job.places.items()
            if (i, site, layer) not in self._done
        ]
        if missing:
            more = f"\n  and {len(missing) - 6} more" if len(missing) > 6 else ""
            raise CaptureError(
                "intervene: chosen layers that never ran under it\n  " + "\n  ".join(missing[:6]) + more,
                remedy="run the model inside the context and on the same thread; narrow layers= to those that run",
            )
        if self._silenced:
            names = sorted({pending.name for pending in self._silenced})
            raise CaptureError(f"AblateHeads: weights of {names} never met their values", remedy="use to='mean'")

    # ------------------------------------------------------------------------------------ calls

    def around(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one call of torch, changed where it is attention that was chosen."""
        if self._outer is not None:
            run = partial(self._outer.around, run)
        if func is F.scaled_dot_product_attention:
            with editing.edited():
                return self._attention(run, func, args, kwargs)
        if func in SOFTMAXES:
            with editing.edited():
                return self._softmax(run, func, args, kwargs)
        if self._sampled.waiting and func in SAMPLING:
            with editing.edited():
                out = self._sampled.around(run, func, args, kwargs)
        elif self._silenced and func in CARRIERS:
            out = run(func, args, kwargs)
        else:
            return self._other(run, func, args, kwargs)
        if func in CARRIERS:
            self._follower.carry(args, out)
        return out

    def _other(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        if self._silenced and func in PRODUCTS:
            return self._product(run, func, args, kwargs)
        return run(func, args, kwargs)

    def _attention(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        name, calls = self._arrive()
        if not calls:
            return run(func, args, kwargs)
        with own_work(args[0] if args else kwargs["query"]):
            scores = ProductScores(self._head_count(name), *args, **kwargs)
            changed, values = self._change(scores, calls)
            if values:
                scores.set_values(partial(constant_values, heads=values))
            new_args, new_kwargs = scores.result()
        if not changed:
            return run(func, args, kwargs)
        return scores.restored(run(func, new_args, new_kwargs))

    def _softmax(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["input"]
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if given.dim() < 2 or not isinstance(dim, int):
            return run(func, args, kwargs)
        name, calls = self._arrive()
        if not calls:
            return run(func, args, kwargs)
        if self._is_deformable(name):
            out = run(func, args, kwargs)
            self._sampled.start(name, out, dim % given.dim(), calls)
            return out
        if dim % given.dim() != given.dim() - 1:
            raise CaptureError(f"intervene: {calls[0][1].where} is normalised over another axis than its keys")
        with own_work(given):
            scores = GivenScores(given, self._head_count(name))
            changed, values = self._change(scores, calls)
            new = scores.result()
        if not changed:
            return run(func, args, kwargs)
        args, kwargs = ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "input": new})
        out = run(func, args, kwargs)
        if values:
            pending = self._follower.start(name, out, dim % given.dim(), self._head_count(name))
            self._silenced[pending] = (scores.shape.heads, values)
        return out

    def _product(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        pending = self._follower.find(operands_of(args))
        if pending is None:
            return run(func, args, kwargs)
        heads, values = self._silenced.pop(pending)
        with unseen():
            changed = changed_product(func, args, pending, heads, values)
        with editing.edited():
            out = run(func, changed, kwargs)
        self._follower.multiply(func, changed, out)
        return out

    def _arrive(self) -> tuple[str, list[tuple[int, Here]]]:
        """Which module is at work, and the interventions (by number) that concern it."""
        name = self._owners.current()
        ordinal = self._started[name or ""]
        self._started[name or ""] += 1
        path = self._places.find(name, ordinal)
        if name is None or path is None:
            return "", []
        counted = self._declared[path]
        number = self._ran[counted]
        self._ran[counted] += 1
        found = []
        for i, job in enumerate(self._jobs):
            if path in job.places:
                site, layer = job.places[path]
                found.append((i, Here(CallKey(site, layer, number), f"{site} layer {layer} ({path})")))
        return name, found

    def _change(self, scores: Scores, calls: list[tuple[int, Here]]) -> tuple[bool, HeadValues]:
        """Let every intervention change the scores; also what heads shall put out."""
        changed, values = False, dict[int, Tensor]()
        for i, here in calls:
            intervention = self._jobs[i].intervention
            edges = self._edges(i, scores, here)
            count = int(edges.sum())
            done = self._done.setdefault((i, *here.call[:2]), [0, 0])
            done[:] = [done[0] + bool(count), count]
            if count:
                intervention.change(scores, edges, here)
                values.update(intervention.values(here, scores.shape.heads))
                changed = True
        return changed, values

    def _edges(self, i: int, scores: Scores, here: Here) -> Tensor:
        """The chosen edges of one call, bool, broadcastable to (batch, head, query, key)."""
        shape, intervention = scores.shape, self._jobs[i].intervention
        labels = self._labels_of(here.call)
        key = (i, shape[1:], here.call if labels is not None else None, scores.device)
        if key not in self._masks:
            self._masks[key] = chosen_edges(intervention, shape, labels, here).to(scores.device)
        edges = self._masks[key]
        return (
            edges
            if intervention.mask is None
            else edges & chosen_by_mask(intervention, shape, here).to(edges.device)
        )

    def _is_deformable(self, name: str) -> bool:
        sampled = self._places.find(name, 0) in self._deformable
        return sampled or hasattr(self._owners.module(name), "sampling_offsets")

    def _labels_of(self, call: CallKey) -> CallLabels | None:
        """Labels of a call; a second forward in the same context has those of the first."""
        if self._labels is None or isinstance(self._labels, CallLabels):
            return self._labels
        calls = sum(known[:2] == call[:2] for known in self._labels)
        return self._labels.get(call._replace(number=call.number % calls)) if calls else None

    def _head_count(self, name: str) -> int:
        return head_count(self._owners.module(name), self.heads(name))


def _editor(
    target: AttentionSource | nn.Module,
    interventions: Sequence[Intervention],
    on: Batch | Trace | CallLabels | None,
) -> Intervening:
    if isinstance(target, nn.Module):
        return _module_editor(target, interventions, on)
    claims = Claims(target)
    jobs = [Job(one, source_places(target, claims, one)) for one in interventions]
    labels = intact_labels(target, interventions, on)
    declared = {path: (site.id, layer) for path, (site, layer) in claims.declared.items()}
    sampled = [path for path, (site, _) in claims.declared.items() if site.form == "deformable"]
    return Intervening(Owners(target.module), jobs, declared, claims.heads, labels, sampled)


def _module_editor(
    module: nn.Module, interventions: Sequence[Intervention], on: Batch | Trace | CallLabels | None
) -> Intervening:
    if isinstance(on, Batch | Trace):
        raise UsageError("intervene: a batch has labels only with a source", remedy="pass on=CallLabels(...)")
    require_labels(interventions, on)
    jobs = [Job(one, module_places(module, one)) for one in interventions]
    declared = {path: path for job in jobs for path in job.places}
    return Intervening(Owners(module), jobs, declared, lambda path: None, on)


def _forget(record: Record) -> None:
    """A sink that keeps nothing."""
