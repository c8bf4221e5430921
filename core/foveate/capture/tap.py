"""The tap: sees every attention call of a running model and leaves a lazy record of each.

One ``TorchFunctionMode`` watches ``F.scaled_dot_product_attention``, ``F.multi_head_attention_forward``, softmax
in its spellings and ``F.grid_sample``. The model keeps its own fast attention, nothing is patched (but the
entries of deformable kernels, see :mod:`foveate.capture.kernels`) and no hook is set, so there is nothing to
undo when a forward raises. ``nn.MultiheadAttention``'s C++ fast path switches itself off under the mode (at most
7e-7 apart from the Python path).

A softmax is attention only if its result is multiplied with values: the tap follows the weights through casts and
reshapes to that product (:mod:`foveate.capture.follow`). Everything else it lets pass.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import FunctionType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from foveate.capture import editing
from foveate.capture.dense import DenseRecord
from foveate.capture.follow import ADDITIONS, CARRIERS, DIVISIONS, PRODUCTS, Follower
from foveate.capture.kernels import kernel_entries
from foveate.capture.owners import Owners
from foveate.capture.records import Record
from foveate.capture.sampled_call import complete
from foveate.errors import CaptureError

Sink = Callable[[Record], None]

SOFTMAXES: tuple[Callable[..., Any], ...] = (
    F.softmax,
    torch.softmax,
    torch.special.softmax,
    Tensor.softmax,
)

_local = threading.local()


@contextmanager
def unseen() -> Iterator[None]:
    """Work that no tap of this thread looks at."""
    before = getattr(_local, "quiet", False)
    _local.quiet = True
    try:
        yield
    finally:
        _local.quiet = before


@contextmanager
def quiet() -> Iterator[None]:
    """The engine's own work: gradients off, exact precision, and unseen by every tap of this thread."""
    with unseen(), torch.no_grad(), torch.autocast("cpu", enabled=False), _no_cuda_autocast():
        yield


@contextmanager
def own_work(like: Tensor) -> Iterator[None]:
    """Work of an editor: seen by no tap, in the dtypes it says, with gradients as the caller has them."""
    with unseen(), torch.autocast(like.device.type, enabled=False):
        yield


class Tap(TorchFunctionMode):
    """Record the attention calls of ``module`` while active::

        with Tap(model) as tap:
            model(x)
        tap.records[0].rows([0])  # (batch, head, 1, key)

    ``sink`` receives each record when its call is complete (default: append to :attr:`records`).
    ``heads`` says how many heads share the first axis of three-axis calls, by module path. With ``grad``
    an output that no gradient reaches (learned queries behind frozen weights) becomes a leaf, so
    that dL/dO exists for every call. ``kernels`` names further functions that compute deformable attention below
    torch (:mod:`foveate.capture.kernels`). Raises CaptureError where the mode cannot see the forward.
    """

    def __init__(
        self,
        module: nn.Module,
        sink: Sink | None = None,
        *,
        heads: Callable[[str], int | None] | None = None,
        grad: bool = False,
        kernels: Iterable[str] = (),
    ) -> None:
        super().__init__()
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise CaptureError(
                f"Tap: {type(module).__name__} runs its replicas on other threads, where nothing is seen",
                remedy="pass its .module",
            )
        self.records: list[Record] = []
        self.unlinked: list[Record] = []
        """Softmaxes whose result met no values while the tap watched: class probabilities, mostly."""
        self.owners = Owners(module)
        self.grad = grad
        self._sink: Sink = sink or self.records.append
        self._heads = heads or (lambda path: None)
        self._follower = Follower(self._emit, self.unlinked.append)
        self._started: Counter[str] = Counter()
        self._kernels, self._entries = tuple(kernels), ExitStack()
        self._thread: int | None = None
        self._handlers: Mapping[Callable[..., Any], Callable[..., Any]] = {
            F.scaled_dot_product_attention: self._attention,
            F.multi_head_attention_forward: self._multi_head,
            F.grid_sample: self._sample,
            Tensor.__getitem__: self._gather,
            Tensor.mul: self._weigh,
            Tensor.__mul__: self._weigh,
            torch.mul: self._weigh,
            Tensor.sum: self._add_up,
            torch.sum: self._add_up,
            complete: self._complete,
            **dict.fromkeys((*ADDITIONS, *DIVISIONS), self._rescale),
            **dict.fromkeys(CARRIERS, self._carry),
            **dict.fromkeys(PRODUCTS, self._multiply),
            **dict.fromkeys(SOFTMAXES, self._softmax),
        }

    def __enter__(self) -> Tap:
        if self._thread is not None:
            raise CaptureError("Tap: already active", remedy="make a new Tap for a nested capture")
        self._entries.enter_context(kernel_entries(self.owners.root, self._kernels))
        self._thread = threading.get_ident()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._entries.close()
        if threading.get_ident() != self._thread:
            raise CaptureError("Tap: entered on one thread and left on another", remedy="use it on one thread")
        self._thread = None
        self._follower.finish()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every call through; look at those that can be attention."""
        handler = self._handlers.get(func)
        if handler is None or getattr(_local, "quiet", False):
            return func(*args, **(kwargs or {}))
        editor = editing.current()
        if editor is not None:
            return editor.around(self._run, func, args, kwargs or {})
        return handler(func, args, kwargs or {})

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run and record one call, whichever an editor made of it."""
        handler = self._handlers.get(func)
        return func(*args, **kwargs) if handler is None else handler(func, args, kwargs)

    # ------------------------------------------------------------------------------- whole calls

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        name = self._owner()
        record = _dense(name, self._in_graph(out), self._head_count(name), *args, **kwargs)
        record.ordinal = self._count(name)
        self._emit(record)
        return out

    def _multi_head(self, func: FunctionType, args: Any, kwargs: Any) -> Any:
        """Run the body of ``F.multi_head_attention_forward`` under the tap, so that its inner calls are seen.

        The body begins by asking whether a mode wants to handle it, which has just happened; a copy of the
        function whose globals answer "no" runs the same code without touching torch's own module.
        """
        body = FunctionType(
            func.__code__,
            {**func.__globals__, "has_torch_function": lambda operands: False},
            func.__name__,
            func.__defaults__,
            func.__closure__,
        )
        with functional_heads(int(kwargs.get("num_heads", args[4] if len(args) > 4 else 1))), self._again():
            return body(*args, **kwargs)

    # ------------------------------------------------------------------------- weights and values

    def _softmax(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        out: Tensor = func(*args, **kwargs)
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if isinstance(out, Tensor) and out.dim() >= 2 and isinstance(dim, int):
            name = self._owner()
            scores = args[0] if args else kwargs.get("input")
            heads, number = self._head_count(name), self._count(name)
            self._follower.start(name, self._in_graph(out), dim % out.dim(), heads, scores, ordinal=number)
        return out

    def _carry(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.carry(args, out)
        return out

    def _rescale(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.rescale(func, args, out)
        return out

    def _multiply(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.multiply(func, args, out)
        return out

    def _sample(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.sample(self._owner(), args, kwargs)
        return out

    def _gather(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.gather(self._owner, args)
        return out

    def _weigh(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        self._follower.weigh(args, out)
        return out

    def _add_up(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if self._follower.weighed(args):
            self._follower.add_up(args, self._in_graph(out))
        return out

    def _complete(self, func: Any, args: Any, kwargs: Any) -> Any:
        out, call, weights = func(*args, **kwargs), args[1], args[2]
        self._follower.completed(call, weights, self._in_graph(out), self._owner())
        return out

    # ------------------------------------------------------------------------------------ helpers

    def _emit(self, record: Record) -> None:
        with quiet():
            self._sink(record)

    def _owner(self) -> str:
        path = self.owners.current()
        return "" if path is None else path

    def _count(self, name: str) -> int:
        """How many softmaxes and fused calls the module started before this one."""
        number = self._started[name]
        self._started[name] += 1
        return number

    def _head_count(self, name: str) -> int:
        """Heads in the first axis of a three-axis call: said by the function, the caller or the module."""
        return head_count(self.owners.module(name), self._heads(name))

    def _in_graph(self, tensor: Tensor) -> Tensor:
        if self.grad and torch.is_grad_enabled() and not tensor.requires_grad:
            tensor.requires_grad_()
        return tensor

    @contextmanager
    def _again(self) -> Iterator[None]:
        """This mode, active once more inside one of its own handlers."""
        super().__enter__()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            super().__exit__(None, None, None)  # type: ignore[no-untyped-call]


@contextmanager
def functional_heads(heads: int) -> Iterator[None]:
    """Inside ``F.multi_head_attention_forward``, which says its heads; every tap of this thread may ask."""
    before = getattr(_local, "heads", None)
    _local.heads = heads
    try:
        yield
    finally:
        _local.heads = before


def head_count(module: nn.Module, declared: int | None) -> int:
    """Heads in the first axis of a three-axis call of ``module``; 1 where nobody says."""
    said: int | None = getattr(_local, "heads", None)
    if said is not None:
        return said
    if declared is not None:
        return declared
    return module.num_heads if isinstance(module, nn.MultiheadAttention) else 1


def _dense(
    name: str,
    out: Tensor,
    heads: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> DenseRecord:
    """A record from the arguments of ``F.scaled_dot_product_attention``, by its own signature."""
    return DenseRecord(
        name,
        query,
        key,
        value,
        out,
        mask=attn_mask,
        scale=scale,
        causal=is_causal,
        dropout=dropout_p,
        heads=heads,
    )


@contextmanager
def _no_cuda_autocast() -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    with torch.autocast("cuda", enabled=False):
        yield
