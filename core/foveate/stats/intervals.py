"""Bootstrap intervals for the mean over images: the image is the unit, never the pixel.

Bias-corrected and accelerated (BCa; Efron, Better bootstrap confidence intervals, JASA 82, 1987; Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, ch. 14). Resampling counts are drawn once per seed and
number of images, so two columns of the same images are resampled alike (paired).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

RESAMPLES = 4000
_BLOCK = 2**22
"""Resampling counts held at once; bounds memory for large studies."""


class Interval(NamedTuple):
    """A mean over ``n`` images with its confidence interval; NaN bounds where ``n`` < 2 allows none."""

    estimate: float
    low: float
    high: float
    n: int

    def excludes(self, value: float) -> bool:
        """Whether the interval exists and does not contain ``value``."""
        return bool(self.low > value or self.high < value)


def bootstrap_mean(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """BCa interval of the mean of one number an image, ``(image,)``; NaN images do not count.

    With one image there is no interval: both bounds are NaN. Constant values give an interval of width 0.
    """
    array = np.asarray(values, dtype=np.float64)
    array = array[np.isfinite(array)]
    n = array.size
    estimate = float(array.mean()) if n else float("nan")
    if n < 2:
        return Interval(estimate, float("nan"), float("nan"), n)
    deviation = array - estimate
    spread = float(np.abs(deviation).max())
    if spread <= 1e-12 * max(1.0, abs(estimate)):
        return Interval(estimate, estimate, estimate, n)
    means = np.sort(resampled_means(deviation, resamples, seed))
    low, high = np.quantile(means, _levels(deviation, means, confidence))
    return Interval(estimate, estimate + float(low), estimate + float(high), n)


def resampled_means(values: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``resamples`` draws with replacement of ``values`` (image,), in linear memory."""
    n = values.size
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // n)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([values[rng.integers(n, size=(size, n))].mean(axis=1) for size in sizes])


def _levels(deviation: NDArray[np.float64], means: NDArray[np.float64], confidence: float) -> NDArray[np.float64]:
    """The two quantile levels of BCa: Efron and Tibshirani 1993, eq. 14.9-14.15, for the mean."""
    from scipy.special import ndtr, ndtri

    below = (np.mean(means < 0.0) + np.mean(means <= 0.0)) / 2.0  # ties at the estimate count half
    edge = 0.5 / means.size
    z0 = ndtri(np.clip(below, edge, 1.0 - edge))
    # Jackknife of a mean: leaving image i out moves it by deviation_i / (n - 1).
    acceleration = np.sum(deviation**3) / (6.0 * np.sum(deviation**2) ** 1.5)
    z = z0 + ndtri(np.array([(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0]))
    return np.asarray(ndtr(z0 + z / (1.0 - acceleration * z)), dtype=np.float64)
