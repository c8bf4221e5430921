"""What stands where something was taken away: a baseline picture, or, in clips, the moment before or after.

``freeze`` repeats the nearest kept frame, so a clip keeps its length and shows nothing that was not there: what it
loses is change. It works place by place (a deleted patch holds what it showed last), and where nothing of a place
is kept it falls back on ``mean``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch

from foveate.attribution.baselines import Baseline, make_baseline
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.attribution.objective import Objective

Replacement = Literal[Baseline, "freeze"]
FREEZE = "freeze"

Show = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``(keep, index) -> inputs``: bool ``(picture, [frame,] channel, y, x)`` and the target row of each picture."""


def replacer(kind: Replacement, objective: Objective) -> Show:
    """How pictures of ``objective`` are made for one kind of replacement.

    Raises UsageError for kinds that do not exist, and for ``freeze`` where inputs are images.
    """
    inputs = objective.inputs
    if kind != FREEZE:
        baseline = make_baseline(cast("Baseline", kind), objective)
        return lambda keep, index: torch.where(keep, inputs[index], baseline[index])
    if inputs.dim() != 5:
        raise UsageError(
            "baseline 'freeze': an image has no other frames", remedy=f"use one of {', '.join(get_args(Baseline))}"
        )
    nowhere = make_baseline("mean", objective)
    return lambda keep, index: frozen(inputs[index], keep[:, :, 0], nowhere[index])


def frozen(clips: torch.Tensor, keep: torch.Tensor, nowhere: torch.Tensor) -> torch.Tensor:
    """Clips ``(picture, frame, channel, y, x)`` whose places hold what they showed at their nearest kept frame.

    ``keep`` is bool ``(picture, frame, y, x)``; of two kept frames equally near the earlier is repeated.
    ``nowhere`` (as ``clips``) fills the places of which no frame is kept.
    """
    length = clips.shape[1]
    number = torch.arange(length, device=clips.device)[None, :, None, None].expand_as(keep)
    before = torch.where(keep, number, -length).cummax(1).values
    after = torch.where(keep, number, 2 * length).flip(1).cummin(1).values.flip(1)
    nearest = torch.where(number - before <= after - number, before, after)
    lost = ~keep.any(1, keepdim=True)
    source = nearest.clamp(0, length - 1)[:, :, None].expand_as(clips)
    return torch.where(lost[:, :, None], nowhere, clips.gather(1, source))
