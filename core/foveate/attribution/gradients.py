"""Captum's gradient methods on a bound target.

Each class fixes the options of one Captum call; ``pixels`` is that call. Names without suffix keep the
sign (channels summed), names ending in ``_abs`` pool absolute values: the ranking of methods can turn on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from captum.attr import GradientShap as CaptumGradientShap
from captum.attr import InputXGradient as CaptumInputXGradient
from captum.attr import IntegratedGradients as CaptumIntegratedGradients
from captum.attr import NoiseTunnel
from captum.attr import Saliency as CaptumSaliency

from foveate.attribution.baselines import Baseline, make_baseline
from foveate.attribution.pixels import Cost, PixelMethod, Pixels, in_blocks, repeated
from foveate.attribution.pooling import Pooling

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.attribution.objective import Objective

RELATIVE_DELTA = 0.05
"""Largest completeness error of converged integrated gradients, relative to the change of the score."""


@dataclass(frozen=True)
class Saliency(PixelMethod):
    """The gradient of the score at the input."""

    name: ClassVar[str] = "saliency"
    citation: ClassVar[str] = "Simonyan, Vedaldi & Zisserman 2014, arXiv:1312.6034"

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """d score / d input."""
        (values,) = in_blocks(objective, _saliency)
        return Pixels(values[None])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward and one backward pass."""
        return Cost(1, 1)


@dataclass(frozen=True)
class SaliencyAbs(Saliency):
    """The gradient's absolute value."""

    name: ClassVar[str] = "saliency_abs"
    pooling: Pooling = "abs"


@dataclass(frozen=True)
class InputXGradient(PixelMethod):
    """Input times gradient: the first-order contribution against a zero input."""

    name: ClassVar[str] = "inputxgrad"
    citation: ClassVar[str] = "Shrikumar et al. 2016, arXiv:1605.01713"

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """x * d score / d x."""

        def explain(block: Objective) -> tuple[torch.Tensor]:
            forward, arguments = block.captum()
            return (CaptumInputXGradient(forward).attribute(**arguments),)

        (values,) = in_blocks(objective, explain)
        return Pixels(values[None])

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """One forward and one backward pass."""
        return Cost(1, 1)


@dataclass(frozen=True)
class InputXGradientAbs(InputXGradient):
    """Input times gradient, absolute."""

    name: ClassVar[str] = "inputxgrad_abs"
    pooling: Pooling = "abs"


@dataclass(frozen=True)
class IntegratedGradients(PixelMethod):
    """Gradients integrated along the straight line from a baseline: sums to the change of the score.

    The completeness error, |sum - (f(x) - f(b))|, is recorded per target row, absolute (``delta``) and
    relative to the change (``relative_delta``, see :func:`relative_delta`); above 5 % the row has not converged.
    """

    name: ClassVar[str] = "ig"
    citation: ClassVar[str] = "Sundararajan, Taly & Yan 2017, arXiv:1703.01365, eq. 1"
    diagnostics: ClassVar[tuple[str, ...]] = ("delta", "relative_delta")
    n_steps: int = 50
    baseline: Baseline = "zero"
    quadrature: Literal["gausslegendre", "riemann_trapezoid", "riemann_middle"] = "gausslegendre"

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's IntegratedGradients with its convergence delta."""
        values, delta = in_blocks(objective, self._explain)
        relative = relative_delta(delta, values)
        rows = {"delta": _numpy(delta), "relative_delta": relative}
        return Pixels(values[None], rows, relative <= RELATIVE_DELTA)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """A forward and a backward pass a step, and a forward pass at each end for the delta."""
        return Cost(self.n_steps + 2, self.n_steps)

    def _explain(self, block: Objective) -> tuple[torch.Tensor, ...]:
        forward, arguments = block.captum()
        values, delta = CaptumIntegratedGradients(forward).attribute(
            **arguments,
            baselines=make_baseline(self.baseline, block),
            n_steps=self.n_steps,
            method=self.quadrature,
            internal_batch_size=max(len(block), block.rows(grad=True)),
            return_convergence_delta=True,
        )
        return values, delta


@dataclass(frozen=True)
class IntegratedGradientsAbs(IntegratedGradients):
    """Integrated gradients, absolute values pooled (completeness is lost, the sign with it)."""

    name: ClassVar[str] = "ig_abs"
    pooling: Pooling = "abs"


@dataclass(frozen=True)
class GradientShap(PixelMethod):
    """Expected gradients at random points between a baseline and the noisy input."""

    name: ClassVar[str] = "gradshap"
    citation: ClassVar[str] = "Lundberg & Lee 2017, arXiv:1705.07874; Erion et al. 2021, arXiv:1906.10670"
    diagnostics: ClassVar[tuple[str, ...]] = ("seed_spearman",)
    n_samples: int = 32
    noise: float = 0.05
    baseline: Baseline = "zero"
    repeats: int = 2

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's GradientShap, row by row under the row's own seed."""
        return Pixels(repeated(objective, self._draw, seed=seed, repeats=self.repeats))

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """A forward and a backward pass a sample and seed."""
        return Cost(self.n_samples * self.repeats, self.n_samples * self.repeats)

    def _draw(self, row: Objective) -> torch.Tensor:
        # Captum hands all samples to the model at once; here they go block by block where memory is short.
        baseline, noise = make_baseline(self.baseline, row), noise_level(row, self.noise)
        parts: list[torch.Tensor] = []
        sizes = block_sizes(self.n_samples, row.rows(grad=True))
        for size in sizes:
            forward, arguments = row.captum()
            shap = CaptumGradientShap(forward)
            parts.append(shap.attribute(**arguments, baselines=baseline, n_samples=size, stdevs=noise))
        if len(parts) == 1:
            return parts[0]  # to the bit what one Captum call gives
        shares = torch.tensor(sizes).to(row.inputs) / self.n_samples
        mean: torch.Tensor = torch.tensordot(shares, torch.stack(parts), dims=1)
        return mean


@dataclass(frozen=True)
class GradientShapAbs(GradientShap):
    """Expected gradients, absolute values pooled."""

    name: ClassVar[str] = "gradshap_abs"
    pooling: Pooling = "abs"


@dataclass(frozen=True)
class SmoothGrad(PixelMethod):
    """The mean gradient over noisy copies of the input (Captum's NoiseTunnel around Saliency).

    ``noise`` is the standard deviation as a share of the image's own range, as in the paper.
    """

    name: ClassVar[str] = "smoothgrad"
    citation: ClassVar[str] = "Smilkov et al. 2017, arXiv:1706.03825"
    diagnostics: ClassVar[tuple[str, ...]] = ("seed_spearman",)
    n_samples: int = 16
    noise: float = 0.15
    repeats: int = 2

    def pixels(self, objective: Objective, *, seed: int = 0) -> Pixels:
        """Captum's NoiseTunnel, row by row under the row's own seed."""
        return Pixels(repeated(objective, self._draw, seed=seed, repeats=self.repeats))

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """A forward and a backward pass a noisy copy and seed."""
        return Cost(self.n_samples * self.repeats, self.n_samples * self.repeats)

    def _draw(self, row: Objective) -> torch.Tensor:
        forward, arguments = row.captum()
        return self._tunnel(row, CaptumSaliency(forward), arguments, row.rows(grad=True), abs=False)

    def _tunnel(
        self, row: Objective, method: Any, arguments: dict[str, Any], block: int, **options: Any
    ) -> torch.Tensor:
        values: torch.Tensor = NoiseTunnel(method).attribute(
            **arguments,
            nt_type="smoothgrad",
            nt_samples=self.n_samples,
            nt_samples_batch_size=min(block, self.n_samples),
            stdevs=noise_level(row, self.noise),
            **options,
        )
        return values


@dataclass(frozen=True)
class SmoothGradAbs(SmoothGrad):
    """The mean gradient over noisy copies, absolute values pooled."""

    name: ClassVar[str] = "smoothgrad_abs"
    pooling: Pooling = "abs"


@dataclass(frozen=True)
class SmoothIG(SmoothGrad):
    """Integrated gradients averaged over noisy copies of the input."""

    name: ClassVar[str] = "smoothig"
    citation: ClassVar[str] = "Smilkov et al. 2017, arXiv:1706.03825; Sundararajan et al. 2017, arXiv:1703.01365"
    n_samples: int = 8
    n_steps: int = 16
    baseline: Baseline = "zero"

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """A forward and a backward pass a step, noisy copy and seed."""
        passes = self.n_samples * self.n_steps * self.repeats
        return Cost(passes, passes)

    def _draw(self, row: Objective) -> torch.Tensor:
        forward, arguments = row.captum()
        block = row.rows(grad=True)
        return self._tunnel(
            row,
            CaptumIntegratedGradients(forward),
            arguments,
            max(1, block // self.n_steps),
            baselines=make_baseline(self.baseline, row),
            n_steps=self.n_steps,
            internal_batch_size=block,
        )


@dataclass(frozen=True)
class SmoothIGAbs(SmoothIG):
    """Integrated gradients averaged over noisy copies, absolute values pooled."""

    name: ClassVar[str] = "smoothig_abs"
    pooling: Pooling = "abs"


def relative_delta(delta: torch.Tensor, values: torch.Tensor) -> NDArray[np.float64]:
    """Completeness error relative to the change of the score, ``(target,)``.

    Where the score hardly changes between baseline and image, large positive and negative parts cancel and
    no quadrature would pass; so the change counts as at least 1 % of the absolute attribution.
    """
    flat, error = _numpy(values).reshape(len(values), -1), _numpy(delta)
    change = np.abs(flat.sum(1) - error)  # Captum: delta = sum - (f(x) - f(b))
    explained = np.maximum(change, 0.01 * np.abs(flat).sum(1))
    relative: NDArray[np.float64] = np.abs(error) / np.maximum(explained, np.finfo(np.float32).tiny)
    return relative


def noise_level(row: Objective, share: float) -> float:
    """Standard deviation of the noise: ``share`` of the range of this row's input values."""
    return float(share * (row.inputs.max() - row.inputs.min()))


def block_sizes(total: int, block: int) -> list[int]:
    """``total`` in blocks of at most ``block``."""
    return [min(block, total - start) for start in range(0, total, block)]


def _saliency(block: Objective) -> tuple[torch.Tensor]:
    forward, arguments = block.captum()
    return (CaptumSaliency(forward).attribute(**arguments, abs=False),)


def _numpy(values: torch.Tensor) -> NDArray[np.float64]:
    return np.asarray(values.detach().double().cpu().numpy(), dtype=np.float64)
