"""``foveate.wrap(model, *inputs)``: attention of a model that no plugin describes.

The model runs once on an example: its attention calls are found, counted independently, named by module path, and
grouped into sites; self or cross is guessed from where q and k come from. ``capture`` then works at once::

    w = foveate.wrap(model, images)
    print(w)                                        # a table of sites, with the reason of each guess
    captured = w.capture(images, rows=[0], reductions=("entropy",))
    captured["blocks.attn"].attention               # (sample, layer, head, query, key)

Labels are the user's (:meth:`Wrapped.relabel`) or, where the model's own gradients prove them, found by
:meth:`Wrapped.source`, which makes an :class:`~foveate.interfaces.AttentionSource` for rollout and relevance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from foveate.capture.certificate import Certificate
from foveate.capture.records import Record
from foveate.capture.tap import Tap
from foveate.capture.wrap_capture import Collector, Matcher, Rows, WrappedCapture
from foveate.capture.wrap_group import FoundSite, group
from foveate.capture.wrap_observe import observe, refuse_hidden
from foveate.capture.wrap_run import (
    Heads,
    Inputs,
    eager,
    plain_module,
    refuse_detached,
    refuse_dropout,
    refuse_transforms,
)
from foveate.capture.wrap_samples import ratio, sample_axis, sample_order, samples_of
from foveate.errors import UsageError
from foveate.interfaces import CallKey, SiteKind, TokenAxis

if TYPE_CHECKING:
    from foveate.capture.wrap_source import WrappedSource

GroupName = Literal["frame", "window", "track", "position"]


def wrap(
    model: nn.Module, *inputs: Any, samples: int | None = None, heads: int | None = None, **kwargs: Any
) -> Wrapped:
    """Find the attention of any ``torch.nn.Module`` by running it on an example: ``model(*inputs, **kwargs)``.

    ``samples`` says how many samples the example holds, where the first tensor does not tell; ``heads`` how many
    heads share the first axis with the samples in calls of three axes, where the module does not tell
    (``num_heads`` and the like). The model is left as it was.

    Raises CaptureError for what the tap could not see or would see wrongly: no attention,
    kernels outside torch, other threads, scripted code, ``torch.func`` transforms, active dropout.
    """
    return Wrapped(model, Inputs(inputs, kwargs), samples=samples, heads=heads)


class Wrapped:
    """A model with its attention found. Made by :func:`wrap`.

    ``elsewhere`` counts softmaxes that met no values: class probabilities, or attention of a kind that the tap
    cannot follow (see there before trusting that nothing is missing).
    """

    def __init__(
        self, model: nn.Module, example: Inputs, *, samples: int | None = None, heads: int | None = None
    ) -> None:
        self.module = plain_module(model)
        refuse_transforms(example)
        refuse_dropout(self.module)
        self.example = example
        self.heads = Heads(self.module, heads)
        observation = observe(self.module, example, self.heads)
        self._axis = sample_axis(example, (call.shape for call in observation.calls))
        self._samples = samples
        self.samples = samples_of(example, self._axis) if samples is None else samples
        self.calls = observation.calls
        self.elsewhere: Mapping[str, int] = observation.elsewhere
        self.kernels: Mapping[str, int] = observation.kernels
        self.identical = observation.identical
        grouped = any(ratio(call.shape.batch, self.samples) > 1 for call in observation.calls)
        orders = sample_order(self.module, example, self.heads, self._axis) if grouped else {}
        self.sites: dict[str, FoundSite] = group(observation.calls, self.samples, orders)

    def capture(
        self,
        *inputs: Any,
        rows: Rows | Mapping[str, Rows] = "all",
        reductions: Sequence[str] = (),
        sites: Sequence[str] | None = None,
        topk: int = 16,
        **kwargs: Any,
    ) -> WrappedCapture:
        """Run the model (on the example, without arguments) and keep rows and reductions of its sites.

        ``rows`` are query positions, "all" or None, or a mapping of sites to these. ``reductions``: see
        :class:`~foveate.interfaces.SitePlan`. Raises UsageError for what does not exist, CaptureError where
        calls are missing or do not reproduce the model's output.
        """
        given = self._given(inputs, kwargs)
        collector = Collector(self.sites, self._wanted(sites, rows), tuple(reductions), topk)
        with torch.no_grad(), eager(self.module), Tap(self.module, collector.take, heads=self.heads):
            outputs = given.run(self.module)
        certificate = Certificate(collector.checks, dict(self.elsewhere))
        certificate.require()
        return WrappedCapture(outputs, collector.finish(self._count(given)), certificate)

    def records(self, *inputs: Any, grad: bool = False, **kwargs: Any) -> tuple[Any, dict[CallKey, Record]]:
        """Run the model and return its outputs with one lazy record a call.

        With ``grad`` each record's ``node`` is the tensor of the autograd graph at which a gradient can be
        taken: A itself where the model made it, else the call's output. Raises CaptureError where there is none.
        """
        given = self._given(inputs, kwargs)
        matcher = Matcher(self.sites)
        found: dict[CallKey, Record] = {}

        def take(record: Record) -> None:
            refuse_hidden(record)
            found[matcher.take(record)] = record

        with torch.set_grad_enabled(grad), eager(self.module), Tap(self.module, take, heads=self.heads, grad=grad):
            outputs = given.run(self.module)
        matcher.require(self.sites)
        if grad:
            refuse_detached(found.values())
        return outputs, found

    def relabel(
        self,
        site: str,
        *,
        query: TokenAxis | None = None,
        key: TokenAxis | None = None,
        kind: SiteKind | None = None,
        group: tuple[GroupName, ...] | None = None,
        name: str | None = None,
    ) -> Wrapped:
        """Say what a site's tokens, kind or group axes are, or rename it. Returns the same object.

        Raises UsageError where labels do not fit the example's shape.
        """
        found = self._site(site)
        for side, tokens, count in (("query", query, found.shape.queries), ("key", key, found.shape.keys)):
            if tokens is not None and len(tokens) != count:
                raise UsageError(f"relabel: {site} has {count} {side} tokens, not {len(tokens)}")
        if group is not None and len(group) != len(found.site.group):
            raise UsageError(f"relabel: {site} has group axes {found.site.group}, not {group}")
        changed = replace(
            found.site,
            id=name or site,
            kind=kind or found.site.kind,
            group=found.site.group if group is None else group,
        )
        reason = found.reason if kind is None else "said by the user"
        new = replace(found, site=changed, reason=reason, query=query or found.query, key=key or found.key)
        if name is not None and name != site and name in self.sites:
            raise UsageError(f"relabel: there is a site {name!r} already")
        self.sites = dict((changed.id, new) if old == site else (old, other) for old, other in self.sites.items())
        return self

    def source(
        self,
        *,
        logits: Callable[[Any], Tensor] | None = None,
        classes: Sequence[str] = (),
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> WrappedSource:
        """An :class:`~foveate.interfaces.AttentionSource` around the example's main input.

        How information flows between the calls, where the answer is read and where tokens lie is taken from the
        model's own gradients; what they do not show is left open and said so (``source.gaps``). ``logits``
        takes class scores ``(sample, class)`` from the outputs.
        """
        from foveate.capture.wrap_source import WrappedSource

        return WrappedSource(self, logits=logits, classes=classes, preprocess=preprocess)

    def __repr__(self) -> str:
        from foveate.capture.wrap_table import table

        return table(self)

    def _given(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        given = Inputs(inputs, kwargs) if inputs or kwargs else self.example
        refuse_transforms(given)
        refuse_dropout(self.module)
        return given

    def _count(self, given: Inputs) -> int:
        """Samples of these inputs: counted on the same axis as the example's, or as the user said."""
        if self._samples is not None:
            return self._samples
        return samples_of(given, self._axis)

    def _wanted(self, sites: Sequence[str] | None, rows: Rows | Mapping[str, Rows]) -> dict[str, Rows]:
        for name in (*(sites or ()), *(rows if isinstance(rows, Mapping) else ())):
            self._site(name)
        if isinstance(rows, Mapping):
            return {name: rows.get(name) for name in (rows if sites is None else sites)}
        return dict.fromkeys(self.sites if sites is None else sites, rows)

    def _site(self, name: str) -> FoundSite:
        if name not in self.sites:
            raise UsageError(f"wrap: no site {name!r}", remedy=f"choose from {', '.join(self.sites)}")
        return self.sites[name]
