"""Explanations of video transformers: every method that can, and Grad-CAM within frames against a hook."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from daq_models import GOLDEN, golden_tensors, needs_golden
from foveate.attribution.attention import CheferICCV21, GradAttention, LeGrad, ReadoutAttention, Rollout
from foveate.attribution.gradcam import GradCam
from foveate.attribution.gradients import Saliency
from foveate.attribution.objective import Objective
from foveate.attribution.objects import OwnMask
from foveate.attribution.odam import Odam
from foveate.attribution.perturbation import FeatureAblation
from foveate.attribution.reference_clips import Motion
from foveate.errors import FoveateError
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.units import Unit
from foveate.interfaces import Sample, Target
from foveate.plugins.opening import open_source
from video_models import clips, open_tiny, open_videomt

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


def tracked():
    source = open_videomt()
    batch = source.encode(clips(1, frames=4))
    outputs = source.forward(batch)
    return source, source.hold(batch, outputs), source.bind(outputs, batch, Target(scale="logit")), outputs


def test_odam_of_a_layer_that_runs_once_a_frame_joins_its_calls():
    source, batch, bound, outputs = tracked()
    kept = []
    site = next(s for s in source.sites if s.id == "decoder.self")
    path = next(p for p, layer in site.modules.items() if layer == max(site.layers))

    def keep(_, args, kwargs):
        kept.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.dim() == 3))
        kept[-1].retain_grad()

    handle = source.module.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
    leaf = batch.inputs.clone().requires_grad_()
    held = batch.replace(leaf, [0])
    source.score(source.forward(held, grad=True), held, bound)[0].backward()
    handle.remove()
    source.module.zero_grad()
    calls = [step.call for step in source.flow(batch, outputs) if getattr(step, "call", ("",))[0] == site.id]
    patches = source.label(calls[-1], batch, outputs).key.where("patch")
    assert len(kept) == 4  # one call a frame
    products = [(one.detach().double() * one.grad.double()).sum(-1)[0, patches] for one in kept]
    want = torch.stack(products).clamp_min(0).reshape(4, 4, 4)
    got = Odam().attribute(source, batch, bound.take([0])).values[0]
    np.testing.assert_allclose(got, want, atol=1e-5 * float(want.max()))


def test_the_readout_of_a_track_is_its_row_in_every_frame():
    source, batch, bound, _ = tracked()
    got = ReadoutAttention().attribute(source, batch, bound.take([0])).values[0]
    assert got.shape == (4, 4, 4)
    sums = got.reshape(4, -1).sum(1)
    assert (sums > 0).all()
    assert sums.max() <= 1.0 + 1e-5  # the rest of a row lies on queries and registers


@needs_golden
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_tracks_of_dvis_daq_are_explained_with_their_identities_held(mode):
    source = open_source(
        "dvis-daq",
        weights=GOLDEN / "state_dict.safetensors",
        config=GOLDEN / mode / "config.json",
        mode=mode,
        shortest_edge=0,
    )
    pixels = golden_tensors("clip")["clip"].permute(0, 2, 3, 1).contiguous().numpy()
    batch = source.encode([Sample("clip", pixels)])
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target(scale="logit")).take([0])
    batch = source.hold(batch, outputs)
    frames = len(pixels)
    for method in (Saliency(), GradCam(), Odam(), LeGrad(), OwnMask(), Motion()):
        values = method.attribute(source, batch, bound).values
        assert values.shape == (1, frames, *source.cells(batch).shape), method.name
        assert np.ptp(values) > 1e-4, method.name
    objective = Objective(source, batch, bound)
    own = OwnMask().attribute(source, batch, bound).values.reshape(1, -1).astype(float)
    scoring = Scoring(Protocol(baselines=("freeze",), steps=2), random_orders=2, unit=Unit("frames"))
    got = score_maps(objective, {"own_mask": own}, source.cells(batch), scoring)
    assert np.isfinite(got.curves).all()
    with pytest.raises(FoveateError):
        ReadoutAttention().attribute(source, batch, bound)  # its keys are instances or frames, not places
