"""Captum's gradient methods: exactly Captum's numbers, and right against independent oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum import attr

from attribution_fakes import bound_batch, linear_source, only, snapshot, two_targets_a_sample
from foveate.attribution import gradients as g
from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.attribution.seeding import sample_seed
from foveate.testing.tiny import TinySource

ALL = [
    g.Saliency,
    g.SaliencyAbs,
    g.InputXGradient,
    g.InputXGradientAbs,
    g.IntegratedGradients,
    g.IntegratedGradientsAbs,
    g.GradientShap,
    g.GradientShapAbs,
    g.SmoothGrad,
    g.SmoothGradAbs,
    g.SmoothIG,
    g.SmoothIGAbs,
]


@pytest.fixture(scope="module")
def tiny():
    source = TinySource()
    return source, *bound_batch(source, 3)


def _users(source):
    """What a user's own script explains: the plain module, a class index as target."""
    return lambda pixels: source.module(pixels)


def _classes(bound):
    return torch.tensor([row.class_index for row in bound.rows])


def _cells(pixels):
    """A user's own patch pooling, (n, 3, 32, 32) to (n, 4, 4)."""
    return pixels.double().reshape(len(pixels), 3, 4, 8, 4, 8).sum((1, 3, 5)).numpy()


# ------------------------------------------------------------------ to the bit what a Captum script gives


def _own_deterministic(name, forward, x, target):
    if name == "saliency":
        return attr.Saliency(forward).attribute(x, target=target, abs=False)
    if name == "inputxgrad":
        return attr.InputXGradient(forward).attribute(x, target=target)
    return attr.IntegratedGradients(forward).attribute(
        x, baselines=0 * x, target=target, n_steps=50, internal_batch_size=256
    )


@pytest.mark.parametrize("method", [g.Saliency, g.InputXGradient, g.IntegratedGradients])
def test_pixels_equal_a_users_captum_script_to_the_bit(tiny, method):
    source, batch, bound = tiny
    x = batch.inputs.clone().requires_grad_()
    own = _own_deterministic(method.name, _users(source), x, _classes(bound))
    got = method().pixels(Objective(source, batch, bound)).values
    assert torch.equal(got[0], own.detach())
    signed = method().attribute(source, batch, bound)
    np.testing.assert_allclose(signed.values, _cells(own.detach()), rtol=1e-6)
    absolute = getattr(g, method.__name__ + "Abs")().attribute(source, batch, bound)
    np.testing.assert_allclose(absolute.values, _cells(own.detach().abs()), rtol=1e-6)
    assert signed.signed
    assert not absolute.signed


def _own_sampled(name, forward, x, target):
    spread = float((x.max() - x.min()).detach())
    if name == "gradshap":
        return attr.GradientShap(forward).attribute(
            x, baselines=0 * x, target=target, n_samples=32, stdevs=0.05 * spread
        )
    tunnel = {"nt_type": "smoothgrad", "stdevs": 0.15 * spread, "target": target}
    if name == "smoothgrad":
        return attr.NoiseTunnel(attr.Saliency(forward)).attribute(x, nt_samples=16, abs=False, **tunnel)
    return attr.NoiseTunnel(attr.IntegratedGradients(forward)).attribute(
        x, nt_samples=8, baselines=0 * x, n_steps=16, internal_batch_size=256, **tunnel
    )


@pytest.mark.parametrize("method", [g.GradientShap, g.SmoothGrad, g.SmoothIG])
def test_sampled_pixels_equal_a_users_captum_script_under_the_recorded_seed(tiny, method):
    source, batch, bound = tiny
    got = method().pixels(Objective(source, batch, bound), seed=7).values
    for row, sample in enumerate(batch.ids):
        for repeat in range(2):
            torch.manual_seed(sample_seed(7 + repeat, sample))
            np.random.seed(sample_seed(7 + repeat, sample))
            x = batch.inputs[row : row + 1].clone().requires_grad_()
            own = _own_sampled(method.name, _users(source), x, _classes(bound)[row])
            assert torch.equal(got[repeat, row], own[0].detach())


# ------------------------------------------------------------------ against oracles that are not Captum


def test_saliency_by_finite_differences():
    source = TinySource()
    source.module.double()
    batch, bound = bound_batch(source, 2)
    objective = Objective(source, batch, bound)
    source.score = lambda outputs, batch, bound: outputs[range(len(bound)), [r.class_index for r in bound.rows]]
    got = g.Saliency().pixels(objective).values[0]
    random = np.random.default_rng(0)
    for _ in range(12):
        n, c, y, x = (int(random.integers(size)) for size in (2, 3, 32, 32))
        step = torch.zeros_like(batch.inputs)
        step[n, c, y, x] = 1e-5
        with torch.no_grad():
            slope = (objective(batch.inputs + step) - objective(batch.inputs - step))[n] / 2e-5
        assert float(got[n, c, y, x]) == pytest.approx(float(slope), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("baseline", ["zero", "black", "mean", "blur"])
def test_on_a_linear_model_ig_is_weights_times_difference(baseline):
    source, w = linear_source()
    batch, bound = bound_batch(source, 3)
    method = g.IntegratedGradients(baseline=baseline)
    b = make_baseline(baseline, Objective(source, batch, bound))
    want = w[_classes(bound)] * (batch.inputs - b)
    got = method.pixels(Objective(source, batch, bound))
    torch.testing.assert_close(got.values[0], want, rtol=1e-4, atol=1e-6)
    made = method.attribute(source, batch, bound)
    assert made.converged
    assert made.info["baseline"] == baseline


@pytest.mark.parametrize("scale", ["logit", "probability"])
def test_ig_is_complete(scale):
    source = TinySource()
    batch, bound = bound_batch(source, 3, scale=scale)
    made = g.IntegratedGradients(n_steps=128).attribute(source, batch, bound)
    objective = Objective(source, batch, bound)
    with torch.no_grad():
        change = objective(batch.inputs) - objective(0 * batch.inputs)
    np.testing.assert_allclose(made.values.sum((1, 2)), change.numpy(), rtol=1e-3, atol=1e-4)
    assert made.converged


def test_too_few_steps_are_called_not_converged(tiny):
    made = g.IntegratedGradients(n_steps=2, quadrature="riemann_middle").attribute(*tiny)
    assert not made.converged
    assert not made.info["converged_rows"].all()
    rough = np.abs(made.info["per_row"]["relative_delta"])
    np.testing.assert_array_equal(made.info["converged_rows"], rough <= g.RELATIVE_DELTA)


def test_relative_delta_by_hand():
    values = torch.tensor([[[[1.0, 2.0]]], [[[50.0, -50.0]]]])
    # Captum's delta = sum - (f(x) - f(b)): changes are 2.5 and 0.1; the second counts as 1 % of 100 = 1.
    got = g.relative_delta(torch.tensor([0.5, -0.1]), values)
    np.testing.assert_allclose(got, [0.2, 0.1])


def test_gradient_shap_tends_to_ig(tiny):
    """Expected gradients with one baseline and no noise are integrated gradients in the mean."""
    source, batch, bound = tiny
    ig = g.IntegratedGradients(n_steps=64).attribute(source, batch, bound).values
    shap = g.GradientShap(n_samples=512, noise=0.0, repeats=1).attribute(source, batch, bound).values
    assert np.abs(shap - ig).max() < 0.1 * np.abs(ig).max()


def test_on_a_linear_model_smoothgrad_is_the_gradient():
    source, w = linear_source()
    batch, bound = bound_batch(source, 2)
    got = g.SmoothGrad().pixels(Objective(source, batch, bound)).values
    torch.testing.assert_close(got, w[_classes(bound)].expand(2, -1, -1, -1, -1), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ properties


@pytest.mark.parametrize("method", ALL)
def test_a_batch_equals_its_images_one_by_one(tiny, method):
    source, batch, bound = tiny
    bound = two_targets_a_sample(bound, 3)
    whole = method().attribute(source, batch, bound, seed=3)
    assert whole.values.shape == (6, 4, 4)
    assert whole.values.dtype == np.float32
    for sample in range(3):
        alone = method().attribute(source, *only(bound, batch, sample), seed=3)
        scale = np.abs(alone.values).max()
        np.testing.assert_allclose(whole.values[2 * sample : 2 * sample + 2], alone.values, atol=1e-4 * scale)
    assert not np.allclose(whole.values[0], whole.values[1])


@pytest.mark.parametrize("method", [g.Saliency, g.IntegratedGradients])
def test_a_small_budget_changes_nothing(tiny, method):
    roomy, tight = method().attribute(*tiny), method(rows=2).attribute(*tiny)
    np.testing.assert_allclose(tight.values, roomy.values, atol=1e-5 * np.abs(roomy.values).max())


@pytest.mark.parametrize("method", [g.GradientShap, g.SmoothGrad, g.SmoothIG])
def test_a_small_budget_draws_in_blocks_of_the_same_expectation(tiny, method):
    source, batch, bound = tiny
    one = method(rows=5, repeats=1, noise=0.01).attribute(source, batch, bound)
    two = method(repeats=1, noise=0.01).attribute(source, batch, bound)
    assert np.corrcoef(one.values.ravel(), two.values.ravel())[0, 1] > 0.9


@pytest.mark.parametrize("method", ALL)
def test_model_and_generators_are_left_alone(tiny, method):
    source, batch, bound = tiny
    torch.manual_seed(5)
    np.random.seed(5)
    before, torch_state, numpy_state = snapshot(source.module), torch.get_rng_state(), np.random.get_state()
    method().attribute(source, batch, bound)
    assert snapshot(source.module) == before
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert torch.is_grad_enabled()
    assert batch.inputs.grad is None


def test_seeds_decide_and_are_recorded(tiny):
    first, again, other = (g.SmoothGrad().attribute(*tiny, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.values, again.values)
    assert not np.array_equal(first.values, other.values)
    assert (first.info["seed"], first.info["noise"], first.info["pooling"]) == (0, 0.15, "signed")
    assert first.info["per_row"]["seed_spearman"].shape == (3,)


def test_drowned_in_noise_is_not_converged(tiny):
    made = g.SmoothGrad(n_samples=2, noise=5.0).attribute(*tiny)
    assert not made.converged


def test_info_says_what_fixes_the_result(tiny):
    info = g.IntegratedGradientsAbs(n_steps=8).attribute(*tiny, seed=2).info
    wanted = {"pooling": "abs", "n_steps": 8, "baseline": "zero", "scale": "logit", "seed": 2, "cell": "sum"}
    assert {key: info[key] for key in wanted} == wanted
    assert info["evaluations_per_patch"] == 10 / 16
    assert "Sundararajan" in info["citation"]
