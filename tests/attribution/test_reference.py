"""The controls: what they know, and that they know nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from attribution_fakes import bound_batch, two_targets_a_sample
from foveate.attribution import reference as r
from foveate.attribution.gradients import Saliency
from foveate.errors import UsageError
from foveate.interfaces import Sample, Target
from foveate.testing.tiny import TinyConfig, TinyCropSource, TinySource, tiny_samples


@pytest.fixture(scope="module")
def tiny():
    source = TinySource()
    return source, *bound_batch(source, 3)


def _one(source, pixels):
    batch = source.encode([Sample("one", pixels)])
    return batch, source.bind(source.forward(batch), batch, Target())


@pytest.mark.parametrize("method", [r.Uniform, r.Random, r.Centre, r.Edge, r.Saturation])
def test_one_map_a_target_row(tiny, method):
    source, batch, bound = tiny
    made = method().attribute(source, batch, two_targets_a_sample(bound, 3), seed=4)
    assert made.values.shape == (6, 4, 4)
    assert made.values.dtype == np.float32
    np.testing.assert_array_equal(made.values[::2], made.values[1::2])
    assert made.grid == source.cells(batch)
    assert made.info["citation"].startswith("control")


def test_uniform_is_constant(tiny):
    assert np.unique(r.Uniform().attribute(*tiny).values).size == 1


def test_random_depends_on_seed_and_sample_alone(tiny):
    source, batch, bound = tiny
    maps = r.random_maps(source, batch, bound, seed=10)
    assert len(maps) == 20
    stacked = np.stack([m.values for m in maps])
    assert np.unique(stacked.reshape(60, -1), axis=0).shape[0] == 60
    assert abs(stacked.mean() - 0.5) < 0.03
    assert abs(stacked.std() - 12**-0.5) < 0.02
    turned = batch.replace(batch.inputs[[2, 0]], [2, 0])
    other = r.Random().attribute(source, turned, source.bind(source.forward(turned), turned, Target()), seed=10)
    np.testing.assert_array_equal(other.values, stacked[0][[2, 0]])


def test_centre_by_hand(tiny):
    values = r.Centre(sigma=0.3).attribute(*tiny).values[0]
    for i in range(4):
        for j in range(4):
            y, x = (8 * i + 4) / 32 - 0.5, (8 * j + 4) / 32 - 0.5
            assert values[i, j] == pytest.approx(np.exp(-(y * y + x * x) / (2 * 0.3**2)), rel=1e-5)
    with pytest.raises(UsageError, match="sigma"):
        r.Centre(sigma=0).attribute(*tiny)


def test_edge_equals_slow_sobel():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    source = TinySource()
    batch = source.encode([Sample("black", np.zeros_like(pixels)), Sample("one", pixels)])
    bound = source.bind(source.forward(batch), batch, Target())
    black, got = r.Edge().attribute(source, batch, bound).values
    assert not black.any()  # a neighbour in the batch must not leak in
    luma = np.pad(pixels @ [0.299, 0.587, 0.114] / 255, 1, mode="symmetric")
    kernel = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]]) / 8
    strength = np.zeros((32, 32))
    for y in range(32):
        for x in range(32):
            part = luma[y : y + 3, x : x + 3]
            strength[y, x] = np.hypot((kernel * part).sum(), (kernel.T * part).sum())
    np.testing.assert_allclose(got, strength.reshape(4, 8, 4, 8).mean((1, 3)), atol=1e-5)


def test_saturation_sees_colour_and_not_brightness():
    pixels = np.full((32, 32, 3), 90, np.uint8)
    pixels[:8, :8] = 250
    pixels[8:16, 16:24, 0] = 190
    source = TinySource()
    got = r.Saturation().attribute(source, *_one(source, pixels)).values[0]
    want = np.zeros((4, 4))
    want[1, 2] = 100 / 255
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("make", [TinySource, TinyCropSource])
def test_oracle_is_the_area_of_the_mask(make):
    source = make()
    mask = np.zeros((40, 60), bool)
    mask[8:20, 15:33] = True
    pixels = np.zeros((40, 60, 3), np.uint8)
    batch, bound = _one(source, pixels)
    geometry = batch.geometry[0]
    got = r.Oracle([mask]).attribute(source, batch, bound).values[0]
    steps = (np.arange(400) + 0.5) / 400
    for i in range(4):
        for j in range(4):
            y, _ = geometry.to_original(8 * (i + steps), 0 * steps)
            _, x = geometry.to_original(0 * steps, 8 * (j + steps))
            inside = np.outer((y >= 8) & (y < 20), (x >= 15) & (x < 33))
            assert got[i, j] == pytest.approx(inside.mean(), abs=0.01)


def test_oracle_without_or_with_a_wrong_mask(tiny):
    source, batch, bound = tiny
    masks = [sample.mask for sample in tiny_samples(3)]
    made = r.Oracle([masks[0], None, masks[2]]).attribute(source, batch, bound).values
    assert np.isnan(made[1]).all()
    assert made[0].sum() * 64 == pytest.approx(masks[0].sum())
    with pytest.raises(UsageError, match="2 masks for 3"):
        r.Oracle(masks[:2]).attribute(source, batch, bound)
    with pytest.raises(UsageError, match="mask is"):
        r.Oracle([masks[0][:5], None, None]).attribute(source, batch, bound)


def test_untrained_is_the_method_on_the_twin(tiny):
    source, batch, bound = tiny
    twin = TinySource(seed=9)
    made = r.Untrained(Saliency(), twin).attribute(source, batch, bound)
    np.testing.assert_array_equal(made.values, Saliency().attribute(twin, batch, bound).values)
    assert not np.allclose(made.values, Saliency().attribute(source, batch, bound).values)
    assert made.method == "saliency@untrained"
    with pytest.raises(UsageError, match="other cells"):
        r.Untrained(Saliency(), TinySource(TinyConfig(patch=16))).attribute(source, batch, bound)
