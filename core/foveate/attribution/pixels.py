"""What Captum's methods share: pixel numbers first, cells second, and a verdict whether they converged.

``pixels`` returns exactly what a plain Captum script returns; ``attribute`` pools it to the model's cells.
Keeping the two apart lets a study compute once and pool twice, and lets anybody check the numbers.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from scipy.stats import spearmanr

from foveate.attribution.objective import Objective
from foveate.attribution.pooling import Pooling, pool_pixels
from foveate.attribution.seeding import sample_seed, seeded
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, BoundTarget

AGREEMENT = 0.8
"""Spearman correlation between seeds below which a sampled map is "not converged"."""


@dataclass(frozen=True)
class Cost:
    """Model evaluations that explain one target row."""

    forward: int
    backward: int = 0


@dataclass(frozen=True, eq=False)
class Pixels:
    """Attributions per input element, ``values (repeat, target, [frame,] channel, y, x)``.

    ``repeat`` counts seeds (1 for deterministic methods); the first is the map, the others tell how far it
    depends on the draw. ``rows`` holds one number a target row, ``converged`` one verdict.
    """

    values: torch.Tensor
    rows: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    converged: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class PixelMethod(Attribution):
    """A method that gives every input element a number.

    ``rows`` fixes how many rows one pass of the model takes (None: by the memory budget of
    :mod:`foveate.attribution.objective`); it changes results by rounding only, or by draws where noise is
    drawn in blocks, and is recorded.
    """

    pooling: Pooling = "signed"
    rows: int | None = None
    reduce: ClassVar[Literal["sum", "mean"]] = "sum"
    diagnostics: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers a target row that ``info["per_row"]`` holds: how well the method converged."""

    @abstractmethod
    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Attributions of every target row of ``objective``, as Captum gives them."""

    @abstractmethod
    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Evaluations for one target row whose map has ``shape`` ``([frame cell,] row, column)``."""

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """Pixel numbers pooled over the model's cells; ``info["per_row"]`` holds one number a target row."""
        objective = Objective(source, batch, bound, rows=self.rows)
        return self.pooled(self.pixels(objective, seed=seed), objective, seed=seed)

    def pooled(self, pixels: Pixels, objective: Objective, *, seed: int = 0) -> AttributionMap:
        """The map of pixel numbers that were computed before (by this method or its twin of other pooling)."""
        grid = objective.source.cells(objective.batch)
        frames = objective.frames
        maps = pool_pixels(pixels.values, grid, pooling=self.pooling, reduce=self.reduce, frames=frames)
        rows, ok = dict(pixels.rows), np.ones(maps.shape[1], bool)
        if pixels.converged is not None:
            ok &= pixels.converged
        if len(maps) > 1:
            rows["seed_spearman"] = seed_agreement(maps)
            ok &= rows["seed_spearman"] >= AGREEMENT  # NaN (a constant map) is not agreement
        return AttributionMap(
            method=self.name,
            values=maps[0].astype(np.float32),
            grid=grid,
            signed=self.pooling == "signed",
            converged=bool(ok.all()),
            info={**self.record(objective), "seed": seed, "per_row": rows, "converged_rows": ok},
        )

    def record(self, objective: Objective) -> dict[str, Any]:
        """What fixes the result, for the map's ``info``: every option, the scale and the price."""
        shape, frames = objective.map_shape, objective.frames
        cost = self.cost(shape)
        options = {f.name: getattr(self, f.name) for f in fields(self)}
        return {
            **options,
            "citation": self.citation,
            "scale": objective.bound.scale,
            "cell": self.reduce,
            "rows_per_pass": objective.rows(grad=cost.backward > 0),
            "forward_passes": cost.forward,
            "backward_passes": cost.backward,
            "evaluations_per_patch": cost.forward / math.prod(shape),
            **({"frame_cells": frames} if frames else {}),
        }


def seed_agreement(maps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean Spearman correlation over pairs of repeats, of ``(repeat, target, ...)`` to ``(target,)``."""
    flat = maps.reshape(*maps.shape[:2], -1)
    pairs = list(itertools.combinations(range(len(flat)), 2))
    return np.array(
        [np.mean([_spearman(flat[i, row], flat[j, row]) for i, j in pairs]) for row in range(flat.shape[1])]
    )


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Spearman's rho with mean ranks for ties; NaN where either is constant."""
    known = np.isfinite(a) & np.isfinite(b)
    if known.sum() < 2 or np.ptp(a[known]) == 0 or np.ptp(b[known]) == 0:
        return float("nan")
    return float(spearmanr(a[known], b[known]).statistic)


def repeated(
    objective: Objective, draw: Callable[[Objective], torch.Tensor], *, seed: int, repeats: int
) -> torch.Tensor:
    """``draw`` for each target row alone and each of ``repeats`` seeds: ``(repeat, target, ...)``.

    Repeat ``r`` of a row runs under ``sample_seed(seed + r, id)``, so a row's numbers depend neither on
    its neighbours nor on what was drawn before.
    """
    runs = []
    for repeat in range(repeats):
        rows = []
        for row, sample in enumerate(objective.batch.ids):
            with seeded(sample_seed(seed + repeat, sample)):
                rows.append(draw(objective.take([row])).detach())
        runs.append(torch.cat(rows))
    return torch.stack(runs)


def in_blocks(
    objective: Objective, explain: Callable[[Objective], tuple[torch.Tensor, ...]]
) -> tuple[torch.Tensor, ...]:
    """``explain`` for consecutive blocks of target rows that fit the budget, joined along the target axis."""
    parts = [tuple(t.detach() for t in explain(block)) for block in objective.blocks()]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
