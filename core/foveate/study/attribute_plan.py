"""Which methods, with which options, at what price: decided before an attribution job starts.

Methods that differ in pooling alone (``ig`` and ``ig_abs``) are one computation; they are grouped here so
that the job runs it once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from foveate.attribution.objective import Objective
from foveate.attribution.pixels import Cost, PixelMethod
from foveate.errors import CaptureError, UsageError
from foveate.plugins.manager import plugin_manager

if TYPE_CHECKING:
    from foveate.interfaces import Attribution, AttributionMap

DEFAULT_METHODS = (
    "readout",
    "rollout",
    "grad_attention",
    "chefer_iccv21",
    "legrad",
    "gradcam",
    "saliency_abs",
    "inputxgrad_abs",
    "ig",
    "ig_abs",
    "occlusion",
)
"""What ``default`` stands for: attention's own maps and the gradient and perturbation maps that are cheap."""

UNSTORED = ("rows",)
"""Options that change the memory a job takes, not its result."""


@dataclass(frozen=True)
class Estimate:
    """The price of one method over a run; seconds are of this machine, from one timed pass."""

    method: str
    rows: int
    forward: int
    backward: int
    evaluations_per_patch: float
    seconds: float


def build_methods(
    names: Sequence[str], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Attribution]:
    """Methods by name, each once, in order; ``default`` expands to :data:`DEFAULT_METHODS`.

    ``options`` maps a method's name to its options. Raises UsageError for unknown methods and options.
    """
    options = dict(options or {})
    wanted = list(dict.fromkeys(n for name in names for n in (DEFAULT_METHODS if name == "default" else (name,))))
    stray = sorted(set(options) - set(wanted))
    if stray:
        raise UsageError(f"options for {', '.join(stray)}, which is not among the methods", remedy="add --method")
    return [_build(name, dict(options.get(name, {}))) for name in wanted]


def fitting(
    methods: Sequence[Attribution], asked: Sequence[str], objective: Objective
) -> tuple[list[Attribution], dict[str, str]]:
    """Of the methods on clips, those that the model allows; and the others with the reason.

    Only attention and token methods that came with ``default`` are tried (on one target row) and may be left out:
    a tracker's attention is seldom a picture. What was asked for by name stays, and says itself why it cannot.
    Raises UsageError where none is left.
    """
    if not objective.frames:
        return list(methods), {}
    one, left_out = objective.take([0]), {}
    for method in methods:
        if method.name in asked or isinstance(method, PixelMethod):
            continue
        try:
            method.attribute(one.source, one.batch, one.bound)
        except (UsageError, CaptureError) as error:
            left_out[method.name] = error.message
    kept = [method for method in methods if method.name not in left_out]
    if not kept:
        raise UsageError(
            f"no method fits this model: {'; '.join(left_out.values())}", remedy="--method saliency_abs"
        )
    return kept, left_out


def with_rows(methods: Sequence[Attribution], rows: int) -> list[Attribution]:
    """The methods with the rows of one pass of the model fixed, where they take it and left it open."""
    return [_with_rows(method, rows) for method in methods]


def method_options(method: Attribution) -> dict[str, Any]:
    """All options of a method with their values, as they are stored with its maps."""
    return {name: getattr(method, name) for name in _option_names(type(method)) if name not in UNSTORED}


def method_cost(method: Attribution, shape: tuple[int, ...]) -> Cost:
    """Model evaluations a target row; a stranger's method that does not say counts as one pass each way."""
    cost = getattr(method, "cost", None)
    return cost(shape) if callable(cost) else Cost(1, 1)


def explain_all(
    methods: Sequence[Attribution], objective: Objective, *, seed: int
) -> Iterable[tuple[str, AttributionMap]]:
    """Every method on one batch; what differs in pooling alone is computed once."""
    for group in _by_recipe(methods):
        first = group[0]
        if isinstance(first, PixelMethod):
            pixels = first.pixels(objective.limited(first.rows), seed=seed)
            for method in group:
                assert isinstance(method, PixelMethod)  # a recipe is shared by pixel methods only
                yield method.name, method.pooled(pixels, objective.limited(method.rows), seed=seed)
        else:
            yield first.name, first.attribute(objective.source, objective.batch, objective.bound, seed=seed)


def estimate(methods: Sequence[Attribution], objective: Objective, *, rows: int) -> list[Estimate]:
    """The price of each method for ``rows`` target rows, timed on ``objective``'s first row."""
    shape = objective.map_shape
    forward, backward = _seconds_a_row(objective)
    found = []
    for group in _by_recipe(methods):
        for position, method in enumerate(group):
            cost = method_cost(method, shape) if position == 0 else Cost(0)
            total = Cost(cost.forward * rows, cost.backward * rows)
            # A backward pass needs its own forward with the graph kept, which is what was timed.
            seconds = (total.forward - total.backward) * forward + total.backward * backward
            per_patch = cost.forward / math.prod(shape)
            found.append(Estimate(method.name, rows, total.forward, total.backward, per_patch, max(0.0, seconds)))
    return found


def _build(name: str, options: dict[str, Any]) -> Attribution:
    spec = plugin_manager().spec("attribution", name)
    try:
        method: Attribution = spec.create(**options)
    except TypeError as error:
        known = _option_names(spec.load())
        raise UsageError(
            f"method {name}: {error}", remedy=f"options: {', '.join(known)}" if known else "it takes no options"
        ) from error
    return method


def _with_rows(method: Any, rows: int) -> Any:
    left_open = "rows" in _option_names(type(method)) and method.rows is None
    return replace(method, rows=rows) if left_open else method


def _option_names(kind: Any) -> list[str]:
    return [f.name for f in fields(kind)] if is_dataclass(kind) else []


def _by_recipe(methods: Sequence[Attribution]) -> list[list[Attribution]]:
    """Methods that share their pixel numbers, together, in the order of their first."""
    groups: dict[tuple[Any, ...], list[Attribution]] = {}
    for method in methods:
        groups.setdefault(_recipe(method), []).append(method)
    return list(groups.values())


def _recipe(method: Attribution) -> tuple[Any, ...]:
    if not isinstance(method, PixelMethod):
        return (method.name,)
    options = {name: value for name, value in method_options(method).items() if name != "pooling"}
    return (method.name.removesuffix("_abs"), *sorted(options.items()))


def _seconds_a_row(objective: Objective) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and backward pass, one row at a time."""
    one = objective.take([0])

    def forward() -> None:
        with torch.no_grad():
            one(one.inputs)

    def backward() -> None:
        x = one.inputs.clone().requires_grad_()
        torch.autograd.grad(one(x, one.index).sum(), x)

    return _best_of(forward), _best_of(backward)


def _best_of(work: Any, repeats: int = 3) -> float:
    """The fastest of a few runs: the first pays for warming up."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
