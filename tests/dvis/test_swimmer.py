"""The small segmenter's network and source, against slow definitions, with random weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.capture.engine import capture_batch
from foveate.capture.trace import trace
from foveate.errors import ModelError, SampleError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate.testing.swimming import CLASSES, clips
from foveate_dvis.swimmer import CROSS, ENCODER, OWN
from foveate_dvis.swimmer_network import Swimmer, SwimmerConfig

SMALL = {
    "classes": ["a", "b", "c"],
    "frames": 3,
    "size": 24,
    "width": 16,
    "heads": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "queries": 3,
}


def sharpened(source):
    """Random attention is nearly uniform; larger queries and keys make it say something."""
    with torch.no_grad():
        for name, parameter in source.module.named_parameters():
            if set(name.split(".")) & {"q", "k"}:
                parameter.mul_(4.0)
            if name.startswith(("classifier", "mask_query.2")):
                parameter.mul_(6.0)
    return source


@pytest.fixture(scope="module")
def source():
    return sharpened(open_source("swimmer", weights="random", config=SMALL, seed=3, threshold=0.0))


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(1)
    shapes = ((5, 20, 24), (3, 16, 16), (1, 30, 18))
    return [Sample(f"c{i}", random.integers(0, 256, (*s, 3), dtype=np.uint8)) for i, s in enumerate(shapes)]


@pytest.fixture(scope="module")
def run(source, samples):
    batch = source.encode(samples)
    return batch, source.forward(batch)


# ------------------------------------------------------------------------------------------- network


def slow_attention(module, query, key, value):
    """One head and one row at a time, float64: softmax(q k / sqrt(d)) v (Vaswani et al. 2017, eq. 1)."""
    heads, width = module.num_heads, query.shape[-1]
    size = width // heads
    linear = {
        n: (getattr(module, n).weight.double(), getattr(module, n).bias.double()) for n in ("q", "k", "v", "out")
    }
    q, k, v = (x.double() @ linear[n][0].T + linear[n][1] for n, x in (("q", query), ("k", key), ("v", value)))
    out = torch.zeros(query.shape, dtype=torch.float64)
    rows = torch.zeros(query.shape[0], heads, query.shape[1], key.shape[1], dtype=torch.float64)
    for b in range(query.shape[0]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(query.shape[1]):
                logits = torch.tensor(
                    [float(q[b, i, part] @ k[b, j, part]) / size**0.5 for j in range(key.shape[1])]
                )
                weights = torch.softmax(logits.double(), -1)
                rows[b, h, i] = weights
                out[b, i, part] = weights @ v[b, :, part]
    return out @ linear["out"][0].T + linear["out"][1], rows


def test_attention_is_what_the_paper_says(source):
    module = source.model.decoder[0].cross_attn
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, n, 16, generator=random) for n in (3, 5, 5))
    expected, _ = slow_attention(module, query, key, value)
    torch.testing.assert_close(module(query, key, value).double(), expected, atol=1e-5, rtol=1e-5)


def test_what_is_captured_is_what_the_queries_read_with(source, run):
    """The last decoder layer's cross attention, from its own inputs, slowly."""
    batch, _ = run
    seen = {}
    module = source.model.decoder[-1].cross_attn
    handle = module.register_forward_hook(lambda m, inputs, out: seen.update(inputs=inputs))
    source.forward(batch)
    handle.remove()
    _, rows = slow_attention(module, *seen["inputs"])
    plan = CapturePlan((SitePlan(CROSS, layers=(1,), rows="all"),), dtype="float32")
    found = capture_batch(source, batch, plan).sites[CROSS].arrays["attention"][:, 0]
    np.testing.assert_allclose(found, rows.numpy(), atol=1e-5)
    assert rows.amax() > 5 / rows.shape[-1]  # far from uniform


def test_tokens_are_where_their_pixels_are(source):
    """A spot in one frame changes the first layer's tokens most at the cell under it, and none two frames away."""
    axis = source.label(next(iter(_calls(source, CROSS))), source.encode([_grey()]), None).key
    assert len(axis) == 3 * 4 * 4
    seen = {}
    hook = source.model.encoder[0].register_forward_pre_hook(lambda m, inputs: seen.update(x=inputs[0]))
    plain, spot = _grey(), _grey()
    spot.pixels[0, 14, 8] = 255
    for name, sample in (("plain", plain), ("spot", spot)):
        source.forward(source.encode([sample]))
        seen[name] = seen.pop("x")
    hook.remove()
    changed = (seen["spot"] - seen["plain"]).abs().sum(-1)[0]
    # group norm spreads a little over the whole frame
    assert int(changed.argmax()) == int(np.flatnonzero((axis.frame == 0) & (axis.y == 15) & (axis.x == 9))[0])
    assert float(changed[axis.frame == 1].max()) > 0.0
    assert float(changed[axis.frame == 2].max()) == 0.0


def _grey():
    return Sample("grey", np.full((3, 24, 24, 3), 90, np.uint8))


def _calls(source, site):
    from foveate.interfaces import CallKey

    layers = next(one for one in source.sites if one.id == site).layers
    return [CallKey(site, layer) for layer in layers]


def test_masks_answer_in_their_own_frame(source):
    """Frames exchanged in the input exchange masks where time plays no part: no code of time, no glance aside."""
    kept = {name: value.clone() for name, value in source.model.state_dict().items()}
    with torch.no_grad():
        source.model.time.zero_()
        source.model.near.weight[:, :, [0, 2]] = 0
    try:
        x = torch.rand(1, 3, 3, 24, 24) * 2 - 1
        order = [2, 0, 1]
        with torch.no_grad():
            one, other = source.model(x), source.model(x[:, order])
        torch.testing.assert_close(other.masks, one.masks[:, :, order], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(other.logits, one.logits, atol=1e-4, rtol=1e-4)
        assert (one.masks[:, :, 0] - one.masks[:, :, 1]).abs().max() > 0.01
    finally:
        source.model.load_state_dict(kept)


# -------------------------------------------------------------------------------------------- source


def test_batch_equals_singles(source, samples, run):
    _, outputs = run
    for i, sample in enumerate(samples):
        alone = source.forward(source.encode([sample]))
        torch.testing.assert_close(outputs.logits[i], alone.logits[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(outputs.masks[i], alone.masks[0], atol=1e-5, rtol=1e-5)
    assert source.forward(source.encode([])).logits.shape == (0, 3, 4)


def test_frames_are_chosen_evenly_and_named(source, samples):
    index = source.encode(samples).per_sample["frame_index"].tolist()
    assert index == [[0, 2, 4], [0, 1, 2], [0, 0, 0]]


def test_a_clip_of_the_own_size_goes_in_as_it_is():
    shipped = open_source("foveate/swim-vis-untrained")
    drawn = clips(1, seed=5)[0]
    batch = shipped.encode([Sample("x", drawn.frames)])
    expected = drawn.frames.astype(np.float64).transpose(0, 3, 1, 2) / 127.5 - 1
    np.testing.assert_allclose(batch.inputs[0].numpy(), expected, atol=1e-6)
    assert shipped.labels == list(CLASSES)


def test_predictions_hold_masks_of_the_original_size(source, samples, run):
    batch, outputs = run
    for i, (sample, answers) in enumerate(zip(samples, source.predictions(outputs, batch), strict=True)):
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)
        for answer in answers:
            assert answer.mask.shape == (3, *sample.pixels.shape[1:3])
            query = answer.object
            assert answer.track == str(query)
            probabilities = outputs.logits[i, query].double().softmax(-1)[:-1]
            assert answer.score == pytest.approx(float(probabilities.max()), abs=1e-6)
            assert answer.label == SMALL["classes"][int(probabilities.argmax())]


def test_a_mask_moves_into_original_pixels_as_edges_do(source, samples, run):
    """Bilinear in edge coordinates, one pixel of one frame at a time, float64."""
    batch, outputs = run
    answer = source.predictions(outputs, batch)[0][0]
    logits = outputs.masks[0, answer.object].double().numpy()
    (_, height, width), random = answer.mask.shape, np.random.default_rng(2)
    compared = 0
    for frame, y, x in random.integers(0, (3, height, width), (60, 3)):
        value = _bilinear(logits[frame], (y + 0.5) / height * 12 - 0.5, (x + 0.5) / width * 12 - 0.5)
        if abs(value) > 1e-3:
            assert answer.mask[frame, y, x] == (value > 0)
            compared += 1
    assert compared > 40


def _bilinear(grid, y, x):
    y, x = np.clip(y, 0, grid.shape[0] - 1), np.clip(x, 0, grid.shape[1] - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
    upper = grid[top, left] * (1 - (x - left)) + grid[top, right] * (x - left)
    lower = grid[bottom, left] * (1 - (x - left)) + grid[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def test_flow_runs_in_the_order_of_the_forward(source, run):
    batch, outputs = run
    traced = trace(source, batch)
    order = [(step.call.site, step.call.layer) for step in source.flow(batch, outputs)]
    assert order == [(ENCODER, 0), (ENCODER, 1), (CROSS, 0), (OWN, 0), (CROSS, 1), (OWN, 1)]
    assert {(key.site, key.layer) for key in traced.records} == set(order)


def test_one_frame_and_a_picture(source):
    batch = source.encode([Sample("one", np.zeros((1, 8, 8, 3), np.uint8))])
    assert batch.per_sample["frame_index"].tolist() == [[0, 0, 0]]
    with pytest.raises(SampleError, match=r"'flat'.*clip"):
        source.encode([Sample("flat", np.zeros((8, 8, 3), np.uint8))])
    with pytest.raises(SampleError, match="none"):
        source.encode([Sample("none", np.zeros((0, 8, 8, 3), np.uint8))])


# ------------------------------------------------------------------------------------------- opening


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    network = Swimmer(SwimmerConfig.from_dict(SMALL))
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_dict()))
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_folder_of_its_own_opens(folder, samples):
    one = open_source(folder)
    state = load_file(folder / "model.safetensors")
    for name, value in one.module.state_dict().items():
        assert torch.equal(value, state[name])
    assert len(one.card.weights_sha256) == 64
    assert not one.module.training
    file = open_source(folder, weights=folder / "model.safetensors")
    assert file.card.weights_sha256 == one.card.weights_sha256


def test_weights_that_do_not_fit_are_refused(folder):
    state = load_file(folder / "model.safetensors")
    broken = {
        "missing": {k: v for k, v in state.items() if k != "space"},
        "shape": {**state, "space": state["space"][:, :, :-1].contiguous()},
        "finite": {**state, "space": state["space"] * torch.inf},
    }
    words = {"missing": "missing", "shape": "shape", "finite": "infinite"}
    for name, tensors in broken.items():
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ModelError, match=words[name]):
            open_source(folder)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="safetensors"):
        open_source(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="one file of weights"):
        open_source(folder)


def test_options_out_of_range_are_refused(folder):
    with pytest.raises(UsageError, match="probability"):
        open_source(folder, threshold=1.5)
    with pytest.raises(UsageError, match="option"):
        open_source(folder, colour="red")
    with pytest.raises(ModelError, match="configuration"):
        open_source("swimmer", weights="random", config={"classes": ["a"], "depth": 3})
    with pytest.raises(ModelError, match="multiple of 6"):
        open_source("swimmer", weights="random", config={**SMALL, "size": 20})
    with pytest.raises(ModelError, match="config"):
        open_source("swimmer", weights="random")


def test_random_weights_follow_their_seed():
    one, same, other = (open_source("swimmer", weights="random", config=SMALL, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.module.query, same.module.query)
    assert not torch.equal(one.module.query, other.module.query)
    assert "random" in one.card.notes[0]


# ------------------------------------------------------------------------------------------- targets


def test_targets_are_bound_to_their_query(source, run):
    batch, outputs = run
    bound = source.bind(outputs, batch, Target("class", label="b", object=2))
    assert [(r.sample, r.object, r.class_index) for r in bound.rows] == [(0, 2, 1), (1, 2, 1), (2, 2, 1)]
    expected = outputs.logits[:, 2].double().softmax(-1)[:, 1]
    torch.testing.assert_close(source.score(outputs, batch, bound).double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(source.score(outputs, batch, bound.at("logit")), outputs.logits[:, 2, 1])
    readout = source.readout(batch, outputs, bound)
    assert list(readout) == [CROSS]
    assert readout[CROSS].weights.argmax(-1).tolist() == [2, 2, 2]


def test_a_mask_target_is_the_mean_logit_on_the_frozen_mask(source, run):
    batch, outputs = run
    bound = source.bind(outputs, batch, Target("mask"))
    assert len(bound) > 2
    found = source.score(outputs, batch, bound)
    for i, row in enumerate(bound.rows):
        own = outputs.masks[row.sample, row.object].double().numpy()
        assert float(found[i]) == pytest.approx(own[own > 0].mean(), rel=1e-5)


def slow_match(outputs, row, frozen):
    """The query of largest best-frame IoU x probability among those where that IoU is 1/2 or more, or None."""
    best = None
    for query in range(outputs.logits.shape[1]):
        mask = outputs.masks[row.sample, query].detach().numpy() > 0
        iou = max((m & f).sum() / max((m | f).sum(), 1) for m, f in zip(mask, frozen, strict=True))
        p = float(outputs.logits[row.sample, query].double().softmax(-1)[row.class_index])
        if iou >= 0.5 and (best is None or iou * p > best[1]):
            best = (query, iou * p)
    return None if best is None else best[0]


def permuted(outputs, order):
    return replace(outputs, logits=outputs.logits[:, order], masks=outputs.masks[:, order])


def test_match_follows_the_shape_to_another_query(source, run):
    batch, outputs = run
    bound = source.bind(outputs, batch, Target("class@match"))
    moved = permuted(outputs, [2, 0, 1])
    found, plain = source.identities(moved, bound), source.score(outputs, batch, bound)
    for i, row in enumerate(bound.rows):
        query = slow_match(moved, row, bound.context["mask"][i].numpy())
        assert bool(found.seen[i]) == (query is not None)
        assert int(found.query[i]) == query
    torch.testing.assert_close(source.score(moved, batch, bound), plain)
    held = source.bind(outputs, batch, Target("class"))
    assert not torch.allclose(source.score(moved, batch, held), source.score(outputs, batch, held))


def test_a_lost_shape_scores_nothing(source, run):
    batch, outputs = run
    bound = source.bind(outputs, batch, Target("class@match", object=0))
    gone = replace(outputs, masks=torch.full_like(outputs.masks, -1.0))
    assert not source.identities(gone, bound).seen.any()
    assert source.score(gone, batch, bound).tolist() == [0.0] * len(bound)
    classes = [row.class_index for row in bound.rows]
    floor = outputs.logits[torch.arange(len(bound)), :, classes].amin(-1)
    torch.testing.assert_close(source.score(gone, batch, bound.at("logit")), floor)


@pytest.mark.parametrize("kind", ["class", "mask", "class@match"])
def test_scores_have_gradients_to_the_pixels(source, samples, kind):
    batch = source.encode(samples[:1])
    inputs = batch.inputs.clone().requires_grad_(True)
    again = batch.replace(inputs, [0])
    outputs = source.forward(again, grad=True)
    bound = source.bind(outputs, again, Target(kind))
    (gradient,) = torch.autograd.grad(source.score(outputs, again, bound)[0], inputs)
    direction = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(0))
    step = 1e-2 * direction / direction.norm()
    plus, minus = (
        source.score(source.forward(batch.replace(batch.inputs + sign * step, [0])), batch, bound)[0]
        for sign in (1, -1)
    )
    slope = float((gradient * step).sum()) * 2
    assert float(plus - minus) == pytest.approx(slope, rel=0.05, abs=2e-5)
    assert float(gradient.abs().max()) > 0


def test_unknown_targets_are_refused(source, run):
    batch, outputs = run
    for target in (Target("box"), Target("class", label="whale"), Target("class", object=9)):
        with pytest.raises(UsageError):
            source.bind(outputs, batch, target)


def test_without_sure_tracks_there_are_no_rows(source, samples):
    batch = source.encode(samples)
    outputs = source.forward(batch)
    unsure = replace(
        outputs, logits=torch.cat([outputs.logits[..., :-1] * 0, outputs.logits[..., -1:] * 0 + 9], -1)
    )
    strict = open_source("swimmer", weights="random", config=SMALL, seed=3)
    assert strict.predictions(unsure, batch) == [[], [], []]
    bound = strict.bind(unsure, batch, Target())
    assert len(bound) == 0
    assert strict.score(unsure, batch, bound).shape == (0,)
