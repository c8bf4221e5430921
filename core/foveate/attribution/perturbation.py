"""Captum's perturbation methods on the model's own patches.

A feature is one cell of ``source.cells``; Captum's default of one perturbation a forward pass is replaced
by as many as fit the memory budget, which changes the time and nothing else. Sampled methods (KernelSHAP,
LIME) are drawn under at least two seeds; a row whose two maps correlate below 0.8 has not converged.
Values are changes of the score (ablation) or coefficients (SHAP, LIME) a cell, never divided by its area.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from captum.attr import FeatureAblation as CaptumFeatureAblation
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import Lime as CaptumLime
from captum.attr import Occlusion as CaptumOcclusion

from foveate.attribution.baselines import Baseline, make_baseline
from foveate.attribution.clips import members_of
from foveate.attribution.pixels import Cost, PixelMethod, Pixels, in_blocks, repeated
from foveate.attribution.pooling import feature_mask
from foveate.errors import MissingDependencyError, UsageError

if TYPE_CHECKING:
    from foveate.attribution.objective import Objective


@dataclass(frozen=True)
class CellMethod(PixelMethod):
    """A perturbation method: all pixels of a cell carry the cell's number."""

    baseline: Baseline = "zero"
    reduce: ClassVar[Literal["sum", "mean"]] = "mean"


@dataclass(frozen=True)
class FeatureAblation(CellMethod):
    """The drop of the score when one patch is replaced by the baseline."""

    name: ClassVar[str] = "ablation"
    citation: ClassVar[str] = "Zeiler & Fergus 2014, arXiv:1311.2901 (patch by patch)"

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's FeatureAblation over the cells."""
        (values,) = in_blocks(objective, self._explain)
        return Pixels(values[None])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward pass a cell and one for the whole image."""
        return Cost(math.prod(shape) + 1)

    def _explain(self, block: Objective) -> tuple[torch.Tensor]:
        forward, arguments = block.captum()
        mask = feature_mask(block.inputs, block.source.cells(block.batch), block.frames)
        values = CaptumFeatureAblation(forward).attribute(
            **arguments,
            baselines=make_baseline(self.baseline, block),
            feature_mask=mask,
            perturbations_per_eval=per_eval(block),
        )
        return (values,)


@dataclass(frozen=True)
class Occlusion(CellMethod):
    """The mean drop of the score over all sliding windows that cover a patch.

    ``window`` and ``stride`` are in patches; the default window of 2 x 2 sees evidence that spans patches
    and differs from ``ablation``, which is a window of one. Captum's Occlusion slides windows of one size in
    pixels; where patches are not equal (a detector's border cells), windows of whole patches slide here. Of a
    clip, a window covers one frame cell (all frames of a tubelet).
    """

    name: ClassVar[str] = "occlusion"
    citation: ClassVar[str] = "Zeiler & Fergus 2014, arXiv:1311.2901"
    window: int = 2
    stride: int = 1

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's Occlusion with windows of whole patches."""
        (values,) = in_blocks(objective, self._explain)
        return Pixels(values[None])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward pass a window position and one for the whole image."""
        sides = [len(self._starts(side)) for side in shape[-2:]]
        return Cost(math.prod((*shape[:-2], *sides)) + 1)

    def _starts(self, side: int) -> range:
        """First patch of every window along an axis of ``side`` patches; the last window may be cut."""
        return range(0, max(0, math.ceil((side - self.window) / self.stride)) * self.stride + 1, self.stride)

    def _explain(self, block: Objective) -> tuple[torch.Tensor]:
        size = patch_size(block)
        return (self._by_patches(block) if size is None else self._by_captum(block, *size),)

    def _by_captum(self, block: Objective, height: int, width: int) -> torch.Tensor:
        forward, arguments = block.captum()
        channels = block.inputs.shape[-3]  # every channel; of a clip, one frame cell at a time
        leading = (len(members_of(block.frames)[0]), channels) if block.frames else (channels,)
        values: torch.Tensor = CaptumOcclusion(forward).attribute(
            **arguments,
            baselines=make_baseline(self.baseline, block),
            sliding_window_shapes=(*leading, self.window * height, self.window * width),
            strides=(*leading, self.stride * height, self.stride * width),
            perturbations_per_eval=per_eval(block),
        )
        return values

    @torch.no_grad()
    def _by_patches(self, block: Objective) -> torch.Tensor:
        """The same mean over windows, each a mask of patches, ``(target, [frame,] channel, y, x)``."""
        regions = feature_mask(block.inputs, block.source.cells(block.batch), block.frames)[0]
        windows = self._windows(block.map_shape).to(regions.device)
        baseline, whole = make_baseline(self.baseline, block), block(block.inputs)
        total = torch.zeros(len(block), windows.shape[1], device=regions.device)
        for window in windows:
            hidden = torch.where(window[regions], baseline, block.inputs)
            total += (whole - block(hidden))[:, None] * window
        return (total / windows.sum(0).clamp_min(1))[:, regions]

    def _windows(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Cells under every window, bool ``(window, cell)``; ``shape`` is ``([frame cell,] row, column)``."""
        masks = []
        for frame, row, column in product(range(math.prod(shape[:-2])), *map(self._starts, shape[-2:])):
            mask = torch.zeros(math.prod(shape[:-2]), *shape[-2:], dtype=torch.bool)
            mask[frame, row : row + self.window, column : column + self.window] = True
            masks.append(mask.flatten())
        return torch.stack(masks)


@dataclass(frozen=True)
class SampledMethod(CellMethod):
    """A linear surrogate fitted to random subsets of patches."""

    diagnostics: ClassVar[tuple[str, ...]] = ("seed_spearman",)
    evaluations_per_patch: int = 16
    repeats: int = 2

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's surrogate, row by row under the row's own seeds."""
        if importlib.util.find_spec("sklearn") is None:
            raise MissingDependencyError(
                f"{self.name} fits its surrogate with scikit-learn, which is not installed",
                remedy='pip install "foveate[lime]"',
            )
        if self.repeats < 2:
            raise UsageError(
                f"{self.name}: repeats must be at least 2 (without a second seed nobody knows whether the map "
                f"is more than noise), got {self.repeats}"
            )
        return Pixels(repeated(objective, self._draw, seed=seed, repeats=self.repeats))

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """``evaluations_per_patch`` forward passes a cell and seed."""
        return Cost(self.samples(math.prod(shape)) * self.repeats)

    def samples(self, cells: int) -> int:
        """Subsets that one fit sees."""
        return self.evaluations_per_patch * cells

    def _draw(self, row: Objective) -> torch.Tensor:
        forward, arguments = row.captum()
        mask = feature_mask(row.inputs, row.source.cells(row.batch), row.frames)
        values: torch.Tensor = self._surrogate(forward).attribute(
            **arguments,
            baselines=make_baseline(self.baseline, row),
            feature_mask=mask,
            n_samples=self.samples(int(mask.max()) + 1),
            perturbations_per_eval=row.rows(grad=False),
        )
        return values

    def _surrogate(self, forward: Any) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class KernelShap(SampledMethod):
    """Shapley values of patches by weighted linear regression over random coalitions."""

    name: ClassVar[str] = "kernelshap"
    citation: ClassVar[str] = "Lundberg & Lee 2017, arXiv:1705.07874, theorem 2"

    def _surrogate(self, forward: Any) -> Any:
        return CaptumKernelShap(forward)


@dataclass(frozen=True)
class Lime(SampledMethod):
    """Coefficients of a sparse local surrogate; ``alpha`` is the L1 weight (Captum's default 0.01).

    The score's scale decides what ``alpha`` leaves: on probabilities a large one zeroes every patch, the
    map is constant and counts as not converged.
    """

    name: ClassVar[str] = "lime"
    citation: ClassVar[str] = "Ribeiro, Singh & Guestrin 2016, arXiv:1602.04938"
    alpha: float = 0.01

    def _surrogate(self, forward: Any) -> Any:
        from captum._utils.models.linear_model import SkLearnLasso

        return CaptumLime(forward, interpretable_model=SkLearnLasso(alpha=self.alpha))


def per_eval(block: Objective) -> int:
    """Perturbations a forward pass: what the budget leaves for each of the block's target rows."""
    return max(1, block.rows(grad=False) // len(block))


def patch_size(block: Objective) -> tuple[int, int] | None:
    """Height and width of the patches in whole pixels, None where they, or a clip's frame cells, differ."""
    grid = block.source.cells(block.batch)
    if len({len(members) for members in members_of(block.frames)}) > 1:
        return None
    sides = []
    for edges in (grid.y, grid.x):
        steps = np.diff(edges)
        side = round(float(steps[0]))
        if side < 1 or not np.allclose(steps, side, atol=1e-6):
            return None
        sides.append(side)
    return sides[0], sides[1]
