"""PLONK: the flow against closed forms and loops, gradients against differences, parity with diff-plonk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from math import asin, cos, pi, radians, sin, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.linalg import expm

from foveate.capture.engine import capture_batch
from foveate.errors import MissingDependencyError, ModelError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate_vit.plonk import upstream
from foveate_vit.plonk.flow import Schedule, endpoints, log_likelihood
from foveate_vit.plonk.network import VelocityNetwork
from foveate_vit.plonk.sphere import (
    EARTH_KM,
    distance_km,
    medoid,
    resultant_length,
    softened_km,
    to_degrees,
    to_unit,
)
from vit_models import NETWORK, open_plonk, photos, sharpen


def random_unit(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=generator, dtype=torch.float64), dim=-1)


# ------------------------------------------------------------------------------- the sphere


def test_distance_is_the_haversine() -> None:
    random = np.random.default_rng(0)
    degrees = np.stack([random.uniform(-90, 90, (200, 2)), random.uniform(-180, 180, (200, 2))], -1)
    a, b = (to_unit(torch.tensor(degrees[:, i])) for i in range(2))
    for i, ((lat1, lon1), (lat2, lon2)) in enumerate(np.radians(degrees)):
        h = sin((lat2 - lat1) / 2) ** 2 + cos(lat1) * cos(lat2) * sin((lon2 - lon1) / 2) ** 2
        assert float(distance_km(a[i], b[i])) == pytest.approx(2 * EARTH_KM * asin(sqrt(h)), rel=1e-9)


def test_known_distances_and_small_ones() -> None:
    paris, london = to_unit(torch.tensor([[48.8566, 2.3522], [51.5074, -0.1278]], dtype=torch.float64))
    assert float(distance_km(paris, london)) == pytest.approx(343.6, abs=0.5)
    near = to_unit(torch.tensor([[48.8566, 2.3522], [48.8567, 2.3522]]))  # float32: 11 m
    assert float(distance_km(near[0], near[1])) == pytest.approx(EARTH_KM * radians(1e-4), rel=0.05)


def test_the_softened_distance_has_no_gradient_at_zero_and_is_the_distance_elsewhere() -> None:
    here = random_unit(1)[0].float()
    for nudge in (0.0, 1e-7):
        moved = (here + nudge * torch.tensor([0.3, -0.8, 0.5])).requires_grad_(True)
        (gradient,) = torch.autograd.grad(softened_km(moved, here), moved)
        assert gradient.norm() < 0.01 * EARTH_KM
    a, b = random_unit(20), random_unit(20, seed=1)
    torch.testing.assert_close(softened_km(a, b), distance_km(a, b) - 1.0, atol=0.01, rtol=0)


def test_degrees_round_trip() -> None:
    degrees = torch.tensor([[10.0, 20.0], [-33.9, 151.2], [89.0, -179.0]], dtype=torch.float64)
    torch.testing.assert_close(to_degrees(3.0 * to_unit(degrees)), degrees)


def test_the_medoid_is_the_best_of_the_points_and_never_between_two_cities() -> None:
    points = random_unit(7).view(1, 7, 3)
    cost = [sum(float(distance_km(p, q)) for q in points[0]) for p in points[0]]
    torch.testing.assert_close(medoid(points)[0], points[0, int(np.argmin(cost))])
    cities = to_unit(
        torch.tensor([[[0.0, 0.0], [0.0, 1.0], [0.0, 0.6], [0.0, 90.0], [0.0, 0.3]]], dtype=torch.float64)
    )
    torch.testing.assert_close(medoid(cities)[0], cities[0, 2])


def test_agreement_is_one_for_one_place_and_zero_for_opposite_ones() -> None:
    here = random_unit(1)
    assert float(resultant_length(here.expand(4, 3))) == pytest.approx(1.0)
    assert float(resultant_length(torch.cat([here, -here]))) == pytest.approx(0.0, abs=1e-12)


# ------------------------------------------------------------------------------- the flow


def test_the_schedule_falls_from_one_to_zero_and_knows_its_slope() -> None:
    schedule = Schedule()
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    levels = schedule(t)
    assert levels[0] == pytest.approx(1.0)
    assert levels[-1] == pytest.approx(0.0, abs=1e-8)
    assert (levels.diff() < 0).all()
    middle = t[1:-1]
    slope = (schedule(middle + 1e-5) - schedule(middle - 1e-5)) / 2e-5
    torch.testing.assert_close(schedule.slope(middle), slope, atol=1e-7, rtol=1e-6)


class Linear(torch.nn.Module):
    """v(x) = A x + gamma b + embedding: its flow and divergence are known in closed form for b = 0."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return batch["y"] @ self.matrix.T + batch["emb"]


def test_the_likelihood_of_a_linear_flow_is_its_closed_form() -> None:
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = random_unit(4)
    found = log_likelihood(Linear(matrix), torch.zeros(4, 3, dtype=torch.float64), points, steps=400)
    # d log p / dt = gamma'(t) tr(A), and gamma runs from 1 to 0
    expected = -np.log(4 * pi) - float(matrix.trace())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


class Swirl(torch.nn.Module):
    """A flow whose divergence changes from place to place."""

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        x, e, g = batch["y"], batch["emb"], batch["gamma"][:, None]
        return torch.sin(2 * x + e) * (1 + g) + 0.5 * x.roll(1, -1) * x


def slow_likelihood(point: np.ndarray, emb: np.ndarray, steps: int) -> float:
    """Numpy, midpoint rule on a fine grid, the divergence written out by hand."""
    schedule = Schedule()

    def both(t: float, x: np.ndarray) -> tuple[np.ndarray, float]:
        time = torch.tensor(t, dtype=torch.float64)
        g, slope = float(schedule(time)), float(schedule.slope(time))
        v = np.sin(2 * x + emb) * (1 + g) + 0.5 * np.roll(x, 1) * x
        divergence = np.sum(2 * np.cos(2 * x + emb)) * (1 + g) + 0.5 * np.sum(np.roll(x, 1))
        return slope * v, slope * divergence

    x, total, h = point.copy(), 0.0, 1 / steps
    for k in range(steps):
        half = x + h / 2 * both(k * h, x)[0]
        dx, divergence = both((k + 0.5) * h, half)
        x, total = x + h * dx, total + h * divergence
    return -np.log(4 * pi) + total


def test_the_likelihood_of_a_curved_flow_agrees_with_a_slow_loop() -> None:
    points, emb = random_unit(3), random_unit(3, seed=1)
    found = log_likelihood(Swirl(), emb, points, steps=64)
    expected = [slow_likelihood(p, e, 4000) for p, e in zip(points.numpy(), emb.numpy(), strict=True)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_a_linear_flow_without_projection_would_be_an_exponential() -> None:
    """Rotations keep the sphere, so that projecting changes nothing and expm is the exact answer."""
    spin = torch.tensor([[0.0, -1.3, 0.4], [1.3, 0.0, 0.7], [-0.4, -0.7, 0.0]], dtype=torch.float64)
    noise = random_unit(5)
    found = endpoints(Linear(spin), torch.zeros(5, 3, dtype=torch.float64), noise, steps=4000)
    expected = noise @ torch.tensor(expm(spin.numpy())).T  # gamma runs from 0 to 1
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)


def test_the_likelihood_does_not_care_whether_gradients_are_wanted() -> None:
    points, emb = random_unit(3), random_unit(3, seed=1)
    with torch.no_grad():
        plain = log_likelihood(Swirl(), emb, points, steps=8)
    kept = log_likelihood(Swirl(), emb.clone().requires_grad_(True), points, steps=8)
    assert not plain.requires_grad
    assert kept.requires_grad
    torch.testing.assert_close(plain, kept.detach())


# ------------------------------------------------------------------------------- the source


def test_the_condition_is_the_class_token_before_the_last_normalisation() -> None:
    source = open_plonk()
    batch = source.encode(photos(2))
    outputs = source.forward(batch)
    encoder = source.module.vision_model
    theirs = encoder(pixel_values=batch.inputs)
    torch.testing.assert_close(source.embedding(outputs), theirs.last_hidden_state[:, 0])
    assert not torch.allclose(source.embedding(outputs), theirs.pooler_output, atol=1e-2)


@pytest.mark.parametrize("kind", ["cosine", "geodesic", "log_likelihood"])
def test_gradients_flow_to_the_pixels_as_finite_differences_say(kind: str) -> None:
    source = open_plonk(dtype="float64")
    source.noise = source.noise.double()
    batch = source.encode(photos(2))
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    bound = source.bind(outputs, batch, Target(kind))
    (gradient,) = torch.autograd.grad(source.score(outputs, batch, bound).sum(), batch.inputs)
    step = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def at(h: float) -> float:
        moved = batch.replace((batch.inputs + h * step).detach(), [0, 1])
        return float(source.score(source.forward(moved), moved, bound).double().sum())

    h = 3e-4
    assert gradient.abs().sum() > 0
    assert (at(h) - at(-h)) / (2 * h) == pytest.approx(float((gradient * step).sum()), rel=3e-2)


@pytest.mark.parametrize("kind", ["cosine", "geodesic", "log_likelihood"])
def test_scores_are_what_they_say_and_a_batch_is_its_singles(kind: str) -> None:
    source = open_plonk()
    samples = photos(3)
    batch = source.encode(samples)
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target(kind, "48.86, 2.35"))
    found = source.score(outputs, batch, bound)
    place = to_unit(torch.tensor([48.86, 2.35], dtype=torch.float64))
    for i, sample in enumerate(samples):
        alone = source.encode([sample])
        out = source.forward(alone)
        single = source.score(out, alone, source.bind(out, alone, Target(kind, "48.86, 2.35")))
        torch.testing.assert_close(single[0], found[i], atol=1e-3, rtol=1e-4)
        ends = source.places(out)[0].double()
        if kind == "cosine":
            assert float(found[i]) == pytest.approx(np.mean([float(e @ place) for e in ends]), abs=1e-5)
        if kind == "geodesic":
            assert float(found[i]) == pytest.approx(
                -np.mean([float(distance_km(e, place)) for e in ends]), rel=1e-4
            )
    index = [2, 0, 0]
    expanded = batch.replace(batch.inputs[index], index)
    again = source.score(source.forward(expanded), expanded, bound.take(index))
    torch.testing.assert_close(again, found[index], atol=1e-3, rtol=1e-4)


def test_the_bound_place_is_the_predicted_one_or_the_users_or_the_true_one() -> None:
    source = open_plonk()
    true = {"latitude": 10.0, "longitude": "-70.5"}
    samples = [Sample(s.id, s.pixels, columns=true) for s in photos(2)]
    batch = source.encode(samples)
    outputs = source.forward(batch)
    predicted = source.bind(outputs, batch, Target())
    best = source.predictions(outputs, batch)
    assert [row.label for row in predicted.rows] == [p[0].label for p in best]
    assert 0 <= best[0][0].score <= 1
    degrees = to_degrees(source.bind(outputs, batch, Target(label="true")).context["location"])
    torch.testing.assert_close(degrees, torch.tensor([[10.0, -70.5]]).expand(2, 2), atol=1e-3, rtol=0)
    batch = source.encode(photos(2))
    with pytest.raises(UsageError, match="'photo-0' \\(2 of 2\\)"):
        source.bind(outputs, batch, Target(label="true"))
    for label in ("Paris", "91, 0", "1, 2, 3", "nan, 2"):
        with pytest.raises(UsageError, match="no location"):
            source.bind(outputs, batch, Target(label=label))


def test_captums_checks_under_no_grad_work() -> None:
    from captum.attr import IntegratedGradients

    source = open_plonk(likelihood_steps=3)
    batch = source.encode(photos(1))
    bound = source.bind(source.forward(batch), batch, Target("log_likelihood"))

    def score(pixels: torch.Tensor) -> torch.Tensor:
        index = [0] * len(pixels)
        expanded = batch.replace(pixels, index)
        outputs = source.forward(expanded, grad=torch.is_grad_enabled())
        return source.score(outputs, expanded, bound.take(index))

    _, delta = IntegratedGradients(score).attribute(
        batch.inputs, n_steps=48, internal_batch_size=12, return_convergence_delta=True
    )
    ends = score(batch.inputs) - score(torch.zeros_like(batch.inputs))
    assert abs(float(delta)) < 0.25 * abs(float(ends)) + 0.1


def test_the_encoders_attention_is_captured_under_its_own_path() -> None:
    source = open_plonk()
    batch = source.encode(photos(2))
    site = source.sites[0]
    assert all(name.startswith("vision_model.encoder") for name in site.modules)
    captured = capture_batch(source, batch, CapturePlan((SitePlan(site.id),), dtype="float32")).sites[site.id]
    np.testing.assert_allclose(captured.arrays["attention"].sum(-1), 1.0, atol=1e-5)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Any, Path, Path]:
    source = open_plonk()
    encoder, network = tmp_path / "encoder", tmp_path / "network"
    source.module.vision_model.save_pretrained(encoder)
    network.mkdir()
    save_file(source.module.network.state_dict(), network / "model.safetensors")
    (network / "config.json").write_text(json.dumps(NETWORK | {"unread": True}))
    return source, encoder, network


def test_a_saved_pair_opens_as_the_same_model(folders: tuple[Any, Path, Path]) -> None:
    source, encoder, network = folders
    again = open_source("plonk", weights=network, encoder=encoder, samples=5, steps=8, backend="direct")
    batch = source.encode(photos(2))
    torch.testing.assert_close(again.places(again.forward(batch)), source.places(source.forward(batch)))
    assert any("network: direct" in note for note in again.card.notes)


def test_what_is_wrong_with_a_network_is_said(folders: tuple[Any, Path, Path]) -> None:
    source, encoder, network = folders
    state = source.module.network.state_dict()
    save_file({k: v for k, v in state.items() if "cond_mapper" not in k}, network / "model.safetensors")
    with pytest.raises(ModelError, match="cond_mapper"):
        open_source("plonk", weights=network, encoder=encoder)
    state["final_linear.bias"] = torch.full((3,), float("nan"))
    save_file(state, network / "model.safetensors")
    with pytest.raises(ModelError, match="NaN"):
        open_source("plonk", weights=network, encoder=encoder)
    (network / "config.json").write_text(json.dumps({"dim": 32}))
    with pytest.raises(ModelError, match="input_dim"):
        open_source("plonk", weights=network, encoder=encoder)


def test_one_sample_is_refused_because_its_gradient_would_be_zero() -> None:
    with pytest.raises(UsageError, match="zero gradient"):
        open_plonk(samples=1)


# ------------------------------------------------------------------------------- diff-plonk


def test_without_diff_plonk_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="--no-deps"):
        upstream.network_class()


def test_a_folder_called_plonk_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plonk").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    if not upstream.is_available():  # where diff-plonk is installed, the folder shadows it and stays unused
        assert open_plonk(backend="auto").card.notes[1] == "network: direct"


needs_diff_plonk = pytest.mark.skipif(
    not upstream.is_available(), reason=f"diff-plonk is not installed ({upstream.INSTALL})"
)


@needs_diff_plonk
def test_the_network_is_the_authors_own() -> None:
    theirs, mine = upstream.network_class()(**NETWORK), VelocityNetwork(**NETWORK)
    sharpen(theirs)
    mine.load_state_dict(theirs.state_dict())
    batch = {
        "y": random_unit(6).float(),
        "gamma": torch.rand(6, generator=torch.Generator().manual_seed(0)),
        "emb": torch.randn(6, 32, generator=torch.Generator().manual_seed(1)),
    }
    torch.testing.assert_close(mine(batch), theirs(batch), atol=1e-6, rtol=1e-6)


@needs_diff_plonk
def test_the_schedule_is_the_authors_own() -> None:
    from importlib import import_module

    with upstream._without_init("plonk"):
        theirs = import_module("plonk.models.schedulers").SigmoidScheduler(-7, 3, 1.0)
    t = torch.linspace(0, 1, 33)
    torch.testing.assert_close(Schedule()(t), theirs(t))
    torch.testing.assert_close(Schedule().slope(t), theirs.derivative(t))


@needs_diff_plonk
def test_the_sampler_is_the_authors_own() -> None:
    from importlib import import_module

    pytest.importorskip("geoopt", reason="diff-plonk's sampler needs geoopt")
    with upstream._without_init("plonk"):
        sampler = import_module("plonk.models.samplers.riemannian_flow_sampler").riemannian_flow_sampler
    network = VelocityNetwork(**NETWORK)
    sharpen(network)
    noise, emb = 2 * random_unit(6).float(), torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # upstream's autocast warns at every step
        theirs = sampler(
            network, {"y": noise, "emb": emb}, conditioning_keys="emb", scheduler=Schedule(), num_steps=12
        )
        torch.testing.assert_close(endpoints(network, emb, noise, steps=12), theirs, atol=1e-5, rtol=0)


@needs_diff_plonk
def test_the_authors_network_gives_the_same_places(folders: tuple[Any, Path, Path]) -> None:
    source, encoder, network = folders
    theirs = open_source("plonk", weights=network, encoder=encoder, samples=5, steps=8, backend="diff-plonk")
    assert any("network: diff-plonk" in note for note in theirs.card.notes)
    batch = source.encode(photos(2))
    torch.testing.assert_close(
        theirs.places(theirs.forward(batch)), source.places(source.forward(batch)), atol=1e-5, rtol=0
    )
