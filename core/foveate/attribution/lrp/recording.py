"""A forward pass as a list of elementary operations with exact values, whatever the model's code looks like.

Relevance rules need the values that each operation took. A ``TorchDispatchMode`` sees torch's own elementary
operations (``addmm``, ``bmm``, ``_softmax``, ...) below every module and function, so that one rule for ``bmm``
serves einsum, ``@``, ``nn.MultiheadAttention`` and SDPA, which is told to run as its mathematical definition.

Each operation is run twice: as the model does, and in float64 on the results so far. Rules work on the second.
They divide by sums that nearly cancel, and a forward's float32 rounding alone can make another map.

A tensor is known by the memory that it shows (:class:`Value`): autograd hands views on as new Python objects.
All recorded tensors are kept, so no address is used twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from foveate.capture.forward import eager_stance
from foveate.capture.owners import Owners


class Value(NamedTuple):
    """What a tensor shows: memory, where in it, and how. Equal for equal views of the same numbers."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        """The identity of one strided tensor."""
        place = tensor.untyped_storage()._cdata
        return cls(place, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype)


@dataclass(frozen=True, eq=False)
class Operation:
    """One call of a torch operation in float64. ``results`` are the model's own, in its precision and graph.

    ``owner`` is the path of the module that made the call.
    """

    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    outputs: tuple[Tensor, ...]
    results: tuple[Tensor, ...]
    owner: str

    @property
    def name(self) -> str:
        """Without overload: ``addmm``, ``add``, ``native_layer_norm``."""
        return str(self.function.overloadpacket.__name__)

    @property
    def in_place(self) -> bool:
        """Whether it overwrites one of its arguments."""
        return bool(self.function._schema.is_mutable)


class Recording(TorchDispatchMode):
    """The operations, in order, whose result depends on ``inputs``; everything else counts as a constant."""

    def __init__(self, inputs: Tensor, owners: Owners) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self._owners = owners
        self._inputs = inputs
        self._exact: dict[Value, Tensor] = {}
        self._computed: set[Value] = set()
        self._note(inputs, inputs.detach().double())

    def depends(self, tensor: Any) -> bool:
        """Whether a float64 operand was computed from the inputs."""
        return isinstance(tensor, Tensor) and Value.of(tensor) in self._computed

    def exact(self, result: Tensor) -> Tensor | None:
        """The float64 twin of one of the model's tensors; None for a constant."""
        return self._exact.get(Value.of(result))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation, and once more in float64 where it depends on the inputs."""
        kwargs = kwargs or {}
        given = (value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor))
        if all(self.exact(value) is None for value in given):
            return func(*args, **kwargs)
        arguments, options = tree_map(self._widened, (args, kwargs))
        if func is torch.ops.aten._softmax.default:  # the third asks a CUDA kernel for float32 out of float16
            arguments = (*arguments[:2], False)
        outputs = _tensors(func(*arguments, **options))
        result = func(*args, **kwargs)
        owner = self._owners.current() or ""
        self.operations.append(Operation(func, arguments, options, outputs, _tensors(result), owner))
        for own, exact in zip(_tensors(result), outputs, strict=True):
            self._note(own, exact)
        return result

    def _note(self, own: Tensor, exact: Tensor) -> None:
        self._exact[Value.of(own)] = exact
        self._computed.add(Value.of(exact))

    def _widened(self, value: Any) -> Any:
        """An argument as the float64 run takes it: twins of what was computed, constants and dtypes widened."""
        if isinstance(value, torch.dtype):
            return torch.float64 if value.is_floating_point else value
        if not isinstance(value, Tensor):
            return value
        exact = self.exact(value)
        if exact is not None:
            return exact
        return value.detach().double() if value.is_floating_point() else value


@contextmanager
def recording(module: nn.Module, inputs: Tensor) -> Iterator[Recording]:
    """Record what runs inside the block, with gradients, every fused attention taken apart."""
    mode = Recording(inputs, Owners(module))
    with torch.enable_grad(), eager_stance(module), sdpa_kernel([SDPBackend.MATH]), mode:
        yield mode


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return tuple(value for value in tree_iter(result) if isinstance(value, Tensor))
