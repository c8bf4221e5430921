"""Explanations of video transformers: every method that can, and Grad-CAM within frames against a hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate.attribution.attention import CheferICCV21, GradAttention, LeGrad, ReadoutAttention, Rollout
from foveate.attribution.gradcam import GradCam
from foveate.attribution.gradients import Saliency
from foveate.attribution.objective import Objective
from foveate.attribution.odam import Odam
from foveate.attribution.perturbation import FeatureAblation
from foveate.attribution.reference_clips import Motion
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.units import Unit
from foveate.interfaces import Target
from video_models import clips, open_tiny

MODELS = (
    "VideoMAEForVideoClassification",
    "VivitForVideoClassification",
    "VJEPA2ForVideoClassification",
    "TimesformerForVideoClassification",
    "TimeSformer, joint",
)
METHODS = (
    ReadoutAttention(),
    Rollout(),
    GradAttention(),
    CheferICCV21(),
    LeGrad(),
    GradCam(),
    Odam(),
    Saliency(),
    FeatureAblation(rows=16),
    Motion(),
)


def explained(name, count=2):
    source = open_tiny(name)
    batch = source.encode(clips(count))
    return source, batch, source.bind(source.forward(batch), batch, Target(scale="logit"))


@pytest.mark.parametrize("name", MODELS)
def test_maps_lie_on_frame_cells_and_do_not_depend_on_the_batch(name):
    source, batch, bound = explained(name)
    frames = max(source.frame_cells(batch)) + 1
    for method in METHODS:
        made = method.attribute(source, batch, bound)
        assert made.values.shape == (2, frames, 4, 4), method.name
        assert np.ptp(made.values) > 0, method.name
        alone = method.attribute(source, batch.replace(batch.inputs[1:], [1]), bound.take([1])).values[0]
        scale = float(np.abs(alone).max())
        np.testing.assert_allclose(made.values[1], alone, atol=1e-4 * scale, err_msg=method.name)


def test_gradcam_of_attention_within_frames_uses_the_tokens_of_all_frames():
    source, batch, bound = explained("TimesformerForVideoClassification")
    module, kept = source.module, {}
    layers = {layer: p for s in source.sites if s.id == "encoder.space" for p, layer in s.modules.items()}
    path = layers[max(layers)]

    def keep(_, args, kwargs):
        kept["x"] = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor))
        kept["x"].retain_grad()

    handle = module.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    leaf = batch.inputs.clone().requires_grad_()
    held = batch.replace(leaf, [0, 1])
    source.score(source.forward(held, grad=True), held, bound).sum().backward()
    handle.remove()
    tokens, slope = kept["x"].detach().double(), kept["x"].grad.double()
    tokens, slope = (one.reshape(2, 4, 17, -1)[:, :, 1:] for one in (tokens, slope))  # without copies of CLS
    weights = slope.mean((1, 2), keepdim=True)
    want = (weights * tokens).sum(-1).clamp_min(0).reshape(2, 4, 4, 4)
    got = GradCam().attribute(source, batch, bound).values
    np.testing.assert_allclose(got, want, atol=1e-5 * float(want.max()))
    module.zero_grad()


@pytest.mark.parametrize("unit", [Unit("cells"), Unit("tubes"), Unit("frames")], ids=lambda u: u.kind)
def test_a_video_transformer_is_scored_in_every_unit(unit):
    source, batch, bound = explained("VideoMAEForVideoClassification")
    objective = Objective(source, batch, bound)
    values = ReadoutAttention().attribute(source, batch, bound).values.reshape(2, -1).astype(float)
    scoring = Scoring(Protocol(baselines=("freeze", "mean"), steps=3), random_orders=4, unit=unit)
    got = score_maps(objective, {"readout": values}, source.cells(batch), scoring)
    assert np.isfinite(got.curves).all()
    with torch.no_grad():
        intact = objective(objective.inputs)
    np.testing.assert_allclose(got.curves[:, 0, 0, 0, 1, 0], intact, atol=1e-5)
