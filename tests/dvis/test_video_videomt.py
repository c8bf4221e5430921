"""VidEoMT: tracks by query, attention frame by frame, and how the queries carry frames forward."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.attribution.attention import CheferICCV21, LeGrad, ReadoutAttention, Rollout
from foveate.capture.engine import capture_batch
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Batch, CallKey, CapturePlan, Sample, SitePlan, Target
from foveate.testing.conformance import SourceConformance
from foveate.testing.state import same, tensors_of
from video_models import clips, open_videomt

FRAMES, QUERIES, TOKENS, EARLY = 3, 5, 19, 2


class TestKit(SourceConformance):
    target = Target(object=2, scale="logit")

    def open(self) -> Any:
        return open_videomt()


class TestKitOfMasks(SourceConformance):
    target = Target("mask", object=1)

    def open(self) -> Any:
        return open_videomt(frames=FRAMES)

    def samples(self) -> list[Sample]:
        return clips()


def encoded(count: int = 2, **options: Any) -> tuple[Any, Batch]:
    source = open_videomt(**{"frames": FRAMES, **options})
    return source, source.encode(clips(count))


class Eager:
    """A float64 copy with transformers' own eager attention; its weights by layer and call."""

    def __init__(self, source: Any) -> None:
        self.model = copy.deepcopy(source.module).double()
        self.model.set_attn_implementation("eager")
        self.weights: dict[tuple[int, int], Tensor] = {}
        for layer, block in enumerate(self.model.layers):
            block.attention.register_forward_hook(lambda m, i, out, layer=layer: self._take(layer, out[1]))

    def _take(self, layer: int, weights: Tensor) -> None:
        if weights.requires_grad:
            weights.retain_grad()
        self.weights[layer, sum(known == layer for known, _ in self.weights)] = weights

    def __call__(self, batch: Batch, *, grad: bool = False) -> Any:
        self.weights.clear()
        return self.model(pixel_values_videos=batch.inputs.detach().double().requires_grad_(grad))


def test_capture_equals_the_models_own_eager_weights() -> None:
    source, batch = encoded()
    own = Eager(source)
    own(batch)
    traced = trace(source, batch)
    traced.certify().require()
    assert len(traced.records) == len(own.weights) == EARLY + 2 * FRAMES
    for call, record in traced.records.items():
        rows = record.rows(list(range(record.shape.queries)))
        weights = own.weights[call.layer, call.number]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1).mean()
        assert entropy < 0.8 * np.log(record.shape.keys), "uniform attention proves nothing"
        torch.testing.assert_close(rows.double(), weights, atol=1e-5, rtol=0)


def test_arrays_are_by_frame_and_outputs_the_models_own_to_the_bit() -> None:
    source, batch = encoded()
    with torch.no_grad():
        plain = source.module(pixel_values_videos=batch.inputs)
    plan = CapturePlan((SitePlan("encoder.self", rows="all"), SitePlan("decoder.self", rows="all")))
    captured = capture_batch(source, batch, plan)
    assert same(tensors_of(plain), tensors_of(captured.outputs))
    own = Eager(source)
    own(batch)
    early, late = (captured.sites[site].arrays["attention"] for site in ("encoder.self", "decoder.self"))
    assert early.shape == (2, FRAMES, 2, 3, TOKENS, TOKENS)
    assert late.shape == (2, FRAMES, 2, 3, QUERIES + TOKENS, QUERIES + TOKENS)
    for frame in range(FRAMES):
        for layer in range(2):
            mine = own.weights[EARLY + layer, frame].detach().numpy()
            np.testing.assert_allclose(late[:, frame, layer], mine, atol=1e-5)
            alone = own.weights[layer, 0].unflatten(0, (2, FRAMES))[:, frame].detach().numpy()
            np.testing.assert_allclose(early[:, frame, layer], alone, atol=1e-5)
    axis = captured.sites["decoder.self"].query
    assert axis.label is not None
    assert axis.label[:QUERIES] == ("0", "1", "2", "3", "4")
    assert axis.where("track").tolist() == list(range(QUERIES))
    assert axis.where("patch").tolist() == list(range(QUERIES + 3, QUERIES + TOKENS))


def test_the_readout_is_the_surest_tracks_row_of_every_frame() -> None:
    source, batch = encoded()
    kept = capture_batch(source, batch, CapturePlan((SitePlan("decoder.self"),), dtype="float32")).sites[
        "decoder.self"
    ]
    own = Eager(source)
    outputs = own(batch)
    logits = outputs.class_queries_logits.unflatten(0, (FRAMES, 2)).mean(0)
    surest = logits.softmax(-1)[..., :-1].amax(-1).argmax(-1).tolist()
    assert kept.rule == "track"
    for sample, query in enumerate(surest):
        for frame in range(FRAMES):
            wanted = own.weights[EARLY + 1, frame][sample, :, query].detach().numpy()
            np.testing.assert_allclose(kept.arrays["attention"][sample, frame, 1, :, 0], wanted, atol=1e-5)


def test_a_batch_captures_as_its_clips_do_alone() -> None:
    source, batch = encoded(3)
    plan = CapturePlan((SitePlan("encoder.self"), SitePlan("decoder.self")), dtype="float32")
    together = capture_batch(source, batch, plan)
    for i in range(len(batch)):
        alone = capture_batch(source, batch.replace(batch.inputs[[i]], [i]), plan)
        for site, kept in alone.sites.items():
            for name, array in kept.arrays.items():
                np.testing.assert_allclose(array[0], together.sites[site].arrays[name][i], atol=2e-5, err_msg=name)


# ------------------------------------------------------------------- rollout and relevance over the frames


def followed(own: Eager, sample: int, query: int, step: Any, shares: np.ndarray) -> np.ndarray:
    """The query's row over the tokens of all frames, by dense matrices frame after frame.

    ``step`` makes a layer's matrix of one call's weights; ``shares`` (frame,) says how much each frame is read.
    """
    bottom = np.zeros((FRAMES, TOKENS, FRAMES * TOKENS))
    for frame in range(FRAMES):
        product = np.eye(TOKENS)
        for layer in range(EARLY):
            product = step(own.weights[layer, 0], sample * FRAMES + frame) @ product
        bottom[frame, :, frame * TOKENS : (frame + 1) * TOKENS] = product
    queries = np.zeros((QUERIES, FRAMES * TOKENS))  # learned: nothing of the clip is in them yet
    found = np.zeros(FRAMES * TOKENS)
    for frame in range(FRAMES):
        joint = np.concatenate([queries, bottom[frame]])
        for layer in range(EARLY, EARLY + 2):
            joint = step(own.weights[layer, frame], sample) @ joint
        queries = joint[:QUERIES]
        found += shares[frame] * joint[query]
    return found


def test_rollout_goes_back_through_the_frames() -> None:
    source, batch = encoded()
    own = Eager(source)
    own(batch)
    traced = trace(source, batch)

    def step(weights: Tensor, row: int) -> np.ndarray:
        a = weights[row].mean(0).detach().numpy()
        return 0.5 * np.eye(len(a)) + 0.5 * a

    bound = source.bind(traced.outputs, batch, Target(object=3))
    found = rollout(traced, bound).double().numpy()
    for i in range(2):
        wanted = followed(own, i, 3, step, np.full(FRAMES, 1 / FRAMES))
        np.testing.assert_allclose(found[i], wanted, atol=1e-6)
        assert wanted[:TOKENS].sum() > wanted[-TOKENS:].sum(), "the first frame is in every later one"


@pytest.mark.parametrize("kind", ["class", "mask"])
def test_relevance_goes_back_through_the_frames(kind: str) -> None:
    """Chefer, Gur and Wolf 2021, eq. 5 and 6, with autograd's own gradients."""
    source, batch = encoded()
    traced = trace(source, batch, grad=True)
    bound = source.bind(traced.outputs, traced.batch, Target(kind, object=1))
    own = Eager(source)
    outputs = own(batch, grad=True)
    logits = outputs.class_queries_logits.unflatten(0, (FRAMES, 2)).mean(0)
    masks = outputs.masks_queries_logits.unflatten(0, (FRAMES, 2))[:, :, 1].transpose(0, 1)
    frozen = masks > 0
    if kind == "class":
        chosen = logits.softmax(-1)[..., :-1].argmax(-1)[:, 1]
        logits.softmax(-1)[[0, 1], 1, chosen].sum().backward()
        shares = np.full((2, FRAMES), 1 / FRAMES)
    else:
        torch.stack([masks[i][frozen[i]].mean() for i in range(2)]).sum().backward()
        area = frozen.flatten(2).sum(-1).double().numpy()
        shares = area / area.sum(1, keepdims=True)

    def step(weights: Tensor, row: int) -> np.ndarray:
        grad = torch.zeros_like(weights) if weights.grad is None else weights.grad
        a = (weights * grad).clamp_min(0)[row].mean(0).detach().numpy()
        return np.eye(len(a)) + a

    found = relevance(traced, bound).double().numpy()
    for i in range(2):
        wanted = followed(own, i, 1, step, shares[i])
        np.testing.assert_allclose(found[i], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("method", [Rollout(), CheferICCV21(), LeGrad(), ReadoutAttention()], ids=lambda m: m.name)
def test_explanations_of_a_track_lie_on_all_frames(method: Any) -> None:
    source, batch = encoded()
    bound = source.bind(source.forward(batch), batch, Target(object=2))
    found = method.attribute(source, batch, bound)
    assert found.values.shape == (2, FRAMES, 4, 4)
    assert (np.abs(found.values).sum((2, 3)) > 0).all()


# ------------------------------------------------------------------- answers


def test_a_track_depends_on_earlier_frames_and_on_no_later_one() -> None:
    source, batch = encoded(1)
    inputs = batch.inputs.detach().clone().requires_grad_()
    outputs = source.forward(replace(batch, inputs=inputs), grad=True)
    found = source.tracks(outputs, batch)
    for frame in range(FRAMES):
        (gradient,) = torch.autograd.grad(found.by_frame[0, frame, 2].sum(), inputs, retain_graph=True)
        reached = gradient[0].abs().flatten(1).amax(1) > 0
        assert reached.tolist() == [t <= frame for t in range(FRAMES)]


def bilinear(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixel centres at i + 1/2, borders repeated, a slow loop."""
    out = np.zeros(size)
    for i in range(size[0]):
        for j in range(size[1]):
            y = np.clip((i + 0.5) * plane.shape[0] / size[0] - 0.5, 0, plane.shape[0] - 1)
            x = np.clip((j + 0.5) * plane.shape[1] / size[1] - 0.5, 0, plane.shape[1] - 1)
            top, left = int(y), int(x)
            down, right = min(top + 1, plane.shape[0] - 1), min(left + 1, plane.shape[1] - 1)
            upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
            lower = plane[down, left] * (1 - (x - left)) + plane[down, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def test_tracks_are_answered_with_masks_over_the_frames_that_were_read() -> None:
    source, batch = encoded()
    outputs = source.forward(batch)
    answers = source.predictions(outputs, batch)
    logits = outputs.class_queries_logits.reshape(FRAMES, 2, QUERIES, 5).mean(0)
    masks = outputs.masks_queries_logits.reshape(FRAMES, 2, QUERIES, 8, 8)
    for i, sample in enumerate(clips(2)):
        table = logits[i].softmax(-1)[:, :-1]
        assert [a.object for a in answers[i]] == table.amax(-1).argsort(descending=True).tolist()
        for answer in answers[i]:
            query = answer.object
            assert query is not None
            assert answer.track == str(query)
            assert answer.class_index == int(table[query].argmax())
            assert answer.score == pytest.approx(float(table[query].max()))
            assert answer.mask is not None
            assert answer.mask.shape == (FRAMES, *sample.pixels.shape[1:3])
            for frame in range(FRAMES):
                wanted = bilinear(masks[frame, i, query].double().numpy(), answer.mask.shape[1:])
                clear = np.abs(wanted) > 1e-5
                np.testing.assert_array_equal(answer.mask[frame][clear], (wanted > 0)[clear])
            shown = batch.per_sample["frame_index"][i][answer.mask.any((1, 2))].tolist()
            assert (answer.extra["first_frame"], answer.extra["last_frame"]) == (shown[0], shown[-1])


def test_a_class_is_the_mean_over_frames_and_a_mask_its_frozen_pixels() -> None:
    source, batch = encoded()
    outputs = source.forward(batch)
    logits = outputs.class_queries_logits.reshape(FRAMES, 2, QUERIES, 5).mean(0)
    masks = outputs.masks_queries_logits.reshape(FRAMES, 2, QUERIES, 8, 8)
    named = source.bind(outputs, batch, Target(label="LABEL_2", object=4, scale="logit"))
    torch.testing.assert_close(source.score(outputs, batch, named), logits[:, 4, 2])
    bound = source.bind(outputs, batch, Target("mask", object=4))
    assert bound.scale == "value"
    own = [masks[:, i, 4][masks[:, i, 4] > 0].mean() for i in range(2)]
    torch.testing.assert_close(source.score(outputs, batch, bound), torch.stack(own))
    other = source.forward(replace(batch, inputs=batch.inputs.flip(1)))
    moved = other.masks_queries_logits.reshape(FRAMES, 2, QUERIES, 8, 8)
    held = [moved[:, i, 4][masks[:, i, 4] > 0].mean() for i in range(2)]
    torch.testing.assert_close(source.score(other, batch, bound), torch.stack(held))
    everybody = source.bind(outputs, batch, Target())
    assert sorted((row.sample, row.object) for row in everybody.rows) == [
        (i, q) for i in range(2) for q in range(5)
    ]


def test_no_track_is_no_answer() -> None:
    source, batch = encoded(threshold=0.99)
    outputs = source.forward(batch)
    assert source.predictions(outputs, batch) == [[], []]
    bound = source.bind(outputs, batch, Target())
    assert len(bound) == 0
    assert source.score(outputs, batch, bound).shape == (0,)
    assert next(iter(source.readout(batch, outputs, bound).values())).weights.shape[0] == 0


def test_all_frames_are_read_and_clips_of_several_lengths_are_no_batch() -> None:
    source = open_videomt()
    long, longer = clips(2)
    assert source.encode([long]).inputs.shape[1] == 7
    with pytest.raises(SampleError, match=r"\[7, 9\]"):
        source.encode([long, longer])
    one = source.encode([replace(long, pixels=long.pixels[:1])])
    traced = trace(source, one)
    traced.certify().require()
    assert rollout(traced).shape == (1, TOKENS)


def test_a_model_whose_queries_join_at_once() -> None:
    source = open_videomt(config={"num_blocks": 4}, frames=2)
    batch = source.encode(clips(1))
    traced = trace(source, batch)
    assert [site.id for site in source.sites] == ["decoder.self"]
    assert traced.labels(CallKey("decoder.self", 0, 1)).at["frame"].index == (1,)
    found = rollout(traced)
    assert found.shape == (1, 2 * (QUERIES + TOKENS))
    torch.testing.assert_close(found.sum(-1), torch.ones(1))


def test_what_cannot_be_is_said() -> None:
    source, batch = encoded()
    outputs = source.forward(batch)
    with pytest.raises(UsageError, match="no object query 5"):
        source.bind(outputs, batch, Target(object=5))
    with pytest.raises(UsageError, match="no target kind"):
        source.bind(outputs, batch, Target("box"))
    with pytest.raises(UsageError, match="is not one of the model's answers"):
        source.bind(outputs, batch, Target(label="fish"))
    with pytest.raises(UsageError, match="not a probability"):
        open_videomt(threshold=1.5)
    with pytest.raises(UsageError, match="no multiple"):
        open_videomt(frames=0)
    bound = source.bind(outputs, batch, Target(object=1, scale="value"))
    with pytest.raises(UsageError, match="no 'value'"):
        source.score(outputs, batch, bound)
