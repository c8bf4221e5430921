"""Baselines and the undoing of normalisation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribution_fakes import bound_batch
from foveate.attribution.appearance import channel_levels, seen_rgb
from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.errors import UsageError
from foveate.interfaces import Sample
from foveate.testing.tiny import TinyCropSource, TinySource, tiny_samples

MEAN, STD = np.array([0.48, 0.46, 0.41]), np.array([0.27, 0.26, 0.28])


class ClipNormalised(TinyCropSource):
    """CLIP's mean and standard deviation instead of [-1, 1]."""

    def encode(self, samples):
        batch = super().encode(samples)
        shift = torch.tensor(MEAN, dtype=torch.float32)[:, None, None]
        scale = torch.tensor(STD, dtype=torch.float32)[:, None, None]
        return batch.replace(((batch.inputs + 1) / 2 - shift) / scale, range(len(batch)))


@pytest.fixture
def objective():
    source = ClipNormalised()
    return Objective(source, *bound_batch(source))


def test_zero_and_mean(objective):
    assert not make_baseline("zero", objective).any()
    mean = make_baseline("mean", objective)
    for n in range(len(objective)):
        for c in range(3):
            want = objective.inputs[n, c].mean()
            torch.testing.assert_close(mean[n, c], want.expand(32, 32), rtol=1e-5, atol=1e-6)


def test_black_is_what_a_black_picture_becomes(objective):
    black = objective.source.encode([Sample("black", np.zeros((40, 50, 3), np.uint8))]).inputs
    torch.testing.assert_close(
        make_baseline("black", objective), black.expand(3, -1, -1, -1), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(channel_levels(objective.source, objective.batch)[0], -MEAN / STD, atol=1e-5)


def test_blur_equals_a_slow_gaussian(objective):
    """Gaussian of sigma one patch (8 px), cut at 4 sigma, the image reflected about its edge."""
    image = objective.inputs[0, 1].double().numpy()
    reach, sigma = 32, 8.0
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    padded = np.pad(image, reach, mode="symmetric")
    y, x = 5, 17
    want = weights @ padded[y : y + 2 * reach + 1, x : x + 2 * reach + 1] @ weights
    assert float(make_baseline("blur", objective)[0, 1, y, x]) == pytest.approx(want, abs=1e-5)


def test_seen_colours_are_the_pixels():
    source = ClipNormalised()
    samples = tiny_samples(2)
    rgb = seen_rgb(source, source.encode(samples))
    want = np.stack([s.pixels for s in samples]).transpose(0, 3, 1, 2) / 255
    np.testing.assert_allclose(rgb, want, atol=1e-5)


def test_bad_input(objective):
    with pytest.raises(UsageError, match="baseline"):
        make_baseline("noise", objective)

    class Gamma(TinySource):
        def encode(self, samples):
            batch = super().encode(samples)
            return batch.replace(((batch.inputs + 1) / 2) ** 2.2, range(len(batch)))

    source = Gamma()
    with pytest.raises(UsageError, match="affine"):
        channel_levels(source, source.encode(tiny_samples(1)))
