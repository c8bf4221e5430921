"""DVIS-DAQ as a source: conformance, flow against explicit loops, blocks, held decisions, odd clips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from daq_models import tiny
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.capture.gradient_maps import grad_attention
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import CaptureError, ModelError, SampleError, UsageError
from foveate.interfaces import CallKey, CapturePlan, ModelCard, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate.testing.conformance import SourceConformance
from foveate_dvis.daq_opening import OpenedDaq
from foveate_dvis.daq_sites import FRAME_CROSS, INSTANCE, POOL, ROW_CROSS, ROW_SELF, SLOT_ASSIGN, SLOT_CROSS, TIME
from foveate_dvis.daq_source import DaqSource


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(
    mode: str = "online", *, seed: int = 0, local: bool = False, edge: int = 0, canvas: Any = None, **rules: Any
) -> DaqSource:
    """A tiny model whose attention is sharp and whose tracks come and go."""
    model = tiny(mode, seed=seed, local=local, **rules)
    return DaqSource(OpenedDaq(model, ModelCard("tiny-daq", "tiny", "tests")), shortest_edge=edge, canvas=canvas)


def clips(count: int = 1, *, frames: int = 6, height: int = 32, width: int = 64, seed: int = 0) -> list[Sample]:
    """Noise with a bright rectangle that swims to the right."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        pixels = random.integers(60, 160, (frames, height, width, 3)).astype(np.uint8)
        for t in range(frames):
            x = (4 + 5 * t + 9 * number) % (width - 16)
            pixels[t, 4:20, x : x + 16] = (240, 60, 200)
        made.append(Sample(f"clip-{number}", pixels))
    return made


def everything(opened: DaqSource) -> CapturePlan:
    reductions = ("entropy", "received", "head_mean", "topk")
    return CapturePlan(tuple(SitePlan(s.id, rows="all", reductions=reductions) for s in opened.sites), "float32")


# ------------------------------------------------------------------------------- conformance


def battery(mode: str) -> type[SourceConformance]:
    class Battery(SourceConformance):
        def open(self) -> Any:
            return source(mode, edge=64, canvas=(96, 96))

    Battery.__name__ = Battery.__qualname__ = f"TestConformance{mode.title()}"
    return Battery


TestConformanceOnline, TestConformanceOffline = battery("online"), battery("offline")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_everything_is_proved(mode):
    opened = source(mode)
    batch = opened.encode(clips(2))
    proof = certify(opened, batch)
    assert not proof.failures
    assert not proof.certificate.unverified
    assert proof.identical


def test_random_weights_open_by_name():
    config = tiny("offline").config
    opened = open_source("dvis-daq", weights="random", config=config, seed=3, shortest_edge=0)
    again = open_source("dvis-daq", weights="random", config=config.to_json(), seed=3, shortest_edge=0)
    batch = opened.encode(clips())
    answers = [one.forward(batch).clips[0].final_logits for one in (opened, again)]
    assert torch.equal(*answers)
    assert opened.card.weights_sha256 == "random:DVIS-DAQ:3"
    assert "random weights" in opened.card.notes[0]
    assert opened.facts()["mode"] == "offline"


# ------------------------------------------------------------------------------- labels


def test_tracks_keep_their_position_and_births_begin_at_an_anchor():
    opened = source()
    batch = opened.encode(clips())
    t = trace(opened, batch)
    (clip,) = t.outputs.clips
    born = [(frame, row, track) for frame, rows in enumerate(clip.rows) for row, track in rows.births]
    assert len(born) > 2
    queries = opened.config.num_queries
    for frame, row, track in born:
        labels = t.labels(CallKey(ROW_CROSS, 0, frame))
        assert labels.query_place.index[row] == clip.rows[frame].anchors[row] < queries
        if frame + 1 < len(clip.rows) and track in clip.rows[frame + 1].ids:
            later = t.labels(CallKey(ROW_CROSS, 0, frame + 1))
            at = clip.rows[frame + 1].ids.index(track)
            assert later.query_place.index[at] == queries + track
            assert later.query.label[at] == str(track)
            assert later.query.kind[at] == later.query.kind[0]
    assert labels.key_place is None
    assert set(labels.at) == {"sample", "frame"}


def test_a_batch_of_clips_of_different_lengths_equals_its_singles():
    opened = source("offline")
    first, second = clips(2)
    second = replace(second, pixels=second.pixels[:4])
    both = opened.encode([first, second])
    assert both.per_sample["frame_index"][1].tolist() == [0, 1, 2, 3, -1, -1]
    together = capture_batch(opened, both, everything(opened))
    for i, sample in enumerate((first, second)):
        batch = opened.encode([sample])
        alone = capture_batch(opened, batch, everything(opened))
        ours, theirs = together.outputs.clips[i], alone.outputs.clips[0]
        assert torch.allclose(ours.final_logits, theirs.final_logits, atol=1e-5)
        for site in alone.sites:
            for name, array in alone.sites[site].arrays.items():
                part = together.sites[site].arrays[name][i : i + 1][tuple(map(slice, array.shape))]
                assert np.allclose(part, array, atol=2e-5, equal_nan=True), (site, name)
    lacking = together.sites["segmenter.self"].arrays["attention"][1, 4:]
    assert np.isnan(lacking).all()
    assert not together.sites[ROW_CROSS].arrays["attention"][1, 4:].any()


# ------------------------------------------------------------------------------- flow


def half(values: np.ndarray, matrix: np.ndarray, read: np.ndarray) -> np.ndarray:
    return 0.5 * values + 0.5 * matrix @ read


class Explicit:
    """Rollout of one clip by loops over frames and layers, from captured arrays (means over heads), float64."""

    def __init__(self, opened: DaqSource, batch: Any) -> None:
        found = capture_batch(opened, batch, everything(opened))
        self.maps = {k: v.arrays["head_mean"][0].astype(np.float64) for k, v in found.sites.items()}
        self.opened, (self.clip,) = opened, found.outputs.clips
        self.frames = len(self.clip.rows)
        height, width = batch.inputs.shape[-2:]
        self.counts = [(height // s) * (width // s) for s in (32, 16, 8)]
        self.cells = sum(self.counts)

    def queries(self, frame: int) -> np.ndarray:
        """The segmenter's queries of one frame over the cells of the whole clip."""
        pixels = np.zeros((self.cells, self.frames * self.cells))
        pixels[:, frame * self.cells : (frame + 1) * self.cells] = np.eye(self.cells)
        for layer in range(self.opened.config.encoder_layers):
            pixels = half(pixels, self.maps["pixel_decoder.self"][frame, layer], pixels)
        found = np.zeros((self.opened.config.num_queries, pixels.shape[1]))
        starts = np.cumsum([0, *self.counts])
        for layer in range(self.opened.config.decoder_layers):
            level = layer % 3
            cells = pixels[starts[level] : starts[level + 1]]
            found = half(found, self.maps[f"segmenter.cross.p{level}"][frame, layer // 3], cells)
            found = half(found, self.maps["segmenter.self"][frame, layer], found)
        return found

    def tracks(self) -> dict[tuple[int, int], np.ndarray]:
        """(track, frame) -> its row after the tracker."""
        queries, found, before = self.opened.config.num_queries, {}, {}
        for frame, rows in enumerate(self.clip.rows):
            own = self.queries(frame)
            at = [a if i < 0 else queries + i for i, a in zip(rows.ids, rows.anchors, strict=True)]
            x = np.zeros((len(at), own.shape[1])) if frame else own.copy()
            for row, track in enumerate(rows.ids):
                if track >= 0:
                    x[row] = before[track]
            for layer in range(self.opened.config.tracker.layers):
                x = half(x, self.maps[ROW_CROSS][frame, layer][at], own)
                x = half(x, self.maps[ROW_SELF][frame, layer][np.ix_(at, at)], x)
            before = {track: x[row] for row, track in enumerate(rows.born) if track >= 0}
            alive = {track: x for track, x in before.items() if track not in rows.deaths}
            found |= {(track, frame): x for track, x in alive.items()}
        return found

    def online(self, track: int) -> np.ndarray:
        return np.mean([x for (number, _), x in self.tracks().items() if number == track], axis=0)

    def offline(self, instance: int) -> np.ndarray:
        """The pooling row of one instance."""
        refined, tracks = self.clip.refined, self.tracks()
        queries = [self.queries(frame) for frame in range(self.frames)]
        x = np.zeros((len(refined.ids), self.frames, self.frames * self.cells))
        for i, (number, linked) in enumerate(zip(refined.ids, refined.linked, strict=True)):
            for frame in range(self.frames):
                if linked:
                    x[i, frame] = queries[frame][int(refined.chains[frame, number])]
                elif (number, frame) in tracks:
                    x[i, frame] = tracks[number, frame]
        for layer in range(self.opened.config.refiner.layers):
            for i in range(len(x)):
                x[i] = half(x[i], self.maps[TIME][i, layer], x[i])
            for frame in range(self.frames):
                x[:, frame] = half(x[:, frame], self.maps[INSTANCE][frame, layer], x[:, frame])
                x[:, frame] = half(x[:, frame], self.maps[FRAME_CROSS][frame, layer], queries[frame])
        return self.maps[POOL][instance, 0, 0] @ x[instance]


@pytest.mark.parametrize("seed", [0, 1])
def test_rollout_online_equals_explicit_loops(seed):
    opened = source(seed=seed)
    batch = opened.encode(clips(seed=seed))
    t = trace(opened, batch)
    bound = replace_all(opened.bind(t.outputs, batch, Target()), opened, t, batch)
    found, oracle = rollout(t, bound), Explicit(opened, batch)
    assert len(bound) > 1
    for row, values in zip(bound.rows, found, strict=True):
        expected = oracle.online(t.outputs.clips[0].ids[row.object])
        assert np.allclose(values.numpy(), expected, atol=1e-6)
        assert expected.sum() > 0.1


def replace_all(bound, opened, t, batch):
    """A row for every instance, whatever its score."""
    count = len(t.outputs.clips[0].final_logits)
    rows = [opened.bind(t.outputs, batch, Target(object=i)) for i in range(count)]
    context = {name: torch.cat([one.context[name] for one in rows]) for name in rows[0].context}
    return replace(bound, rows=tuple(row for one in rows for row in one.rows), context=context)


@pytest.mark.parametrize("seed", [0, 1])
def test_rollout_offline_equals_explicit_loops(seed):
    opened = source("offline", seed=seed)
    batch = opened.encode(clips(seed=seed))
    t = trace(opened, batch)
    bound = replace_all(opened.bind(t.outputs, batch, Target()), opened, t, batch)
    found, oracle = rollout(t, bound), Explicit(opened, batch)
    assert {True, False} >= set(t.outputs.clips[0].refined.linked)
    for row, values in zip(bound.rows, found, strict=True):
        assert np.allclose(values.numpy(), oracle.offline(row.object), atol=1e-6)


def test_rollout_of_two_clips_equals_each():
    opened = source()
    samples = clips(2)
    together = rollout(trace(opened, opened.encode(samples)))
    for i, sample in enumerate(samples):
        assert torch.allclose(together[i], rollout(trace(opened, opened.encode([sample])))[0], atol=1e-6)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_rollout_map_lies_on_the_cells_of_every_frame(mode):
    from foveate.attribution.attention import Rollout

    opened = source(mode)
    batch = opened.encode(clips())
    outputs = opened.forward(batch)
    bound = opened.bind(outputs, batch, Target())
    made = Rollout().attribute(opened, opened.hold(batch, outputs), bound)
    values = rollout(trace(opened, batch), bound)
    assert made.values.shape == (len(bound), 6, 4, 8)
    levels = values.reshape(len(bound), 6, -1)
    finest = levels[..., 2 + 8 :].reshape(len(bound), 6, 4, 8).numpy()
    coarse = np.repeat(np.repeat(levels[..., :2].reshape(-1, 6, 1, 2).numpy(), 4, 2), 4, 3) / 16
    middle = np.repeat(np.repeat(levels[..., 2:10].reshape(-1, 6, 2, 4).numpy(), 2, 2), 2, 3) / 4
    assert np.allclose(made.values, finest + middle + coarse, atol=1e-6)


def test_rollout_stops_at_the_temporal_convolution():
    opened = source("offline", local=True)
    t = trace(opened, opened.encode(clips()))
    with pytest.raises(CaptureError, match="temporal convolution"):
        rollout(t)


def test_relevance_is_refused_with_the_reason():
    opened = source()
    t = trace(opened, opened.encode(clips()), grad=True)
    bound = opened.bind(t.outputs, t.batch, Target())
    with pytest.raises(CaptureError, match=r"first frame.s queries|carried into frame"):
        relevance(t, bound)
    with pytest.raises(CaptureError, match="does not read from"):
        grad_attention(t, bound)


# ------------------------------------------------------------------------------- blocks of frames


def test_blocks_answer_as_the_whole_clip():
    opened = source()
    (sample,) = clips(frames=7)
    whole = capture_batch(opened, opened.encode([sample]), everything(opened))
    state, parts = {}, []
    for start in range(0, 7, 4):
        block = opened.encode([replace(sample, pixels=sample.pixels[start : start + 4])])
        block = replace(block, shared={"state": state})
        parts.append(capture_batch(opened, block, everything(opened)))
        state = opened.carry(parts[-1].outputs)
        assert not any(t.requires_grad for t in _tensors(state))
    for site, captured in whole.sites.items():
        for name, array in captured.arrays.items():
            start = 0
            for part in parts:
                found = part.sites[site].arrays[name]
                expected = array[:, start : start + found.shape[1]]
                expected = expected[tuple(map(slice, found.shape))]
                assert np.allclose(found, expected, atol=1e-6, equal_nan=True), (site, name)
                start += found.shape[1]
            assert start == 7
    last = parts[-1].outputs.clips[0]
    assert last.ids == whole.outputs.clips[0].ids
    assert torch.allclose(last.pred_logits, whole.outputs.clips[0].pred_logits, atol=1e-5)
    assert not source("offline").carries


def _tensors(state):
    from foveate.capture.certify import tensors

    return list(tensors(state))


# ------------------------------------------------------------------------------- targets


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_scores_are_the_models_own_answers(mode):
    opened = source(mode)
    batch = opened.encode(clips(2))
    outputs = opened.forward(batch)
    answers = opened.predictions(outputs, batch)
    for kind, scale in (("class", "probability"), ("class", "logit"), ("mask", "value")):
        bound = opened.bind(outputs, batch, Target(kind, scale=scale))
        scores = opened.score(outputs, batch, bound)
        for row, score in zip(bound.rows, scores, strict=True):
            clip = outputs.clips[row.sample]
            if kind == "mask":
                masks = clip.final_masks[row.object].double()
                expected = masks[masks > 0].mean()
            else:
                logits = clip.final_logits[row.object].double()
                expected = logits[row.class_index] if scale == "logit" else logits.softmax(-1)[row.class_index]
            assert abs(float(score) - float(expected)) < 1e-5
    bound = opened.bind(outputs, batch, Target())
    for sample in range(2):
        (best, *_) = (row for row in bound.rows if row.sample == sample)
        assert (best.object, best.class_index) == (answers[sample][0].object, answers[sample][0].class_index)
        assert answers[sample][0].track == outputs.clips[sample].final_names[best.object]
        assert answers[sample][0].mask.shape == (6, 32, 64)


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("kind", ["class", "mask"])
def test_gradients_reach_the_pixels(mode, kind):
    """Against the difference quotient of the held model in float64."""
    opened = source(mode)
    opened.module.double()
    batch = opened.encode(clips())
    # Flat colours tie in the backbone's max pooling, where no derivative exists.
    noise = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = replace(batch, inputs=batch.inputs + 0.05 * noise)
    intact = opened.forward(batch)
    bound = opened.bind(intact, batch, Target(kind))
    batch = opened.hold(batch, intact)
    inputs = batch.inputs.clone().requires_grad_()
    moved = replace(batch, inputs=inputs)
    score = _double(opened, opened.forward(moved, grad=True), bound)
    (gradient,) = torch.autograd.grad(score, inputs)
    direction = gradient / gradient.norm()
    step = 1e-6
    values = [
        float(_double(opened, opened.forward(replace(batch, inputs=batch.inputs + s * direction)), bound))
        for s in (step, -step)
    ]
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope - float(gradient.norm())) < 1e-3 * float(gradient.norm())
    assert all(float(part.abs().max()) > 0 for part in gradient[0]), "a frame has no gradient"


def _double(opened, outputs, bound):
    clip, row = outputs.clips[0], bound.rows[0]
    if row.kind == "mask":
        mask = bound.context["mask"][0]
        return clip.final_masks[row.object][mask].mean()
    return clip.final_logits[row.object].softmax(-1)[row.class_index]


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_held_decisions_keep_identities_in_another_picture(mode):
    opened = source(mode)
    batch = opened.encode(clips())
    intact = opened.forward(batch)
    bound = opened.bind(intact, batch, Target())
    noise = torch.randn(batch.inputs.shape, generator=torch.Generator().manual_seed(1))
    changed = replace(batch, inputs=batch.inputs + 2 * noise)
    free, held = opened.forward(changed), opened.forward(opened.hold(changed, intact))
    assert free.decisions(0) != intact.decisions(0), "the change must matter"
    assert held.clips[0].final_names == intact.clips[0].final_names
    assert [rows.valid for rows in held.clips[0].rows] == [rows.valid for rows in intact.clips[0].rows]
    for found in opened.identities(held, bound):
        assert found.held
        assert found.kept
    expected = held.clips[0].final_logits.softmax(-1)[bound.rows[0].object, bound.rows[0].class_index]
    assert torch.allclose(opened.score(held, changed, bound)[0], expected)
    assert opened.score(free, changed, bound).shape == (len(bound),)
    assert not any(found.held for found in opened.identities(free, bound))


def test_a_lost_identity_scores_zero_and_is_reported():
    opened = source()
    batch = opened.encode(clips())
    outputs = opened.forward(batch)
    bound = opened.bind(outputs, batch, Target())
    other = replace(bound, context={**bound.context, "decisions": bound.context["decisions"] + 1})
    clip = outputs.clips[0]
    table, masks = clip.final_logits.softmax(-1), clip.final_masks.numpy() > 0
    for row, frozen, found in zip(
        bound.rows, bound.context["mask"], opened.score(outputs, batch, other), strict=True
    ):
        overlap = [(m & frozen.numpy()).sum() / max((m | frozen.numpy()).sum(), 1) for m in masks]
        near = [(i, iou) for i, iou in enumerate(overlap) if iou >= 0.5]
        best = max(near, key=lambda pair: pair[1] * float(table[pair[0], row.class_index]))[0]
        assert torch.equal(found, table[best, row.class_index])
    nowhere = torch.zeros_like(bound.context["mask"])
    lost = replace(bound, context={"mask": nowhere, "decisions": other.context["decisions"]})
    assert not opened.score(outputs, batch, lost).any()
    assert [found.kept for found in opened.identities(outputs, lost)] == [False] * len(bound)
    least = opened.score(outputs, batch, lost.at("logit"))
    logits = clip.final_logits
    assert torch.allclose(least, torch.stack([logits[:, row.class_index].min() for row in bound.rows]))
    mask = opened.bind(outputs, batch, Target("mask"))
    gone = replace(mask, context={"mask": nowhere[: len(mask)], "decisions": mask.context["decisions"] + 1})
    assert opened.score(outputs, batch, gone).isnan().all()


def test_targets_that_do_not_exist_are_refused():
    opened = source()
    batch = opened.encode(clips())
    outputs = opened.forward(batch)
    for target, message in (
        (Target(object=99), "no instance 99"),
        (Target(label="whale"), "whale"),
        (Target("box"), "no target kind"),
    ):
        with pytest.raises(UsageError, match=message):
            opened.bind(outputs, batch, target)
    with pytest.raises(UsageError, match="has no 'value'"):
        opened.score(outputs, batch, opened.bind(outputs, batch, Target(scale="value")))


# ------------------------------------------------------------------------------- odd clips


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_one_frame_has_no_gate(mode):
    opened = source(mode)
    batch = opened.encode(clips(frames=1))
    found = capture_batch(opened, batch, everything(opened))
    assert SLOT_CROSS not in found.sites
    assert SLOT_ASSIGN not in found.sites
    assert found.sites[ROW_CROSS].arrays["attention"].shape[1] == 1
    assert opened.predictions(found.outputs, batch)[0]


def test_a_clip_without_tracks_has_no_rows_and_is_captured():
    opened = source(first_threshold=1.0, select_threshold=1.0)
    batch = opened.encode(clips())
    found = capture_batch(opened, batch, CapturePlan(tuple(SitePlan(site.id) for site in opened.sites)))
    assert opened.predictions(found.outputs, batch) == [[]]
    bound = opened.bind(found.outputs, batch, Target())
    assert len(bound) == 0
    assert opened.score(found.outputs, batch, bound).shape == (0,)
    row = found.sites[ROW_CROSS].arrays
    assert not row["attention"].any()
    assert not row["allowed"].any()


def test_clips_that_cannot_be_read_are_refused():
    opened = source()
    small, large = clips()[0], clips(height=64)[0]
    with pytest.raises(SampleError, match="2 sizes in one batch"):
        opened.encode([small, replace(large, id="large")])
    with pytest.raises(SampleError, match=r"'clip-0'.*expected a clip"):
        opened.encode([replace(small, pixels=small.pixels[0])])
    with pytest.raises(SampleError, match="no frame"):
        opened.encode([replace(small, pixels=small.pixels[:0])])
    with pytest.raises(SampleError, match="the canvas is"):
        source(canvas=(32, 32)).encode([small])


def test_frames_are_resized_normalised_and_padded_as_published():
    opened = source()
    opened.recipe = type(opened.recipe).of(opened.config, shortest_edge=48)
    pixels = np.full((2, 60, 100, 3), (255, 0, 127), np.uint8)
    batch = opened.encode([Sample("a", pixels)])
    assert batch.inputs.shape == (1, 2, 3, 64, 96)
    mean, std = np.array(opened.config.pixel_mean), np.array(opened.config.pixel_std)
    assert np.allclose(batch.inputs[0, 0, :, 20, 20].numpy(), (np.array([255, 0, 127]) - mean) / std, atol=1e-5)
    assert not batch.inputs[..., 48:, :].any()
    assert not batch.inputs[..., 80:].any()
    geometry = batch.geometry[0]
    assert (geometry.scale_y, geometry.scale_x) == (0.8, 0.8)
    assert opened.cells(batch).shape == (8, 12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": None}, "publish weights of DVIS-DAQ as files"),
        ({"weights": "random", "mode": "sideways"}, "mode 'sideways'"),
        ({"weights": "random", "rule": "coco"}, "rule 'coco'"),
        ({"weights": "random", "canvas": (0, 4)}, "canvas"),
        ({"weights": "random", "threshold": 2}, "no probability"),
    ],
)
def test_wrong_options_are_named(options, message):
    weights = options.pop("weights")
    with pytest.raises((ModelError, UsageError), match=message):
        open_source("dvis-daq", weights=weights, config=tiny().config, **options)
