"""The reference points that a deformable attention module was told: what its sampling points are placed around.

Zhu et al. 2021 (arXiv:2010.04159, eq. 3) place the points at p_q + offset. A record of the sampling holds the sum
only; p_q, and with iterative refinement the box that scales the offsets, is an argument of the module. It is read
there, by a hook that lasts for one forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENT = "reference_points"


class ReferencePoints:
    """``with ReferencePoints(model, paths) as heard: model(x)``; then ``heard.at(path)`` is the latest.

    Hooks are gone when the block ends, by an exception too.
    """

    def __init__(self, module: nn.Module, paths: Iterable[str]) -> None:
        self._module, self._paths = module, {path.partition("#")[0] for path in paths}
        self._heard: dict[str, Tensor] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> ReferencePoints:
        for path in sorted(self._paths):
            child = self._module.get_submodule(path)
            order = list(inspect.signature(child.forward).parameters)
            place = order.index(ARGUMENT) if ARGUMENT in order else None

            def listen(_: Any, args: Any, kwargs: Any, path: str = path, place: int | None = place) -> None:
                found = kwargs.get(ARGUMENT)
                if found is None and place is not None and place < len(args):
                    found = args[place]
                if isinstance(found, Tensor):
                    self._heard[path] = found.detach()

            self._hooks.callback(child.register_forward_pre_hook(listen, with_kwargs=True).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def at(self, path: str, batch: int, size: tuple[int, ...]) -> Tensor | None:
        """The latest references of a module as float32 ``(batch, query, 4)``: y, x, height, width.

        In pixels of an input of ``size`` (..., height, width). Height and width are 0 where references are points
        and not boxes. None where the module was told none. One reference for each level (they differ by the
        rounding of each level's own padding) becomes their mean.
        """
        found = self._heard.get(path.partition("#")[0])
        if found is None or found.dim() < 3 or found.shape[-1] not in (2, 4):
            return None
        points = found.double().reshape(found.shape[0], found.shape[1], -1, found.shape[-1]).mean(2)
        points = points.expand(batch, -1, -1)
        scale = torch.tensor([size[-1], size[-2]] * 2, dtype=points.dtype, device=points.device)
        scaled = points * scale[: points.shape[-1]]
        y_x = scaled[..., [1, 0]]
        extent = scaled[..., [3, 2]] if scaled.shape[-1] == 4 else torch.zeros_like(y_x)
        return torch.cat([y_x, extent], -1).float().cpu()
