"""A wrapped model as an :class:`~foveate.interfaces.AttentionSource`, so that rollout and relevance work on it.

What a plugin declares is found here: streams and merges from the model's own gradients on the example, token
places from the pixels that reach them, the readout from the tokens that the answer depends on. What could not be
found is in :attr:`WrappedSource.gaps`, and asking for it is an error that says so; the user can set it instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from foveate.capture.certify import tensors
from foveate.capture.guess_flow import FlowCall, FlowFinder, FoundFlow
from foveate.capture.guess_sources import NOTHING, DataFlow, Roots
from foveate.capture.guess_tokens import image_size, tokens_by_grid, tokens_by_roots, tokens_from_pixels
from foveate.capture.records import Record
from foveate.capture.tap import Tap
from foveate.capture.wrap_capture import Matcher, leading_axes
from foveate.capture.wrap_run import Inputs, eager
from foveate.errors import CaptureError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    Outputs,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
    TargetRow,
    TokenAxis,
)

if TYPE_CHECKING:
    from foveate.capture.wrap import Wrapped

Logits = Callable[[Any], Tensor]


class WrappedSource(AttentionSource):
    """Made by :meth:`foveate.capture.wrap.Wrapped.source`; ``batch(x)`` makes its batches.

    ``steps``, ``rows`` and ``bottom`` are what was found and may be set: the flow, the readout as (site, weights
    over its stream, rule), and the stream at the bottom. ``gaps`` says why there is no flow.
    """

    targets = ("class",)

    def __init__(
        self,
        wrapped: Wrapped,
        *,
        logits: Logits | None = None,
        classes: Sequence[str] = (),
        preprocess: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self._wrapped, self._logits, self._classes, self._preprocess = wrapped, logits, classes, preprocess
        name = type(wrapped.module).__name__
        self.card = ModelCard(
            id=name, source="wrap", adapter="foveate.wrap", notes=("sites and flow were guessed",)
        )
        self.ignored = dict.fromkeys(wrapped.elsewhere, "its softmax met no values while the model was watched")
        self._refuse_shared_modules()
        found = follow(wrapped, logits)
        self.steps: list[Step] = found.steps
        self.rows, self.bottom, self.gaps = found.readout, found.bottom, tuple(found.gaps)
        self.tokens: dict[str, TokenAxis] = self._tables(found)
        self._moving = found.moving
        self._sites = tuple(
            replace(
                site.site,
                query=found.streams.get((key, "query"), site.site.query),
                key=found.streams.get((key, "key"), site.site.key),
            )
            for key, site in wrapped.sites.items()
        )

    @classmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> WrappedSource:
        """A wrapped model lives in memory: it cannot be opened by name."""
        raise UsageError("wrap: a wrapped model cannot be opened by name", remedy="foveate.wrap(model, inputs)")

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._wrapped.module

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that were found, with their streams."""
        return self._sites

    # ------------------------------------------------------------------------------- inputs and outputs

    def batch(self, inputs: Tensor, **others: Tensor) -> Batch:
        """The main input as a batch; ``others`` replace further tensors of the example by name."""
        size = image_size(inputs) or (1, 1)
        count = inputs.shape[0]
        given = {name: t for name, t in self._wrapped.example.named() if name != self._main()}
        known = {**{name: t for name, t in given.items() if t.dim() and len(t) == count}, **others}
        return Batch(
            inputs,
            (Geometry.identity(*size[-2:]),) * count,
            tuple(f"sample-{i}" for i in range(count)),
            per_sample=known,
        )

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """``preprocess`` of all samples; the input is taken to be the whole image, resized."""
        if self._preprocess is None:
            raise UsageError(
                "wrap: how this model's input is made from images is not known",
                remedy="source(preprocess=...), or source.batch(tensor)",
            )
        made = self.batch(self._preprocess(samples))
        height, width = made.inputs.shape[-2:]
        geometry = []
        for sample in samples:
            rows, columns = sample.pixels.shape[-3:-1]
            geometry.append(Geometry(rows, columns, height, width, height / rows, width / columns))
        return replace(made, geometry=tuple(geometry), ids=tuple(sample.id for sample in samples))

    def forward(self, batch: Batch, *, grad: bool = False) -> Outputs:
        """The model's own call, with the example's other arguments."""
        example = self._wrapped.example
        given = {**batch.per_sample, self._main(): batch.inputs}
        swap = {id(tensor): given.get(name, tensor) for name, tensor in example.named()}
        inputs = example.mapped(lambda tensor: swap[id(tensor)])
        with torch.set_grad_enabled(grad):
            return inputs.run(self.module)

    def predictions(self, outputs: Outputs, batch: Batch) -> list[list[Prediction]]:
        """All classes, best first."""
        scores = self._scores(outputs).detach().float().softmax(-1)
        return [
            [Prediction(self._name(int(i)), float(row[i]), int(i)) for i in row.argsort(descending=True)]
            for row in scores
        ]

    def bind(self, outputs: Outputs, batch: Batch, target: Target) -> BoundTarget:
        """The class with the highest score, or the one that ``target.label`` names or numbers."""
        scores = self._scores(outputs).detach()
        if target.kind not in ("default", *self.targets):
            raise UsageError(f"wrap: no target {target.kind!r}", remedy="class")
        index = scores.argmax(-1).tolist() if target.label is None else [self._class(target.label)] * len(scores)
        rows = tuple(TargetRow(i, "class", c, self._name(c)) for i, c in enumerate(index))
        return BoundTarget(rows, target.scale)

    def score(self, outputs: Outputs, batch: Batch, bound: BoundTarget) -> Tensor:
        """Logit or softmax probability of each bound class."""
        scores = self._scores(outputs).float()
        scores = scores if bound.scale == "logit" else scores.softmax(-1)
        return scores[[row.sample for row in bound.rows], [row.class_index or 0 for row in bound.rows]]

    # ------------------------------------------------------------------------------- what was found

    def label(self, call: CallKey, batch: Batch, outputs: Outputs) -> CallLabels:
        """Samples (and groups), with the user's token tables or those that pixels showed."""
        found = self._wrapped.sites[call.site]
        groups = found.per_sample
        batch_axis = len(batch) * max(groups, 1)
        leading = tuple(leading_axes(found, batch_axis, len(batch)))
        site = next(site for site in self._sites if site.id == call.site)
        query = found.query or self._axis(site.query, found.shape.queries, groups)
        key = found.key or self._axis(site.key, found.shape.keys, groups)
        return CallLabels(leading, query, key)

    def readout(self, batch: Batch, outputs: Outputs, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The tokens that the answer depends on, with equal weights."""
        if self.rows is None:
            return {}
        site, weights, rule = self.rows
        count = len(batch) if bound is None else len(bound)
        return {site: Readout(weights.expand(count, -1).to(batch.inputs.device), rule)}

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The same: the rows were found once, on other inputs."""
        return self.readout(batch, None)

    def flow(self, batch: Batch, outputs: Outputs) -> list[Step]:
        """The steps that were found or set. Raises CaptureError with the gaps where there are any."""
        if self.gaps:
            raise CaptureError(
                "wrap: how information flows through this model could not be established\n  "
                + "\n  ".join(self.gaps[:8]),
                remedy="set source.steps (and source.gaps = ()), or write a plugin",
            )
        return self.steps

    def stream(self, batch: Batch) -> str:
        """The stream that begins at the input."""
        return self.bottom

    def cells(self, batch: Batch) -> CellGrid:
        """The patches of the bottom stream. Raises UsageError where they are not one grid."""
        tokens = self.tokens.get(self.bottom)
        size = image_size(batch.inputs)
        if tokens is None or size is None or not np.isfinite(tokens.y).any():
            raise UsageError(
                f"wrap: where the tokens of {self.bottom!r} lie is not known",
                remedy=f"set source.tokens[{self.bottom!r}] to a TokenAxis with places",
            )
        patch = tokens.where("patch")
        rows, columns = len(np.unique(tokens.y[patch])), len(np.unique(tokens.x[patch]))
        return CellGrid.regular(rows, columns, height=size[-2], width=size[-1])

    # ------------------------------------------------------------------------------- helpers

    def _axis(self, stream: str, count: int, groups: int) -> TokenAxis:
        table = self.tokens.get(stream)
        fits = table is not None and groups == 1 and len(table) == count and stream not in self._moving
        return table if table is not None and fits else TokenAxis.of_kind("patch", count)

    def _tables(self, found: FoundFlow) -> dict[str, TokenAxis]:
        main = dict(self._wrapped.example.named())[self._main()]
        size = image_size(main)
        tables = {}
        for stream, length in found.lengths.items():
            if stream in found.pixels and size is not None:
                tables[stream] = tokens_from_pixels(found.pixels[stream], length, size)
                continue
            placed = tokens_by_grid(length, size[-2:]) if size and stream == found.bottom else None  # type: ignore[arg-type]
            whole = not main.is_floating_point()
            roots = found.roots.get(stream, frozenset())
            tables[stream] = placed or tokens_by_roots(length, roots, whole=whole)
        return tables

    def _main(self) -> str:
        return main_input(self._wrapped.example)

    def _scores(self, outputs: Outputs) -> Tensor:
        scores = answer_of(outputs, self._logits)
        if scores is None:
            raise UsageError(
                "wrap: the model's outputs hold no class scores (sample, class)",
                remedy="source(logits=lambda outputs: ...)",
            )
        return scores

    def _name(self, index: int) -> str:
        return self._classes[index] if index < len(self._classes) else f"class {index}"

    def _class(self, label: str | int) -> int:
        if isinstance(label, int):
            return label
        if label not in self._classes:
            raise UsageError(f"wrap: no class {label!r}", remedy="source(classes=[...]), or a class number")
        return list(self._classes).index(label)

    def _refuse_shared_modules(self) -> None:
        owners: dict[str, str] = {}
        for name, found in self._wrapped.sites.items():
            for path in found.site.modules:
                if owners.setdefault(path, name) != name:
                    raise CaptureError(
                        f"wrap: {path} attends in calls of different shapes ({owners[path]} and {name})",
                        remedy="such a model needs a plugin; capture() works",
                    )


def follow(wrapped: Wrapped, logits: Logits | None) -> FoundFlow:
    """Run the example once more, with its graph, and find the flow."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf, inputs = _with_leaf(wrapped.example)
        flow = DataFlow(wrapped.module, inputs.named(), keep=True)
        calls = _Calls(wrapped, flow)
        tap = Tap(wrapped.module, calls.take, heads=wrapped.heads, grad=True)
        with eager(wrapped.module), flow, tap:
            outputs = inputs.run(wrapped.module)
            answer = answer_of(outputs, logits)
        outcome = flow.roots(answer) if answer is not None else _all_roots(flow, outputs)
        usable = leaf if image_size(leaf) and leaf.requires_grad else None
        return FlowFinder(calls.found, wrapped.samples, usable, outcome).run(answer)


class _Calls:
    """Collects each record with what data flow saw of it."""

    def __init__(self, wrapped: Wrapped, flow: DataFlow) -> None:
        self.found: list[FlowCall] = []
        self._flow, self._matcher = flow, Matcher(wrapped.sites)

    def take(self, record: Record) -> None:
        key, reading = self._matcher.take(record), self._flow.take()
        if reading is None or record.form == "deformable":
            why = "its q and k were not seen" if record.form == "dense" else "it samples points"
            raise CaptureError(
                f"wrap: how information flows through {record.name} cannot be guessed: {why}",
                remedy="such a model needs a plugin; capture() works",
            )
        self.found.append(FlowCall(key, record.shape, reading))


def _with_leaf(example: Inputs) -> tuple[Tensor, Inputs]:
    """The main input as a leaf of a new graph, and all arguments with it (usable outside of inference mode)."""
    image = dict(example.named())[main_input(example)]
    leaf = image.detach().clone()
    if leaf.is_floating_point():
        leaf.requires_grad_()
    usable = {id(tensor): tensor.clone() for _, tensor in example.named() if tensor.is_inference()}
    usable[id(image)] = leaf
    return leaf, example.mapped(lambda tensor: usable.get(id(tensor), tensor))


def _all_roots(flow: DataFlow, outputs: Any) -> Roots:
    return NOTHING.union(*(flow.roots(tensor) for tensor in tensors(outputs)))


def main_input(example: Inputs) -> str:
    """The first floating-point tensor, else the first tensor."""
    named = list(example.named())
    if not named:
        raise UsageError("wrap: the example holds no tensor", remedy="foveate.wrap(model, inputs)")
    return next((name for name, tensor in named if tensor.is_floating_point()), named[0][0])


def answer_of(outputs: Any, logits: Logits | None) -> Tensor | None:
    """Class scores ``(sample, class)``: what ``logits`` takes, ``outputs.logits``, or a lone matrix."""
    found = logits(outputs) if logits is not None else getattr(outputs, "logits", outputs)
    return found if isinstance(found, Tensor) and found.dim() == 2 and found.is_floating_point() else None
