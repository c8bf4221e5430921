"""Padding around an image is no evidence: what is replaced, averaged and blurred is the image alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detector_fakes import WindowDetector, bound_spots, padded
from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.attribution.padding import visible_pixels, visible_share
from foveate.geometry import CellGrid, Geometry

HEIGHT, WIDTH = 20, 27


@pytest.fixture
def objectives():
    """The same pixels as images of 20 x 27 in a corner of the input, and as such images on their own."""
    source = WindowDetector(threshold=0.0)
    batch, bound = bound_spots(source, [(0, 1), (2,)])
    batch.inputs[..., HEIGHT:, :] = batch.inputs[..., WIDTH:] = 0.7  # what padding is filled with
    return Objective(source, padded(batch, HEIGHT, WIDTH), bound), batch.inputs[..., :HEIGHT, :WIDTH]


def test_pixels_count_by_their_centres():
    inputs = torch.zeros(2, 3, 4, 6)
    placed = (Geometry(8, 8, 4, 6, 0.5, 0.5, 0.0, 1.0), Geometry(3, 6, 4, 6, 1.0, 1.0))
    seen = visible_pixels(inputs, placed)
    assert seen.shape == (2, 1, 4, 6)
    np.testing.assert_array_equal(seen[0, 0], np.repeat([[0, 1, 1, 1, 1, 0]], 4, axis=0))
    np.testing.assert_array_equal(seen[1, 0], [[1] * 6] * 3 + [[0] * 6])
    assert visible_pixels(inputs, (Geometry.identity(4, 6),) * 2) is None
    assert visible_pixels(torch.zeros(1, 5, 3, 4, 6), placed[1:]).shape == (1, 1, 1, 4, 6)


def test_the_share_of_a_crop_is_one_and_of_padding_zero():
    grid = CellGrid.regular(2, 2, height=4, width=4)
    np.testing.assert_array_equal(visible_share(Geometry(99, 99, 4, 4, 1.0, 1.0, -20, -30), grid), np.ones((2, 2)))
    np.testing.assert_array_equal(visible_share(Geometry(3, 2, 4, 4, 1.0, 1.0), grid), [[1, 0], [0.5, 0]])


@pytest.mark.parametrize("kind", ["zero", "black", "mean", "blur"])
def test_padding_stays_as_it_is(objectives, kind):
    objective, _ = objectives
    base = make_baseline(kind, objective)
    assert (base[..., HEIGHT:, :] == 0.7).all()
    assert (base[..., :, WIDTH:] == 0.7).all()
    assert (base[..., :HEIGHT, :WIDTH] != objective.inputs[..., :HEIGHT, :WIDTH]).any()


def test_the_mean_colour_is_that_of_the_image(objectives):
    objective, images = objectives
    base = make_baseline("mean", objective)
    for row in range(6):  # three objects of each image
        torch.testing.assert_close(base[row, :, 0, 0], images[row // 3].mean((-2, -1)))


def test_the_blur_sees_no_padding(objectives):
    """Where the image is flat, its blur is flat up to the border, whatever the padding's colour."""
    objective, _ = objectives
    objective.inputs[..., :HEIGHT, :WIDTH] = 0.25
    base = make_baseline("blur", objective)
    torch.testing.assert_close(base[..., :HEIGHT, :WIDTH], torch.full_like(base[..., :HEIGHT, :WIDTH], 0.25))
