"""What an input is compared with, or replaced by: the reference point that every attribution has.

A map without its baseline is not reproducible, so the kind is an explicit option of each method and is
recorded. All baselines live in the model's normalised input space and have the inputs' shape.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from foveate.attribution.appearance import channel_levels
from foveate.attribution.padding import visible_pixels
from foveate.errors import UsageError

if TYPE_CHECKING:
    from foveate.attribution.objective import Objective

Baseline = Literal["zero", "black", "mean", "blur"]
"""``zero``: 0 after normalisation (the training set's mean colour for most models; Captum's default).
``black``: a black picture. ``mean``: each image's own mean colour.
``blur``: each image under a Gaussian whose sigma is one cell's side, so that nothing within a cell survives."""


def make_baseline(kind: Baseline, objective: Objective) -> torch.Tensor:
    """The baseline of each target row, shaped as ``objective.inputs``; padding around the image stays as it is."""
    seen = visible_pixels(objective.inputs, objective.batch.geometry)
    plain = _plain(kind, objective, seen)
    return plain if seen is None else torch.where(seen, plain, objective.inputs)


def _plain(kind: Baseline, objective: Objective, seen: torch.Tensor | None) -> torch.Tensor:
    inputs = objective.inputs
    if kind == "zero":
        return torch.zeros_like(inputs)
    if kind == "mean":
        return _mean(inputs, seen).expand_as(inputs).contiguous()
    if kind == "blur":
        return _blur(objective, seen)
    if kind == "black":
        black, _ = channel_levels(objective.source, objective.batch)
        return torch.as_tensor(black).to(inputs)[:, None, None].expand_as(inputs).contiguous()
    raise UsageError(f"baseline: expected one of {', '.join(get_args(Baseline))}, got {kind!r}")


def blur_sigma(objective: Objective) -> tuple[float, float]:
    """Sigma of the blur along y and x, pixels: the mean side of the model's cells."""
    grid = objective.source.cells(objective.batch)
    return float(np.diff(grid.y).mean()), float(np.diff(grid.x).mean())


def _mean(inputs: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    if seen is None:
        return inputs.mean((-2, -1), keepdim=True)
    return (inputs * seen).sum((-2, -1), keepdim=True) / seen.sum((-2, -1), keepdim=True).clamp_min(1)


def _blur(objective: Objective, seen: torch.Tensor | None) -> torch.Tensor:
    """Gaussian blur; where there is padding, of what can be seen alone (normalised convolution)."""
    inputs, sigma = objective.inputs, blur_sigma(objective)
    if seen is None:
        return _smooth(inputs, sigma).to(inputs)
    weight = _smooth(seen.expand_as(inputs), sigma)
    return (_smooth(inputs * seen, sigma) / weight.clamp_min(1e-12)).to(inputs)


def _smooth(values: torch.Tensor, sigma: tuple[float, float]) -> torch.Tensor:
    pixels = values.double().cpu().numpy()
    return torch.as_tensor(gaussian_filter(pixels, (0.0,) * (pixels.ndim - 2) + sigma, mode="reflect"))
