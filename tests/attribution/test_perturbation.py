"""Captum's perturbation methods on patches, against loops and exact Shapley values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from captum import attr

from attribution_fakes import FunctionSource, bound_batch, linear_source, only, snapshot, two_targets_a_sample
from foveate.attribution import perturbation as p
from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.attribution.pooling import feature_mask
from foveate.attribution.seeding import sample_seed
from foveate.errors import MissingDependencyError, UsageError
from foveate.geometry import CellGrid
from foveate.testing.tiny import TinyConfig, TinySource

ALL = [p.FeatureAblation, p.Occlusion, p.KernelShap, p.Lime]


@pytest.fixture(scope="module")
def tiny():
    source = TinySource()
    return source, *bound_batch(source, 3)


def _score(source, bound, row, pixels):
    with torch.no_grad():
        return float(source.forward(_as_batch(source, pixels))[0, bound.rows[row].class_index])


def _as_batch(source, pixels):
    class Bare:
        inputs = pixels[None]

        def __len__(self):
            return 1

    return Bare()


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur"])
def test_ablation_equals_a_loop_over_patches(tiny, baseline):
    source, batch, bound = tiny
    got = p.FeatureAblation(baseline=baseline).attribute(source, batch, bound).values
    other = make_baseline(baseline, Objective(source, batch, bound))
    for row, i, j in itertools.product(range(3), range(4), range(4)):
        changed = batch.inputs[row].clone()
        here = (slice(None), slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
        changed[here] = other[row][here]
        drop = _score(source, bound, row, batch.inputs[row]) - _score(source, bound, row, changed)
        assert got[row, i, j] == pytest.approx(drop, abs=1e-5)


def test_occlusion_equals_a_loop_over_windows(tiny):
    """A cell's value: the mean drop over the 2 x 2 windows that cover it."""
    source, batch, bound = tiny
    got = p.Occlusion().attribute(source, batch, bound).values
    for row in range(3):
        total, count = np.zeros((4, 4)), np.zeros((4, 4))
        whole = _score(source, bound, row, batch.inputs[row])
        for i, j in itertools.product(range(3), range(3)):
            changed = batch.inputs[row].clone()
            changed[:, 8 * i : 8 * i + 16, 8 * j : 8 * j + 16] = 0.0
            total[i : i + 2, j : j + 2] += whole - _score(source, bound, row, changed)
            count[i : i + 2, j : j + 2] += 1
        np.testing.assert_allclose(got[row], total / count, atol=1e-5)


def test_occlusion_with_a_window_of_one_patch_is_ablation(tiny):
    one = p.Occlusion(window=1).attribute(*tiny).values
    np.testing.assert_allclose(one, p.FeatureAblation().attribute(*tiny).values, atol=1e-6)


def _exact_shapley(value, count):
    """Shapley 1953, by all subsets."""
    phi = np.zeros(count)
    for i in range(count):
        others = [j for j in range(count) if j != i]
        for size in range(count):
            weight = math.factorial(size) * math.factorial(count - size - 1) / math.factorial(count)
            for chosen in itertools.combinations(others, size):
                phi[i] += weight * (value({*chosen, i}) - value(set(chosen)))
    return phi


def test_kernel_shap_tends_to_exact_shapley_values():
    source = TinySource(TinyConfig(image=16, patch=8))
    batch = bound_batch(TinySource(), 2)[0]
    small = batch.replace(batch.inputs[:, :, :16, :16], [0, 1])
    bound = source.bind(source.forward(small), small, _logit_target())
    made = p.KernelShap(evaluations_per_patch=500).attribute(source, small, bound)
    for row in range(2):

        def value(kept, row=row):
            pixels = torch.zeros(3, 16, 16)
            for cell in kept:
                i, j = divmod(cell, 2)
                here = (slice(None), slice(8 * i, 8 * i + 8), slice(8 * j, 8 * j + 8))
                pixels[here] = small.inputs[row][here]
            return _score(source, bound, row, pixels)

        want = _exact_shapley(value, 4)
        np.testing.assert_allclose(made.values[row].ravel(), want, atol=0.05 * np.abs(want).max())


def _logit_target():
    from foveate.interfaces import Target

    return Target(scale="logit")


def test_on_an_additive_model_shap_and_ablation_agree():
    source, w = linear_source()
    batch, bound = bound_batch(source, 2)
    classes = [row.class_index for row in bound.rows]
    want = (w[classes] * batch.inputs).reshape(2, 3, 4, 8, 4, 8).sum((1, 3, 5)).numpy()
    for method in (p.FeatureAblation(), p.KernelShap()):
        got = method.attribute(source, batch, bound)
        np.testing.assert_allclose(got.values, want, atol=1e-3)
        assert got.converged


@pytest.mark.parametrize(("method", "own"), [(p.KernelShap, attr.KernelShap), (p.Lime, attr.Lime)])
def test_sampled_equal_a_users_captum_script_under_the_recorded_seed(tiny, method, own):
    source, batch, bound = tiny
    mask = feature_mask(batch.inputs, source.cells(batch))
    got = method(evaluations_per_patch=4).pixels(Objective(source, batch, bound), seed=3).values
    for row, sample in enumerate(batch.ids):
        torch.manual_seed(sample_seed(3, sample))
        want = own(lambda x: source.module(x)).attribute(
            batch.inputs[row : row + 1],
            target=bound.rows[row].class_index,
            feature_mask=mask,
            n_samples=64,
            perturbations_per_eval=256,
        )
        assert torch.equal(got[0, row], want[0])


@pytest.mark.parametrize(("method", "own"), [(p.FeatureAblation, attr.FeatureAblation)])
def test_ablation_equals_a_users_captum_script(tiny, method, own):
    source, batch, bound = tiny
    mask = feature_mask(batch.inputs, source.cells(batch))
    target = torch.tensor([row.class_index for row in bound.rows])
    want = own(lambda x: source.module(x)).attribute(
        batch.inputs, target=target, feature_mask=mask, perturbations_per_eval=85
    )
    got = method().pixels(Objective(source, batch, bound)).values
    assert torch.equal(got[0], want)


@pytest.mark.parametrize("method", ALL)
def test_a_batch_equals_its_images_one_by_one(tiny, method):
    source, batch, bound = tiny
    bound = two_targets_a_sample(bound, 3)
    whole = method().attribute(source, batch, bound, seed=3)
    for sample in range(3):
        alone = method().attribute(source, *only(bound, batch, sample), seed=3)
        np.testing.assert_allclose(whole.values[2 * sample : 2 * sample + 2], alone.values, atol=1e-4)


@pytest.mark.parametrize("method", ALL)
def test_the_model_is_left_alone(tiny, method):
    source, batch, bound = tiny
    before = snapshot(source.module)
    method().attribute(source, batch, bound)
    assert snapshot(source.module) == before


def test_many_perturbations_share_a_forward_pass():
    source, _ = linear_source()
    batch, bound = bound_batch(source, 2)
    source.calls.clear()
    p.FeatureAblation(rows=64).attribute(source, batch, bound)
    assert sum(source.calls) == 2 * 17
    assert len(source.calls) == 2  # the whole image, then all 16 patches of both


@pytest.mark.parametrize(
    "method", [p.FeatureAblation(), p.Occlusion(), p.Occlusion(stride=2), p.KernelShap(evaluations_per_patch=3)]
)
def test_the_stated_cost_is_what_is_spent(method):
    source, _ = linear_source()
    batch, bound = bound_batch(source, 1)
    objective = Objective(source, batch, bound, rows=64)
    source.calls.clear()
    method.pixels(objective)
    spent = sum(source.calls)
    assert 0 <= spent - method.cost((4, 4)).forward <= 4  # Captum's own look at the whole image, a seed


def test_too_few_evaluations_are_called_not_converged(tiny):
    made = p.KernelShap(evaluations_per_patch=1).attribute(*tiny)
    assert not made.converged
    assert made.info["evaluations_per_patch"] == 2.0  # two seeds
    assert (made.info["per_row"]["seed_spearman"] < 0.8).any()


def test_a_map_of_zeros_is_not_converged(tiny):
    made = p.Lime(alpha=100.0).attribute(*tiny)
    assert not made.values.any()
    assert not made.converged


def test_uneven_cells():
    source = FunctionSource(lambda x: x.sum((2, 3))[:, :2])
    source.cells = lambda batch: CellGrid(np.array([0.0, 8.0, 32.0]), np.array([0.0, 20.0, 32.0]))
    batch, bound = bound_batch(source, 1)
    got = p.FeatureAblation().attribute(source, batch, bound).values[0]
    channel = batch.inputs[0, bound.rows[0].class_index]
    want = [[channel[:8, :20].sum(), channel[:8, 20:].sum()], [channel[8:, :20].sum(), channel[8:, 20:].sum()]]
    np.testing.assert_allclose(got, np.array(want), rtol=1e-3, atol=1e-2)
    one = p.Occlusion(window=1).attribute(source, batch, bound).values[0]
    np.testing.assert_allclose(one, got, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"window": 3, "stride": 2}, {"window": 1}, {"stride": 2}])
def test_windows_of_patches_are_captums_where_patches_are_equal(tiny, monkeypatch, options):
    by_captum = p.Occlusion(**options).attribute(*tiny).values
    monkeypatch.setattr(p, "patch_size", lambda block: None)
    np.testing.assert_allclose(p.Occlusion(**options).attribute(*tiny).values, by_captum, atol=1e-5)


def test_bad_input(tiny, monkeypatch):
    with pytest.raises(UsageError, match="repeats must be at least 2"):
        p.KernelShap(repeats=1).attribute(*tiny)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"foveate\[lime\]"):
        p.Lime().attribute(*tiny)
