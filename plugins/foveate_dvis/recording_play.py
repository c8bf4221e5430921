"""Recordings played back: modules at the recorded paths whose forward gives the recorded attention.

So everything that looks at a running model (capture, rollout, plots) looks at a recording alike. A softmax of
the logarithms gives the recorded weights again (to 1e-7); they multiply values that mean nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate_dvis.recording import RecordedCall, Recording

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

UNDERFLOW = -1e3
"""Score of a key that has weight 0 and is not masked: its exponential is 0, and it is no mask."""


class Player(nn.Module):
    """Modules of recordings of one model. ``rename``: path here of a recorded module (default: its own)."""

    def __init__(self, recordings: Sequence[Recording], rename: Callable[[str], str] = str) -> None:
        super().__init__()
        self._recordings = tuple(recordings)
        self._scripts: list[list[tuple[str, RecordedCall]]] = [
            [(rename(call.path), call) for call in recording.calls] for recording in recordings
        ]
        for path in dict.fromkeys(path for script in self._scripts for path, _ in script):
            self._place(path)
        self.anchor: Tensor
        self.register_buffer("anchor", torch.zeros(1))

    def _place(self, path: str) -> None:
        *outer, last = path.split(".")
        parent: nn.Module = self
        for part in outer:
            if part not in parent._modules:
                parent.add_module(part, Attending())
            parent = parent.get_submodule(part)
        if last not in parent._modules:
            parent.add_module(last, Attending())

    def calls(self, number: int) -> Mapping[str, list[RecordedCall]]:
        """Calls of one recording by their module's path here, in order."""
        found: dict[str, list[RecordedCall]] = defaultdict(list)
        for path, call in self._scripts[number]:
            found[path].append(call)
        return found

    def forward(self, number: int) -> None:
        """Every call of one recording again, in order."""
        recording = self._recordings[number]
        for path, call in self._scripts[number]:
            module = self.get_submodule(path)
            weights = self._tensor(recording.weights(call))
            if call.form == "deformable":
                where = recording[call.name("locations")]
                shapes = recording[call.name("shapes")]
                module(weights, locations=self._tensor(where), shapes=[(int(h), int(w)) for h, w in shapes])
            else:
                blocked = recording.blocked(call)
                module(weights, blocked=None if blocked is None else self._tensor(blocked))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.anchor.device)


class Attending(nn.Module):
    """One attention module of a recording."""

    def forward(
        self,
        weights: Tensor,
        *,
        blocked: Tensor | None = None,
        locations: Tensor | None = None,
        shapes: list[tuple[int, int]] | None = None,
    ) -> Tensor:
        """Dense ``weights`` (batch, head, query, key), some ``blocked``, or deformable ones with their points."""
        if locations is None or shapes is None:
            hidden = torch.zeros_like(weights, dtype=torch.bool) if blocked is None else blocked
            scores = _logarithm(weights).masked_fill(hidden, -torch.inf)
            values = _values(weights.shape[0] * weights.shape[1] * weights.shape[3], weights)
            return torch.softmax(scores, -1) @ values.view(*weights.shape[:2], -1, 1)
        return _sampled(weights, locations, shapes)


def _sampled(weights: Tensor, locations: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """``weights`` (batch, query, head, level, point) of samples at ``locations`` (..., 2), (x, y) in [0, 1]."""
    batch, queries, heads, levels, points = weights.shape
    shares = torch.softmax(_logarithm(weights.flatten(-2)), -1).view(weights.shape)
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (batch * head, query, level, point, 2)
    picked = [
        F.grid_sample(
            _values(batch * heads * rows * columns, weights).view(batch * heads, 1, rows, columns),
            grids[:, :, level],
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        for level, (rows, columns) in enumerate(shapes)
    ]
    flat = shares.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
    return (torch.stack(picked, dim=-2).flatten(-2) * flat).sum(-1).view(batch, heads, queries)


def _logarithm(weights: Tensor) -> Tensor:
    return weights.log().clamp_min(UNDERFLOW)


def _values(count: int, like: Tensor) -> Tensor:
    """Values that differ, so that the proof (weights meet the right ones) can fail; positive: none cancel."""
    return 1.5 + 0.5 * torch.arange(count, device=like.device, dtype=like.dtype).remainder(257).sin()
