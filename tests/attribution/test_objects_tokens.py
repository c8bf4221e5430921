"""ODAM, Grad-CAM and attention of detectors: objects apart, levels of a pyramid together."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attribution_fakes import only, snapshot
from foveate.attribution.attention import CheferICCV21, GradAttention, LeGrad, ReadoutAttention, Rollout
from foveate.attribution.gradcam import GradCam
from foveate.attribution.levels import on_finest, patches_by_level, tokens_on_cells
from foveate.attribution.odam import Odam
from foveate.geometry import CellGrid
from foveate.interfaces import Target, TokenAxis
from foveate.testing.tiny import tiny_samples
from foveate.testing.tiny_detector import DetectorConfig, TinyDetector

METHODS = (ReadoutAttention, Rollout, GradAttention, CheferICCV21, LeGrad, GradCam, Odam)
PYRAMID = TokenAxis.concat(
    TokenAxis.of_kind("cls", 1),
    TokenAxis.patches(4, 4, height=32, width=32, level=0),
    TokenAxis.patches(2, 2, height=32, width=32, level=1),
)
CELLS = CellGrid.regular(4, 4, height=32, width=32)


@pytest.fixture(scope="module")
def source():
    return TinyDetector(DetectorConfig(queries=4), seed=2)


def bound_objects(source, count=3):
    batch = source.encode(tiny_samples(count, seed=4))
    return batch, source.bind(source.forward(batch), batch, Target(scale="logit"))


def memory(source, batch, row):
    """Tokens entering the last cross-attention and the gradient of one row's score there, by hand, float64."""
    model, width = source.module.double(), (source.config.width,)
    try:
        with torch.enable_grad():
            x = model.embed(batch.inputs[row.sample : row.sample + 1].double()).flatten(2).transpose(1, 2)
            x = x + model.position
            for layer in model.encoder:
                y = torch.nn.functional.layer_norm(x, width)
                x = x + layer(y, y)
            objects = model.queries
            for i, (own, cross) in enumerate(zip(model.own, model.cross, strict=True)):
                y = torch.nn.functional.layer_norm(objects, width)
                objects = objects + own(y, y)
                read = torch.nn.functional.layer_norm(x, width)
                if i == len(model.cross) - 1:
                    last = read = read.detach().requires_grad_()
                objects = objects + cross(torch.nn.functional.layer_norm(objects, width), read)
            score = model.head(torch.nn.functional.layer_norm(objects, width))[0, row.object, row.class_index]
            (gradient,) = torch.autograd.grad(score, last)
        return last.detach()[0], gradient[0]
    finally:
        model.float()


def test_odam_is_gradient_times_activation_of_what_the_decoder_reads(source):
    batch, bound = bound_objects(source)
    made = Odam(relu=False).attribute(source, batch, bound)
    assert made.signed
    for i, row in enumerate(bound.rows):
        tokens, gradient = memory(source, batch, row)
        truth = np.array([float(tokens[t] @ gradient[t]) for t in range(16)]).reshape(4, 4)
        np.testing.assert_allclose(made.values[i], truth, atol=2e-5 * np.abs(truth).max())
    positive = Odam().attribute(source, batch, bound)
    np.testing.assert_allclose(positive.values, np.maximum(made.values, 0))


def test_gradcam_weighs_channels_where_odam_weighs_places(source):
    batch, bound = bound_objects(source)
    made = GradCam(relu=False).attribute(source, batch, bound)
    for i, row in enumerate(bound.rows):
        tokens, gradient = memory(source, batch, row)
        truth = (tokens @ gradient.mean(0)).numpy().reshape(4, 4)
        np.testing.assert_allclose(made.values[i], truth, atol=2e-5 * np.abs(truth).max())


@pytest.mark.parametrize("method", METHODS)
def test_objects_of_one_image_are_explained_apart_and_as_if_alone(source, method):
    before = snapshot(source.module)
    batch, bound = bound_objects(source)
    made = method().attribute(source, batch, bound)
    assert made.values.shape == (12, 4, 4)
    assert np.isfinite(made.values).all()
    first, second = made.values[:2]
    if method is not LeGrad:
        assert np.abs(first - second).max() > 1e-3 * np.abs(first).max()
    alone = method().attribute(source, *only(bound, batch, 1))
    np.testing.assert_allclose(alone.values, made.values[4:8], atol=1e-5 * np.abs(made.values).max())
    assert snapshot(source.module) == before


def test_levels_are_separate_and_add_up_as_masses():
    assert [len(level) for level in patches_by_level(PYRAMID)] == [16, 4]
    values = np.random.default_rng(0).random((2, 21))
    laid = tokens_on_cells(values, PYRAMID, CELLS)
    coarse = np.repeat(np.repeat(values[:, 17:].reshape(2, 2, 2), 2, 1), 2, 2) / 4
    np.testing.assert_allclose(laid, values[:, 1:17].reshape(2, 4, 4) + coarse)
    np.testing.assert_allclose(laid.sum((1, 2)), values[:, 1:].sum(1))


def test_one_level_stays_on_its_cells():
    axis = PYRAMID.take(range(17))
    values = np.random.default_rng(1).random(17)
    np.testing.assert_array_equal(tokens_on_cells(values, axis, CELLS), values[1:].reshape(4, 4))


def test_every_level_of_a_pyramid_has_its_own_gradcam_weights():
    random = torch.Generator().manual_seed(0)
    A, G = (torch.randn(1, 21, 5, generator=random, dtype=torch.float64) for _ in range(2))
    found = GradCam().weigh(A, G, PYRAMID)[0]
    for level in (range(1, 17), range(17, 21)):
        weights = torch.stack([G[0, t] for t in level]).mean(0)
        for t in level:
            assert float(found[t]) == pytest.approx(float(A[0, t] @ weights))
    assert float(found[0]) == 0.0


def test_a_pyramid_lies_on_its_finest_cells_with_all_its_mass():
    values = np.random.default_rng(0).random((2, 3, len(PYRAMID)))
    laid, grid = on_finest(values, PYRAMID)
    assert grid == CELLS
    coarse = values[..., 17:].reshape(2, 3, 2, 2).repeat(2, axis=-2).repeat(2, axis=-1) / 4
    np.testing.assert_allclose(laid, values[..., 1:17].reshape(2, 3, 4, 4) + coarse)
    one = TokenAxis.patches(4, 4, height=32, width=32)
    np.testing.assert_array_equal(on_finest(values[..., :16], one)[0], values[..., :16].reshape(2, 3, 4, 4))
