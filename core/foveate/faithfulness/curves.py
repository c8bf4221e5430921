"""Deletion and insertion: what the model answers while cells vanish, or appear, in the order of a map.

Petsiuk, Das and Saenko, RISE, BMVC 2018, section 4.2. Deletion replaces cells of the image by a baseline,
most important first; insertion starts from the baseline and puts them back. A faithful map makes the
score fall early (small deletion area) or rise early (large insertion area). The target is bound once to
the intact image; the argmax is never taken again. Probability and logit come from the same forward passes.

Deleting the *least* important cells first runs through insertion's pictures backwards, so ABPC (area
between the LeRF and MoRF curves) is here insertion minus deletion under the same baseline.

Which picture replaces a cell, and on which scale the answer is read, can turn a ranking round. Both are
axes of the result, never a hidden choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.integrate import trapezoid

from foveate.attribution.pooling import feature_mask
from foveate.errors import UsageError
from foveate.faithfulness.readings import read_as
from foveate.faithfulness.replacement import Replacement, Show, replacer
from foveate.faithfulness.units import CELLS, Units

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.attribution.objective import Objective
    from foveate.geometry import CellGrid

MODES = ("deletion", "insertion")


@dataclass(frozen=True)
class Protocol:
    """All that fixes a perturbation score besides model, target and map.

    ``steps`` equal steps from the fraction 0 to 1 of the cells (or other units, see
    :mod:`foveate.faithfulness.units`), rounded to whole ones. ``scales`` are readings of
    :mod:`foveate.faithfulness.readings`: output scales, of objects also followed by match.
    """

    baselines: tuple[Replacement, ...] = ("mean", "blur")
    scales: tuple[str, ...] = ("probability", "logit")
    steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.baselines or not self.scales:
            raise UsageError(
                f"Protocol: expected steps >= 1, a baseline and a scale; got steps={self.steps}, "
                f"baselines={self.baselines}, scales={self.scales}"
            )

    def counts(self, cells: int) -> NDArray[np.int64]:
        """How many cells have been changed at each step, from 0 to ``cells``; ascending, without repeats.

        Symmetric, so that insertion and deletion share pictures: where half the cells is no whole number,
        an even number of steps gets two middle ones.
        """
        half = np.floor(np.arange(self.steps // 2 + 1) / self.steps * cells + 0.5).astype(np.int64)
        return np.unique(np.concatenate([half, cells - half]))


@dataclass(frozen=True, eq=False)
class Curves:
    """``values`` float32 ``(map, target, mode, baseline, scale, step)``; ``fractions`` float64 ``(step,)``.

    ``forwards`` counts the pictures that the model was shown.
    """

    values: NDArray[np.float32]
    fractions: NDArray[np.float64]
    forwards: int

    @property
    def areas(self) -> NDArray[np.float64]:
        """Area under each curve over the fraction of cells changed, ``(map, target, mode, baseline, scale)``."""
        return area_under(self.values, self.fractions)


def area_under(values: NDArray[np.floating], fractions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Trapezoidal area along the last axis over true fractions from 0 to 1: a mean score, in its unit."""
    return np.asarray(trapezoid(values.astype(np.float64), fractions, axis=-1))


def perturbation_curves(
    objective: Objective,
    orders: NDArray[np.intp],
    grid: CellGrid,
    protocol: Protocol = Protocol(),
    units: Units | None = None,
) -> Curves:
    """Deletion and insertion curves of every order, for every target row.

    ``orders`` is ``(map, target, unit)``, most important first, over the cells of ``grid`` (frame cells of a clip
    one after the other) or over the ``units`` that they are taken in. Each distinct picture is shown to the model
    once, in blocks that fit the objective's memory budget; results do not depend on the blocks. Raises UsageError
    where ``orders`` does not fit the objective.
    """
    maps, targets, count = orders.shape
    units = units if units is not None else CELLS.of((*objective.map_shape[:-2], *grid.shape))
    regions = feature_mask(objective.inputs, grid, objective.frames)[0]
    regions = torch.as_tensor(units.numbers, device=regions.device)[regions]
    if targets != len(objective) or count != units.count:
        raise UsageError(
            f"perturbation_curves: expected orders (map, {len(objective)}, {units.count}), got {orders.shape}"
        )
    counts = protocol.counts(count)
    values = np.empty(
        (maps, targets, len(MODES), len(protocol.baselines), len(protocol.scales), counts.size), np.float32
    )
    plan = [_pictures(orders[:, target], counts) for target in range(targets)]
    kept = np.concatenate([pictures for pictures, _ in plan])
    owner = np.repeat(np.arange(targets), [len(pictures) for pictures, _ in plan])
    starts = np.concatenate([[0], np.cumsum([len(pictures) for pictures, _ in plan])])
    for b, kind in enumerate(protocol.baselines):
        scores = _show(objective, kept, owner, regions, replacer(kind, objective), protocol.scales)
        for target, (_, where) in enumerate(plan):
            block = scores[starts[target] : starts[target + 1]][where]  # (map, mode, step, scale)
            values[:, target, :, b] = block.transpose(0, 1, 3, 2)
    return Curves(values, counts / count, len(kept) * len(protocol.baselines))


def forward_count(maps: int, random_orders: int, cells: int, protocol: Protocol) -> int:
    """How many pictures one target row costs at most: two modes a map, one a random order (antithetic)."""
    inner = protocol.counts(cells).size - 2
    return len(protocol.baselines) * ((2 * maps + random_orders) * inner + 2)


def _pictures(orders: NDArray[np.intp], counts: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Distinct masks of kept cells ``(picture, cell)``, and which one each (map, mode, step) looks at."""
    place = np.argsort(orders, axis=-1)  # how early each cell's turn comes
    changed = place[:, None, :] < counts[None, :, None]
    masks = np.stack([~changed, changed], axis=1)  # (map, mode, step, cell)
    packed = np.packbits(masks.reshape(-1, masks.shape[-1]), axis=-1)
    _, first, inverse = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    return masks.reshape(-1, masks.shape[-1])[first], inverse.reshape(masks.shape[:-1])


@torch.no_grad()
def _show(
    objective: Objective,
    kept: NDArray[np.bool_],
    owner: NDArray[np.intp],
    regions: torch.Tensor,
    show: Show,
    scales: tuple[str, ...],
) -> NDArray[np.float32]:
    """Scores ``(picture, scale)`` of inputs whose units are kept where ``kept`` and replaced elsewhere."""
    size = objective.rows(grad=False)
    scores = np.empty((len(kept), len(scales)), np.float32)
    for start in range(0, len(kept), size):
        block = slice(start, start + size)
        index = torch.as_tensor(owner[block], device=regions.device)
        keep = torch.as_tensor(kept[block], device=regions.device)[:, regions]
        scores[block] = _scored(objective, show(keep, index), index, scales)
    return scores


def _scored(
    objective: Objective, x: torch.Tensor, index: torch.Tensor, scales: tuple[str, ...]
) -> NDArray[np.float32]:
    """One forward pass, read on every scale: ``(picture, scale)``."""
    source, batch, bound = objective.source, objective.batch.replace(x, index), objective.bound.take(index)
    outputs = source.forward(batch)
    columns = [source.score(outputs, batch, read_as(bound, scale)) for scale in scales]
    return torch.stack(columns, dim=1).float().cpu().numpy()
