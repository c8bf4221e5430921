"""Deformable attention in a fused kernel: its arguments are the record, at named entries.

A compiled kernel (the authors' CUDA ``ms_deform_attn``, mmcv's, one from the kernels hub) samples and sums below
everything that a tap can see; the softmax is the last that is seen. While a tap is active the kernel's Python
entry is wrapped: the kernel runs, and then every tap is told of the call from the kernel's own arguments,
values, spatial shapes, sampling locations and attention weights. An entry that runs in plain torch has been
recorded by then, and nothing is added. Entries are put back when the last tap leaves, after exceptions too.

Entries are

- every module of a class named in :data:`KERNEL_MODULES` (transformers' hub layer, whose ``forward`` the
  ``kernels`` package swaps), and
- functions given by name, ``"package.module:function"`` or ``"package.module:Class.apply"``: those in
  :data:`KERNEL_FUNCTIONS`, where they are loaded, and those that the source lists in ``kernels``.

Which argument is which is read from the names of the entry's parameters, else from their usual order: value,
spatial shapes, (level starts,) locations, weights. Locations are ``(batch, query, head, level, point, 2)`` in
[0, 1] as (x, y), zero outside, pixel centres at (i + 0.5) / size (``align_corners=False``): what all these
kernels compute. A kernel that computes anything else does not pass the certificate.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from foveate.capture.deformable import Level
from foveate.capture.sampled_call import SampledCall, complete
from foveate.errors import CaptureError

KERNEL_MODULES = ("MultiScaleDeformableAttention",)
KERNEL_FUNCTIONS = (
    "MultiScaleDeformableAttention:ms_deform_attn_forward",
    "mmcv.ops.multi_scale_deform_attn:MultiScaleDeformableAttnFunction.apply",
)
_NAMES = {
    "value": ("value", "values"),
    "shapes": ("value_spatial_shapes_list", "spatial_shapes_list", "value_spatial_shapes", "spatial_shapes"),
    "locations": ("sampling_locations", "sampling_loc", "sampling_locs"),
    "weights": ("attention_weights", "attn_weight", "attn_weights"),
}
_POINTS, _METHOD = "num_points_list", "method"
_MARK = "__foveate_kernel__"


class Arguments(NamedTuple):
    """What a kernel was called with; ``points`` are those of each level where they differ between levels."""

    value: Tensor
    shapes: Any
    locations: Tensor
    weights: Tensor
    points: Sequence[int] | None = None


@contextmanager
def kernel_entries(root: nn.Module, named: Iterable[str] = ()) -> Iterator[None]:
    """Tell the taps of this thread about kernels that ``root`` runs while the context is open.

    Raises CaptureError for a name in ``named`` that does not exist.
    """
    with ExitStack() as stack:
        for module in root.modules():
            if type(module).__name__ in KERNEL_MODULES:
                stack.enter_context(_wrapped(module, "forward"))
        for name in KERNEL_FUNCTIONS:
            if name.partition(":")[0] in sys.modules:
                stack.enter_context(_wrapped(*_place(name)))
        for name in named:
            stack.enter_context(_wrapped(*_place(name)))
        yield


@contextmanager
def _wrapped(owner: Any, name: str) -> Iterator[None]:
    """``owner.name`` with word to the taps after each call; as it was when the context ends."""
    original = getattr(owner, name)
    if getattr(original, _MARK, False):  # an outer tap has done it
        yield
        return
    own = vars(owner).get(name, _MARK)
    wrapper = _telling(original)
    setattr(owner, name, staticmethod(wrapper) if inspect.isclass(owner) else wrapper)
    try:
        yield
    finally:
        if own is _MARK:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _telling(original: Callable[..., Any]) -> Callable[..., Any]:
    names = _parameters(original)

    @functools.wraps(original)
    def entry(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        found = _arguments(names, args, kwargs)
        if found is None or not isinstance(out, Tensor):
            return out
        return complete(out, lambda: _call(found), found.weights)

    setattr(entry, _MARK, True)
    return entry


def _call(found: Arguments) -> SampledCall:
    """The call in the words of a record. Raises CaptureError where the arguments contradict each other."""
    batch, keys, heads, width = found.value.shape
    queries = found.weights.shape[1]
    sizes = [(int(height), int(columns)) for height, columns in _listed(found.shapes)]
    points = list(found.points or [found.weights.shape[-1]] * len(sizes))
    weights = found.weights.reshape(batch, queries, heads, -1)
    if sum(map(math.prod, sizes)) != keys or len(points) != len(sizes) or sum(points) != weights.shape[-1]:
        raise CaptureError(
            f"capture: a deformable kernel was given {keys} values for levels {sizes} and {weights.shape[-1]} "
            f"weights for {points} points",
            remedy="the entry is not deformable attention as foveate knows it: leave it out of kernels",
        )
    values = found.value.split([height * columns for height, columns in sizes], 1)
    grids = (2 * found.locations - 1).reshape(batch, queries, heads, -1, 2).transpose(1, 2).flatten(0, 1)
    levels = [
        Level(value.permute(0, 2, 3, 1).reshape(batch * heads, width, *size), grid)
        for value, size, grid in zip(values, sizes, grids.split(points, -2), strict=True)
    ]
    return SampledCall("", weights, levels, layout="query first")


def _listed(shapes: Any) -> Any:
    return shapes.tolist() if isinstance(shapes, Tensor) else shapes


def _parameters(function: Callable[..., Any]) -> list[str]:
    """Names of an entry's parameters; none for compiled functions and for ``Function.apply``."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def _arguments(names: list[str], args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments | None:
    """The arguments, or None where they are not what bilinear deformable attention takes."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    by_name = {
        role: given[next(n for n in found if n in given)] for role, found in _NAMES.items() if {*found} & {*given}
    }
    parts = by_name if len(by_name) == len(_NAMES) else _by_place([*args, *kwargs.values()])
    value, locations, weights = parts.get("value"), parts.get("locations"), parts.get("weights")
    if not (isinstance(value, Tensor) and isinstance(locations, Tensor) and isinstance(weights, Tensor)):
        return None
    fits = value.dim() == 4 and weights.dim() in (4, 5) and locations.shape == (*weights.shape, 2)
    if not fits or given.get(_METHOD, "default") != "default" or (weights.dim() == 4 and _POINTS not in given):
        return None
    return Arguments(
        value, parts["shapes"], locations, weights, given.get(_POINTS) if weights.dim() == 4 else None
    )


def _by_place(given: list[Any]) -> dict[str, Any]:
    """Values first and shapes next; of the other float tensors locations have six axes and weights five."""
    tensors = [one for one in given[1:] if isinstance(one, Tensor) and one.is_floating_point()]
    six, five = (next((t for t in tensors if t.dim() == axes), None) for axes in (6, 5))
    return {"value": given[0], "shapes": given[1], "locations": six, "weights": five} if len(given) > 1 else {}


def _place(name: str) -> tuple[Any, str]:
    """The object that holds a named function, and the function's name in it. Raises CaptureError."""
    module, _, path = name.partition(":")
    *outer, last = path.split(".")
    try:
        owner: Any = importlib.import_module(module)
        for part in outer:
            owner = getattr(owner, part)
        getattr(owner, last)
    except (ImportError, AttributeError) as error:
        raise CaptureError(
            f"capture: no kernel {name!r}: {error}",
            remedy="name it as the caller finds it: 'package.module:function' or 'package.module:Class.apply'",
        ) from None
    return owner, last
