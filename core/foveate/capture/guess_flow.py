"""How information flows between the calls of an unknown model: streams, merges, residuals and the readout.

Every link is measured on the model's own graph (:mod:`foveate.capture.guess_maps`): the output of one call,
followed to the q and k of the next. Tokens that stay where they are make one stream; permuted or merged tokens
make a :class:`~foveate.interfaces.MergeStep` (mean over the sources of each target). Whatever is not of this
kind is written down as a gap; with a gap there is no flow, rather than a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from foveate.capture.guess_kind import tokens_only
from foveate.capture.guess_maps import is_identity, merge_matrix, per_sample, token_map
from foveate.capture.guess_sources import Operands, Reading, Roots
from foveate.capture.records import Shape
from foveate.interfaces import AttentionStep, CallKey, MergeStep, Step

Side = Literal["query", "key"]
SIDES: tuple[Side, Side] = ("query", "key")


@dataclass(frozen=True, eq=False)
class FlowCall:
    """One call of the example: its name, its size, and what data flow saw of it."""

    key: CallKey
    shape: Shape
    reading: Reading

    def roots(self, side: Side) -> Roots:
        """What q or k was made from."""
        return tokens_only(self.reading.query if side == "query" else self.reading.key)

    def count(self, side: Side) -> int:
        """Tokens of q or k over the whole batch."""
        return self.shape.batch * (self.shape.queries if side == "query" else self.shape.keys)


@dataclass(eq=False)
class FoundFlow:
    """What the gradients showed.

    ``streams`` gives each site's stream by (site, side); ``roots`` what a stream is made from where it begins;
    ``pixels`` which token of a stream each input pixel reaches, ``(pixel,)``, -1 for none; ``lengths`` tokens
    a sample; ``moving`` streams whose tokens change places between calls. ``readout`` is (site, weights over
    its stream ``(token,)``, rule). ``gaps`` say in words what no sweep can follow.
    """

    steps: list[Step] = field(default_factory=list)
    streams: dict[tuple[str, Side], str] = field(default_factory=dict)
    roots: dict[str, Roots] = field(default_factory=dict)
    pixels: dict[str, Tensor] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    readout: tuple[str, Tensor, str] | None = None
    gaps: list[str] = field(default_factory=list)
    moving: set[str] = field(default_factory=set)

    @property
    def bottom(self) -> str:
        """The stream that begins at an input of the model."""
        names = [name for name, roots in self.roots.items() if any(root.kind == "input" for root in roots)]
        return next((name for name in names if name in self.pixels), next(iter([*names, *self.roots]), ""))


class FlowFinder:
    """Builds a :class:`FoundFlow` from calls in execution order.

    ``image`` is the main input in the graph, ``(sample, channel, y, x)`` or ``(sample, frame, channel, y, x)``,
    or None; ``outcome`` are the roots of the model's answer.
    """

    def __init__(self, calls: Sequence[FlowCall], samples: int, image: Tensor | None, outcome: Roots) -> None:
        self._calls, self._samples, self._image, self._outcome = calls, samples, image, outcome
        self._by_root = {call.reading.out: call for call in calls}
        self._query_stream: dict[CallKey, str] = {}
        self._pixels: dict[str, Tensor] = {}  # as tokens lie now; the flow keeps how they lay at first
        self.flow = FoundFlow()

    def run(self, answer: Tensor | None) -> FoundFlow:
        """Follow every call, then look for the tokens that ``answer`` ``(sample, class)`` is read from."""
        for call in self._calls:
            query, key = self._place(call)
            self._query_stream[call.key] = query
            self.flow.steps.append(AttentionStep(call.key, query, key, self._residual(call)))
        self._read(answer)
        return self.flow

    # ------------------------------------------------------------------------------- streams

    def _place(self, call: FlowCall) -> tuple[str, str]:
        """The streams of one call's queries and keys, after the merges that lead there."""
        query, key = (self._arrival(call, side) for side in SIDES)
        if call.roots("query") == call.roots("key") and call.shape.queries == call.shape.keys:
            if query is None or key is None or torch.equal(query, key):
                stream = self._enter(call, "query", query)
                self.flow.streams[call.key.site, "key"] = stream
                return stream, stream
        elif self._before(call, "query") is None and self._before(call, "key") is None and _shared(call):
            self._gap(call, "q and k have the same sources but differ in length, and no earlier call tells how")
        return self._enter(call, "query", query), self._enter(call, "key", key)

    def _before(self, call: FlowCall, side: Side) -> FlowCall | None:
        """The latest earlier call that q or k is made from."""
        known = [root for root in call.roots(side) if root in self._by_root]
        return self._by_root[max(known, key=lambda root: root.number)] if known else None

    def _arrival(self, call: FlowCall, side: Side) -> Tensor | None:
        """For each token (a sample's) of the call before, the token of this side that it becomes.

        None where no call is before, or no such map is found (a gap).
        """
        before, tensors = self._before(call, side), call.reading.tensors
        if before is None:
            return None
        what = f"{'q' if side == 'query' else 'k'} from {before.reading.out.name}"
        if tensors is None or before.reading.tensors is None:
            return self._none(call, f"{what}: the operands could not be read (an einsum of another form?)")
        target = in_tokens(tensors.q if side == "query" else tensors.k, call.shape.batch)
        source, laid = before.reading.tensors.out, partial(_laid, before.reading.tensors, before.shape.batch)
        if not (target.requires_grad and source.requires_grad):
            return self._none(call, f"{what}: no gradient connects them")
        found = token_map(source, target, laid)
        if found is None:
            return self._none(call, f"{what}: one token reaches several (convolution, resampling, other mixing)")
        local = per_sample(found, self._samples, len(target))
        if local is None:
            return self._none(call, f"{what}: samples are not the slowest axis of the batch, or differ")
        return local

    def _enter(self, call: FlowCall, side: Side, local: Tensor | None) -> str:
        """The stream that one side of a call reads, with the step that leads there."""
        flow, place = self.flow, (call.key.site, side)
        before, length = self._before(call, side), call.count(side) // self._samples
        name = flow.streams.get(place, f"{call.key.site} {'queries' if side == 'query' else 'keys'}")
        if before is None:
            self._begin(call, side, name)
        elif local is not None:
            earlier = self._query_stream[before.key]
            if is_identity(local, length) and flow.streams.get(place, earlier) == earlier:
                name = earlier
            else:
                self._merge(call, earlier, name, local, length)
        flow.streams[place] = name
        flow.lengths[name] = length
        return name

    def _merge(self, call: FlowCall, earlier: str, name: str, local: Tensor, length: int) -> None:
        matrix = merge_matrix(local, length)
        if matrix is None:
            self._gap(call, f"some of its tokens do not come from {earlier!r} (CLS added or copied on the way)")
            return
        self.flow.steps.append(MergeStep(earlier, name, matrix, f"to {call.key.site} layer {call.key.layer}"))
        if earlier == name:
            self.flow.moving.add(name)
        if earlier in self._pixels:
            before = self._pixels[earlier]
            moved = torch.where(before < 0, before, local.cpu()[before.clamp_min(0)])
            self._pixels[name] = moved
            self.flow.pixels.setdefault(name, moved)

    def _begin(self, call: FlowCall, side: Side, name: str) -> None:
        """A stream starts here: where do its tokens lie in the input?"""
        if name in self.flow.roots:
            return
        self.flow.roots[name] = call.roots(side)
        tensors, image = call.reading.tensors, self._image
        if tensors is None or image is None or not any(root.kind == "input" for root in call.roots(side)):
            return
        target = in_tokens(tensors.q if side == "query" else tensors.k, call.shape.batch)
        found = token_map(image, target, in_pixels) if target.requires_grad else None
        local = None if found is None else per_sample(found, self._samples, len(target))
        if local is not None and bool((local >= 0).any()):
            self.flow.pixels[name] = self._pixels[name] = local.cpu()

    def _none(self, call: FlowCall, why: str) -> Tensor | None:
        self._gap(call, why)
        return None

    def _gap(self, call: FlowCall, why: str) -> None:
        self.flow.gaps.append(f"{call.key.site} layer {call.key.layer}: {why}")

    # ------------------------------------------------------------------------------- residual and readout

    def _residual(self, call: FlowCall) -> bool:
        """Whether what q was made from is still there, beside the call's output, where the output is used."""
        mine = call.roots("query")
        calls = frozenset(root for root in mine if root.kind == "call")
        users = [
            later.reading.query if side == "query" else later.reading.key
            for later in self._calls
            for side in SIDES
            if later is not call and self._before(later, side) is call
        ] or [self._outcome]
        return any(calls <= user if calls else bool(mine & user) for user in users)

    def _read(self, answer: Tensor | None) -> None:
        if answer is None or not answer.requires_grad or answer.dim() != 2 or len(answer) != self._samples:
            return
        for call in reversed(self._calls):
            tensors = call.reading.tensors
            if tensors is None or call.reading.out not in self._outcome or not tensors.out.requires_grad:
                continue
            laid = partial(_laid, tensors, call.shape.batch)
            found = token_map(tensors.out, answer, laid)
            local = None if found is None else per_sample(found, self._samples, len(answer))
            if local is not None and bool((local >= 0).any()):
                self.flow.readout = (call.key.site, *_uniform(local >= 0))
                return


def _uniform(read: Tensor) -> tuple[Tensor, str]:
    """Equal weights over the tokens that the answer depends on, and the rule in words."""
    count = int(read.sum())
    rule = (
        f"token {int(read.int().argmax())}"
        if count == 1
        else f"equal weights over the {count} tokens the answer reads"
    )
    return (read.float() / count).cpu(), rule


def _laid(tensors: Operands, batch: int, tensor: Tensor) -> Tensor:
    """Something of the shape of a call's output, by tokens."""
    return in_tokens(tensors.arranged(tensor), batch)


def _shared(call: FlowCall) -> bool:
    return call.roots("query") == call.roots("key")


def in_tokens(tensor: Tensor, batch: int) -> Tensor:
    """``(..., token, channel)`` with batch and heads in front as ``(batch * token, head * channel)``."""
    tokens, channels = tensor.shape[-2:]
    return tensor.reshape(batch, -1, tokens, channels).transpose(1, 2).reshape(batch * tokens, -1)


def in_pixels(tensor: Tensor) -> Tensor:
    """``(sample, *frame, channel, y, x)`` as ``(sample * frame * y * x, channel)``."""
    return tensor.movedim(-3, -1).flatten(0, -2)
