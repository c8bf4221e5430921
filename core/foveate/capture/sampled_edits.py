"""Deformable calls that interventions change: followed from the softmax to the sum of the weighted samples.

Nothing is changed on the way. At the end the call's points become shares of cells, the shares are changed, and
every tap is told what ran instead (:func:`~foveate.capture.sampled_call.complete`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.capture.editing import Run
from foveate.capture.follow import CARRIERS, Follower, Pending
from foveate.capture.owners import Owners
from foveate.capture.records import Record
from foveate.capture.sampled_call import SampledCall, complete
from foveate.capture.sampled_scores import SampledScores
from foveate.capture.tap import own_work
from foveate.capture.values import HeadValues, constant_values

SUMS = (Tensor.sum, torch.sum)
PRODUCTS = (Tensor.mul, Tensor.__mul__, torch.mul)
SAMPLING = frozenset({*CARRIERS, *PRODUCTS, *SUMS, F.grid_sample, Tensor.__getitem__, complete})
"""What may lie between the softmax of a deformable call and its end."""

Wanted = TypeVar("Wanted")


class SampledEdits(Generic[Wanted]):
    """Deformable calls that wait for their end; ``change`` edits scores and says what heads put out instead."""

    def __init__(self, owners: Owners, change: Callable[[SampledScores, Wanted], HeadValues]) -> None:
        self._owners, self._change = owners, change
        self._follower = Follower(_forget, _forget)
        self._wanted: dict[Pending, Wanted] = {}

    @property
    def waiting(self) -> bool:
        """Whether any call is on its way."""
        return bool(self._wanted)

    def start(self, name: str, weights: Tensor, dim: int, wanted: Wanted) -> None:
        """A softmax of deformable attention that is to be changed."""
        self._wanted[self._follower.start(name, weights, dim, 1)] = wanted

    def around(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        """Run one call of :data:`SAMPLING`; the end of a call that waits is changed."""
        if func is complete:
            return self._completed(run, args, kwargs)
        if func in SUMS:
            return self._added_up(run, func, args, kwargs)
        out = run(func, args, kwargs)
        if func is F.grid_sample:
            self._follower.sample(self._owner(), args, kwargs)
        elif func is Tensor.__getitem__:
            self._follower.gather(self._owner, args)
        elif func in CARRIERS:
            self._follower.carry(args, out)
        else:
            self._follower.weigh(args, out)
        return out

    def _added_up(self, run: Run, func: Any, args: Any, kwargs: Any) -> Any:
        pending = self._follower.find(args[:1])
        if pending is None or not pending.weighed:
            return run(func, args, kwargs)
        call = SampledCall(pending.name, pending.weights, pending.levels)
        return self._finish(pending, call, args[0], args[0].shape[:-1], run, lambda: run(func, args, kwargs))

    def _completed(self, run: Run, args: Any, kwargs: Any) -> Any:
        out, call, weights = args
        pending = self._follower.find((weights,)) or self._follower.of_size(weights.numel(), self._owner())
        if pending is None:
            return run(complete, args, kwargs)
        return self._finish(pending, call(), weights, out.shape, run, lambda: run(complete, args, kwargs))

    def _finish(
        self,
        pending: Pending,
        call: SampledCall,
        weights: Tensor,
        like: torch.Size,
        run: Run,
        as_it_is: Callable[[], Tensor],
    ) -> Tensor:
        """The call's output, of shape ``like``: as it is, or what the changed shares make of the values."""
        wanted = self._wanted.pop(pending)
        self._follower.drop(pending)
        with own_work(weights):
            scores = SampledScores(call)
            heads = self._change(scores, wanted)
        if scores.touched:
            with own_work(weights):
                by_head, changed = scores.result()
                made = call.as_output(by_head, like).to(weights.dtype)
            out: Tensor = run(complete, (made, lambda: changed, weights), {})
        else:
            out = as_it_is()
        if not heads:
            return out
        with own_work(weights):
            return call.as_output(constant_values(call.by_head(out), heads), like)

    def _owner(self) -> str:
        return self._owners.current() or ""


def _forget(record: Record) -> None:
    """A sink that keeps nothing."""
