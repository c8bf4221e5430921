"""Running an unknown model under the tap: what is refused first, and how its call is made.

Whatever the tap cannot see it must not miss in silence: replicas and modules on other threads, scripted and
traced code, tensors inside ``vmap``, active dropout, checkpointed segments when gradients are wanted.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from foveate.capture.forward import eager_stance
from foveate.capture.records import Record
from foveate.errors import CaptureError

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor among them, with a name."""
        for number, value in enumerate(self.args):
            yield from _named(str(number), value)
        for name, value in (self.kwargs or {}).items():
            yield from _named(name, value)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same arguments with every tensor changed."""
        return Inputs(_mapped(self.args, change), _mapped(dict(self.kwargs or {}), change))

    def run(self, module: nn.Module) -> Any:
        """Call the model."""
        return module(*self.args, **(self.kwargs or {}))


def plain_module(model: nn.Module) -> nn.Module:
    """The module itself where ``torch.compile`` wrapped it: the same weights, run eagerly.

    Raises CaptureError for what the tap cannot look into.
    """
    if not isinstance(model, nn.Module):
        raise CaptureError(f"wrap: expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    module: nn.Module = inner if isinstance(inner, nn.Module) else model
    for path, child in module.named_modules():
        where = path or "the model"
        if isinstance(child, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise CaptureError(
                f"wrap: {where} is a {type(child).__name__}, whose replicas run where the tap sees nothing",
                remedy="wrap its .module, on one device",
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise CaptureError(
                f"wrap: {where} is scripted or traced code, which runs outside Python",
                remedy="wrap the model that was given to torch.jit",
            )
    return module


def refuse_dropout(module: nn.Module) -> None:
    """Raise CaptureError where dropout would change the weights after they were recorded."""
    active = [path for path, child in module.named_modules() if child.training and _drops(child)]
    if active:
        raise CaptureError(
            f"wrap: dropout is active in {len(active)} modules ({', '.join(active[:3])} ...): what the model "
            "multiplies with values is not what it computed",
            remedy="model.eval()",
        )


def _drops(module: nn.Module) -> bool:
    if isinstance(module, DROPOUTS):
        return module.p > 0
    return isinstance(module, nn.MultiheadAttention) and module.dropout > 0


def refuse_transforms(inputs: Inputs) -> None:
    """Raise CaptureError inside ``torch.func`` transforms and tracing."""
    if torch._C._get_tracing_state() is not None:
        raise CaptureError("wrap: inside torch.jit.trace nothing can be recorded", remedy="capture outside of it")
    for name, tensor in inputs.named():
        refuse_batched(tensor, f"input {name}")


def refuse_batched(tensor: Tensor, where: str) -> None:
    """Raise CaptureError for a tensor of ``vmap``, ``grad`` or ``jvp``."""
    functorch = torch._C._functorch
    if functorch.is_functorch_wrapped_tensor(tensor):
        raise CaptureError(
            f"wrap: {where} is a tensor inside torch.func (vmap, grad): it stands for many, with hidden axes",
            remedy="capture outside the transform, with the batch as an ordinary axis",
        )


def refuse_detached(records: Iterable[Record]) -> None:
    """Raise CaptureError where gradients are wanted and a call left no graph."""
    cut = sorted({record.name for record in records if record.node is None})
    if cut:
        raise CaptureError(
            f"wrap: no gradient reaches the attention of {', '.join(cut[:4])}{' ...' if len(cut) > 4 else ''}: "
            "it ran without a graph (gradient checkpointing with use_reentrant=True, or no_grad in the model)",
            remedy="switch checkpointing off (model.gradient_checkpointing_disable()) for the capture",
        )


HEAD_COUNTS = ("num_heads", "n_heads", "nhead", "n_head", "num_attention_heads", "heads")


@dataclass(frozen=True)
class Heads:
    """How many heads lie in the first axis of calls with three axes: as said, else as the module says."""

    module: nn.Module
    said: int | None = None

    def __call__(self, path: str) -> int | None:
        """Heads of the module at ``path``; None where nothing tells."""
        if self.said is not None:
            return self.said
        owner = self.module.get_submodule(path)
        known = (getattr(owner, name, None) for name in HEAD_COUNTS)
        return next((count for count in known if isinstance(count, int) and count > 0), None)


@contextmanager
def eager(module: nn.Module) -> Iterator[None]:
    """Compiled modules and functions run eagerly: compiled code shows no calls."""
    if "torch._dynamo" not in sys.modules:
        with eager_stance(module):
            yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def one_thread(module: nn.Module) -> Iterator[None]:
    """Raise CaptureError at the end if a part of the model ran on another thread, where no mode is active."""
    paths = {id(child): path for path, child in module.named_modules()}
    home = threading.get_ident()
    elsewhere: list[str] = []

    def look(child: nn.Module, _: Any) -> None:
        if threading.get_ident() != home and id(child) in paths:
            elsewhere.append(paths[id(child)] or "the model")

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
    if elsewhere:
        raise CaptureError(
            f"wrap: {', '.join(elsewhere[:3])} ran on another thread, where the tap sees nothing",
            remedy="run the model on one thread (no DataParallel, no thread pools in forward)",
        )


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _named(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _named(f"{name}.{number}", item)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_mapped(item, change) for item in value)
    return value
