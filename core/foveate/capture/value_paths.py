"""What becomes of A V: the projection that mixes the heads, the residual it is added to, the norm after it.

No names of modules are guessed. The output of each attention call is followed through reshapes to the linear layer
that consumes it, from there through a layer scale to the sum with the residual, and on to a layer norm. A shadow
tensor of positions takes the same reshapes, so that it is known exactly which column of the weight belongs to
which head and channel, whatever the layout (Swin's rolled windows included).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.capture.forward import tapped_forward
from foveate.capture.records import Record, Shape
from foveate.capture.tap import Sink, Tap, quiet
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionSource, Batch, CallKey

MOVES: tuple[Callable[..., Any], ...] = (torch.roll, Tensor.roll, Tensor.__getitem__)
"""Operations besides the tap's that only move or select numbers."""
KEEPS_LAYOUT = frozenset(
    (
        *(Tensor.to, Tensor.type_as, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.clone),
        *(Tensor.contiguous, F.dropout, torch.dropout),
    )
)
ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_)


class Norm(NamedTuple):
    """A layer norm over the last axis, and what it gave: ``out`` is ``(batch, query, channel)``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    out: Tensor


@dataclass(eq=False)
class ValuePath:
    """One attention call and what followed it, as far as it was seen.

    ``weight`` is W_O by head ``(head, channel, out)``, ``bias`` ``(out)``, ``projected`` the model's own output of
    the projection, ``scale`` the layer scale, ``residual`` what was added and ``total`` the sum, all three
    ``(batch, query, out)``. Everything is detached. NaN marks queries that the model dropped (padded windows).
    """

    record: Record
    weight: Tensor | None = None
    bias: Tensor | None = None
    projected: Tensor | None = None
    scale: Tensor | float = 1.0
    residual: Tensor | None = None
    total: Tensor | None = None
    norm: Norm | None = None

    @property
    def shape(self) -> Shape:
        """(batch, heads, queries, keys)."""
        return self.record.shape

    def token_norms(self) -> Tensor:
        """||x_i|| of the residual stream that this call adds to, float32 ``(batch, query)``."""
        if self.residual is None:
            raise missing(self, "residual")
        norms: Tensor = torch.linalg.vector_norm(self.residual.float(), dim=-1)
        return norms


@dataclass(eq=False)
class _Trail:
    """A tensor that holds A V (stage "heads"), its projection or its sum, and where each number came from.

    ``shadow`` has the tensor's shape and holds flat positions in ``(batch, head, query, channel)`` or, from the
    projection on, ``(batch, query, out)``.
    """

    path: ValuePath
    stage: str
    shadow: Tensor


class ValueTap(Tap):
    """A tap that also follows what becomes of every call's output: :attr:`paths`, in order of the calls."""

    def __init__(
        self,
        module: nn.Module,
        sink: Sink | None = None,
        *,
        heads: Callable[[str], int | None] | None = None,
        grad: bool = False,
        kernels: Iterable[str] = (),
    ) -> None:
        super().__init__(module, sink, heads=heads, grad=grad, kernels=kernels)
        self.paths: list[ValuePath] = []
        self._latest: Record | None = None
        self._trails: dict[int, tuple[weakref.ref[Tensor], _Trail]] = {}
        self._handlers = {
            **self._handlers,
            **dict.fromkeys(MOVES, self._move),
            **dict.fromkeys(ADDITIONS, self._sum),
            F.linear: self._linear,
            F.layer_norm: self._normalise,
        }

    def path(self, record: Record) -> ValuePath:
        """The path of one of the tap's records."""
        return next(path for path in self.paths if path.record is record)

    # ----------------------------------------------------------------------------- attention itself

    def _emit(self, record: Record) -> None:
        self._latest = record
        super()._emit(record)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        out = super()._attention(func, args, kwargs)
        self._begin(out)
        return out

    def _multiply(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._latest = None
        out = super()._multiply(func, args, kwargs)
        self._begin(out)
        return out

    def _begin(self, out: Any) -> None:
        record, self._latest = self._latest, None
        if record is None:
            return
        path = ValuePath(record)
        self.paths.append(path)
        self._trails = {key: entry for key, entry in self._trails.items() if entry[0]() is not None}
        known = getattr(record, "out", None)
        if known is not None and known.numel() == out.numel():
            with quiet():
                self._follow(out, _Trail(path, "heads", _positions(out.shape, out.device)))

    # ----------------------------------------------------------------------------- what follows it

    def _carry(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = super()._carry(func, args, kwargs)
        return self._moved(func, args, kwargs, out)

    def _move(self, func: Any, args: Any, kwargs: Any) -> Any:
        return self._moved(func, args, kwargs, func(*args, **kwargs))

    def _moved(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        trail = self._trail(args[:1])
        if trail is not None and isinstance(out, Tensor):
            with quiet():
                shadow = trail.shadow.contiguous()  # so that every view of the original is a view of it too
                shadow = shadow if func in KEEPS_LAYOUT else func(shadow, *args[1:], **kwargs)
                if shadow.shape == out.shape:
                    self._follow(out, _Trail(trail.path, trail.stage, shadow))
        return out

    def _linear(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        trail = self._trail(args[:1])
        if trail is not None and trail.stage == "heads":
            with quiet():
                shadow = _project(trail, out, *args[1:], **kwargs)
                if shadow is not None:
                    self._follow(out, _Trail(trail.path, "projected", shadow))
        return out

    def _weigh(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = super()._weigh(func, args, kwargs)
        trail = self._trail(args)
        if trail is not None and trail.stage == "projected" and len(args) == 2:
            with quiet():
                by = args[1] if self._trail(args[:1]) is trail else args[0]
                scale = _channel_scale(by, trail)
                if scale is not None:
                    trail.path.scale = trail.path.scale * scale
                    self._follow(out, trail)
        return out

    def _sum(self, func: Any, args: Any, kwargs: Any) -> Any:
        trail = self._trail(args)
        if trail is None or trail.stage != "projected" or len(args) != 2 or kwargs:
            return func(*args, **kwargs)
        other = args[1] if self._trail(args[:1]) is trail else args[0]
        if not isinstance(other, Tensor) or other.shape != trail.shadow.shape:
            return func(*args, **kwargs)
        with quiet():
            residual = _arranged(other, trail)  # before an in-place sum overwrites it
        out = func(*args, **kwargs)
        with quiet():
            trail.path.residual, trail.path.total = residual, _arranged(out, trail)
            self._follow(out, _Trail(trail.path, "total", trail.shadow))
        return out

    def _normalise(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        trail = self._trail(args[:1])
        if trail is not None and trail.stage == "total" and trail.path.norm is None:
            with quiet():
                trail.path.norm = _norm(trail, out, *args[1:], **kwargs)
        return out

    # ------------------------------------------------------------------------------------ memory

    def _follow(self, tensor: Tensor, trail: _Trail) -> None:
        # Identity is safe only while the tensor lives: ids are reused after it dies.
        self._trails[id(tensor)] = (weakref.ref(tensor), trail)

    def _trail(self, candidates: Sequence[Any]) -> _Trail | None:
        for tensor in candidates:
            entry = self._trails.get(id(tensor))
            if entry is not None and entry[0]() is tensor:
                return entry[1]
        return None


def trace_values(
    source: AttentionSource, batch: Batch, *, sites: Sequence[str] | None = None
) -> Mapping[CallKey, ValuePath]:
    """Run the source's forward once and follow every call's output: value paths by call.

    ``sites`` limits which (default: all). Raises UsageError for an unknown site, CaptureError where a layer was
    missed. Holds v and the outputs of all wanted layers: for one batch at a time.
    """
    known = {site.id: site for site in source.sites}
    wanted = list(known if sites is None else sites)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        raise UsageError(f"trace_values: no sites {unknown}", remedy=f"choose from {', '.join(known)}")
    taps: list[ValueTap] = []
    records: dict[CallKey, Record] = {}

    def make_tap(*args: Any, **kwargs: Any) -> ValueTap:
        taps.append(ValueTap(*args, **kwargs))
        return taps[-1]

    def take(call: CallKey, record: Record) -> None:
        if call.site in wanted:
            records[call] = record

    with torch.no_grad():
        tapped_forward(source, batch, take, needed=[known[s] for s in wanted], make_tap=make_tap)
    by_record = {id(path.record): path for path in taps[0].paths}
    return {call: by_record.get(id(record)) or ValuePath(record) for call, record in records.items()}


def _positions(shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), device=device).reshape(tuple(shape))


def _project(trail: _Trail, out: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """Note the projection; the shadow of its output, or None where it mixes more than one query's heads."""
    path, (_, heads, queries, _) = trail.path, trail.path.shape
    channels = path.record.out.shape[-1]  # type: ignore[attr-defined]  # a trail begins with a known output
    source = trail.shadow
    if source.shape[-1] != heads * channels or weight.dim() != 2:
        return None
    token = source // (heads * queries * channels) * queries + source // channels % queries
    column = source // (queries * channels) % heads * channels + source % channels
    if not bool((token == token[..., :1]).all()) or not bool((column == column.flatten(0, -2)[:1]).all()):
        return None
    width = weight.shape[0]
    by_column = torch.empty_like(weight)
    by_column[:, column.flatten(0, -2)[0]] = weight.detach()
    path.weight = by_column.T.reshape(heads, channels, width)
    path.bias = None if bias is None else bias.detach()
    shadow: Tensor = token[..., :1] * width + torch.arange(width, device=token.device)
    path.projected = _arranged(out, _Trail(path, "projected", shadow), width)
    return shadow


def _arranged(tensor: Tensor, trail: _Trail, width: int | None = None) -> Tensor:
    """A tensor that lies as the trail's, as ``(batch, query, out)``; NaN where the model dropped a query."""
    batch, _, queries, _ = trail.path.shape
    if width is None:
        assert trail.path.weight is not None
        width = trail.path.weight.shape[-1]
    flat = tensor.new_full((batch * queries * width,), float("nan"))
    flat[trail.shadow.flatten()] = tensor.detach().flatten()
    return flat.reshape(batch, queries, width)


def _channel_scale(by: Any, trail: _Trail) -> Tensor | float | None:
    """A number, or one number for each output channel, with which the projection is multiplied; else None."""
    if isinstance(by, int | float):
        return float(by)
    width = trail.path.weight.shape[-1] if trail.path.weight is not None else 0
    if not isinstance(by, Tensor) or by.numel() not in (1, width) or by.shape[-1:].numel() != by.numel():
        return None
    in_order = torch.arange(width, device=trail.shadow.device).expand(trail.shadow.shape[-1:])
    return by.detach().reshape(-1) if bool((trail.shadow % width == in_order).all()) else None


def _norm(
    trail: _Trail,
    out: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Norm | None:
    if len(tuple(normalized_shape)) != 1:
        return None
    weight, bias = (None if t is None else t.detach() for t in (weight, bias))
    return Norm(weight, bias, eps, _arranged(out, trail))


def missing(path: ValuePath, what: str) -> CaptureError:
    """The error for a part of the path that was not seen."""
    return CaptureError(
        f"values: the {what} of {path.record.name or 'the root module'} was not seen",
        remedy="its attention output must reach an nn.Linear, a sum and a LayerNorm through reshapes alone",
    )
