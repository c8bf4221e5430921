"""Every family of the ViT plugin can be explained by every kind of method: tokens, readouts and targets fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.attribution.objective import Objective
from foveate.interfaces import Target
from foveate.study.attribute_plan import build_methods
from vit_models import CASES, open_plonk, open_tiny, photos

METHODS = ("readout", "rollout", "chefer_iccv21", "legrad", "gradcam", "saliency", "ablation", "saturation")


def _check(source, kind, scale="logit"):
    batch = source.encode(photos(2))
    bound = source.bind(source.forward(batch), batch, Target(kind, scale=scale))
    for method in build_methods(METHODS):
        made = method.attribute(source, batch, bound)
        assert made.values.shape == (len(bound), *source.cells(batch).shape), method.name
        assert np.isfinite(made.values).all(), method.name
        assert (np.ptp(made.values, axis=(1, 2)) > 0).all(), method.name
    return batch, bound


@pytest.mark.parametrize("case", list(CASES))
def test_maps_of_every_family(case):
    source = open_tiny(case)
    batch, bound = _check(source, "default")
    complete = build_methods(["ig"], {"ig": {"n_steps": 96}})[0].attribute(source, batch, bound)
    objective = Objective(source, batch, bound)
    with torch.no_grad():
        change = objective(batch.inputs) - objective(0 * batch.inputs)
    np.testing.assert_allclose(complete.values.sum((1, 2)), change.numpy(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["cosine", "geodesic", "log_likelihood"])
def test_a_geolocators_targets(kind):
    """Solvers and divergences inside the score: gradients reach the pixels, and perturbation needs none."""
    _check(open_plonk(), kind)
