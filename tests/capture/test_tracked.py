"""Calls that hold some frames, and tracks that come and go: arrays and sweeps against explicit loops."""

import numpy as np
import pytest
import torch

from capture.tracked import ANCHORS, FRAMES, GATE, OWN, READ, TrackedSource, tracked_samples
from foveate.capture.engine import capture_batch
from foveate.capture.gradient_maps import grad_attention, legrad
from foveate.capture.relevance import relevance
from foveate.capture.rollout import rollout
from foveate.capture.streams import stream_tokens
from foveate.capture.trace import trace
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionStep, CallKey, CapturePlan, Part, Place, SitePlan, TokenAxis

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = ("entropy", "received", "head_mean", "topk")


@pytest.fixture(scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[1, 2])
def ran(request):
    source = TrackedSource()
    batch = source.encode(tracked_samples(request.param))
    return source, batch, trace(source, batch)


def explicit(source, t, site, layer):
    """From calls to {(sample, frame): (rows (head, query, key), query positions, key positions)}, by counting."""
    frames, found = t.batch.inputs.shape[1], {}
    calls = sorted(call for call in t.records if call.site == site and call.layer == layer)
    ran = [
        (i, f) for i, run in enumerate(t.outputs) for f in range(frames) if site != GATE or max(run.rows[f]) >= 0
    ]
    for call, (sample, frame) in zip(calls, ran, strict=True):
        run = t.outputs[sample]
        rows = t.records[call].rows(slice(None))[0].double().numpy()
        index = [source.position(run, frame, row) for row in range(len(run.rows[frame]))]
        if site == GATE:
            index = [k for k in run.rows[frame] if k >= 0]
        found[sample, frame] = rows, index, index if site == OWN else range(rows.shape[-1])
    return found


@pytest.mark.parametrize("site", [READ, OWN, GATE])
def test_rows_and_reductions_lie_on_the_common_axis(ran, site):
    source, batch, t = ran
    made = capture_batch(source, batch, CapturePlan((SitePlan(site, rows="all", reductions=ALL, topk=3),))).sites[
        site
    ]
    tracks = max(run.tracks for run in t.outputs)
    size = tracks if site == GATE else ANCHORS + tracks
    keys = size if site == OWN else 4
    layers, samples = len(made.layers), len(batch)
    assert made.arrays["attention"].shape == (samples, 4, layers, 3, size, keys)
    assert len(made.token) == len(made.query) == size
    assert len(made.key) == keys
    assert made.query.label[-1] == str(tracks - 1)
    for layer in range(layers):
        found = explicit(source, t, site, layer)
        for sample in range(samples):
            for frame in range(4):
                whole, free = np.zeros((3, size, keys)), np.zeros((size, keys), bool)
                rows, query, key = found.get((sample, frame), (np.zeros((3, 0, keys)), [], range(keys)))
                whole[:, np.array(query, int)[:, None], list(key)] = rows
                free[np.ix_(query, list(key))] = True
                at = (sample, frame, layer)
                assert np.allclose(made.arrays["attention"][at], whole, atol=1e-7)
                assert np.array_equal(made.arrays["allowed"][at], free)
                assert np.allclose(made.arrays["head_mean"][at], whole.mean(0), atol=1e-7)
                _check_reductions(made, at, whole, sorted(query), sorted(key) if query else [])


def _check_reductions(made, at, whole, query, key):
    entropy, received = made.arrays["entropy"][at], made.arrays["received"][at]
    logs = np.log(np.where(whole > 0, whole, 1))
    assert np.allclose(entropy[:, query], -(whole * logs).sum(-1)[:, query], atol=1e-5)
    assert np.isnan(np.delete(entropy, query, -1)).all()
    if query:
        assert np.allclose(received[:, key], whole.sum(1)[:, key] / len(query), atol=1e-6)
    assert np.isnan(np.delete(received, key, -1)).all()
    value, index = made.arrays["topk_value"][at], made.arrays["topk_index"][at]
    for head in range(3):
        for row in range(whole.shape[1]):
            if row not in query:
                assert (index[head, row] == -1).all()
                assert np.isnan(value[head, row]).all()
                continue
            kept = min(3, len(key))
            best = np.sort(whole[head, row, key])[::-1][:kept]
            assert np.allclose(value[head, row, :kept], best, atol=1e-6)
            assert np.allclose(whole[head, row][index[head, row, :kept]], best, atol=1e-6)


def test_blocks_of_frames_join_along_frame(ran):
    source, batch, t = ran
    made = capture_batch(source, batch, CapturePlan((SitePlan(FRAMES, rows=(0, 3)),))).sites[FRAMES]
    assert made.arrays["attention"].shape == (len(batch), 4, 1, 3, 2, 4)
    assert "allowed" not in made.arrays
    for sample in range(len(batch)):
        for frame in range(4):
            rows = t.records[CallKey(FRAMES, 0, 2 * sample + frame // 2)].rows([0, 3])[frame % 2]
            assert np.array_equal(made.arrays["attention"][sample, frame, 0], rows.numpy())


def test_five_frames_leave_a_block_of_one():
    source = TrackedSource()
    batch = source.encode(tracked_samples(1, frames=5))
    made = capture_batch(source, batch, CapturePlan((SitePlan(FRAMES, rows="all"),))).sites[FRAMES]
    assert made.arrays["attention"].shape[1] == 5
    assert np.isfinite(made.arrays["attention"]).all()


def test_a_tracks_row_in_every_frame(ran):
    source, batch, t = ran
    made = capture_batch(source, batch, CapturePlan((SitePlan(READ), SitePlan(OWN, heads="mean")))).sites
    assert made[READ].query_index == (-1,)
    assert made[READ].rule == "track"
    for site, heads in ((READ, 3), (OWN, 1)):
        array, free = made[site].arrays["attention"], made[site].arrays["allowed"]
        assert array.shape[3:5] == (heads, 1)
        for sample, run in enumerate(t.outputs):
            where = dict(source.places(run, 0))
            for frame in range(4):
                if frame not in where:
                    assert not array[sample, frame].any()
                    assert not free[sample, frame].any()
                    continue
                rows, query, key = explicit(source, t, site, 1)[sample, frame]
                row = rows[:, query.index(where[frame])] / len(where)
                row = row.mean(0, keepdims=True) if heads == 1 else row
                assert np.allclose(array[sample, frame, 1, :, 0][:, list(key)], row, atol=1e-6)
                assert sorted(np.flatnonzero(free[sample, frame, 1, 0])) == sorted(key)


def test_rows_by_position_are_positions_on_the_common_axis(ran):
    source, batch, _ = ran
    every = capture_batch(source, batch, CapturePlan((SitePlan(READ, rows="all"),))).sites[READ].arrays
    some = capture_batch(source, batch, CapturePlan((SitePlan(READ, rows=(3, 0)),))).sites[READ]
    assert some.query.label == ("1", "")
    for name in ("attention", "allowed"):
        assert np.allclose(some.arrays[name], every[name][..., [3, 0], :], atol=1e-7)
    with pytest.raises(UsageError, match=r"queries 0 to 4"):
        capture_batch(source, batch, CapturePlan((SitePlan(READ, rows=(9,)),)))


def test_a_batch_equals_its_singles_as_far_as_the_axes_go():
    source = TrackedSource()
    samples = tracked_samples(2)
    plan = CapturePlan(tuple(SitePlan(site, rows="all", reductions=ALL) for site in (FRAMES, READ, OWN)))
    both = capture_batch(source, source.encode(samples), plan).sites
    alone = capture_batch(source, source.encode(samples[:1]), plan).sites
    for site in both:
        for name, array in alone[site].arrays.items():
            part = both[site].arrays[name][:1][tuple(map(slice, array.shape))]
            assert np.allclose(part, array, atol=1e-6, equal_nan=True), (site, name)


def test_a_site_that_did_not_run_is_not_captured():
    source = TrackedSource()
    batch = source.encode(tracked_samples(1, frames=1))
    made = capture_batch(source, batch, CapturePlan((SitePlan(GATE, rows="all"), SitePlan(READ, rows="all"))))
    assert list(made.sites) == [READ]
    assert made.certificate.passed


# ------------------------------------------------------------------------------------------- sweeps


def matrices(source, t, sample, weigh):
    """The flow as explicit matrices over all tokens: rows of all frames, then patches of all frames.

    ``weigh(call, rows)`` makes a step's (query, key) matrix. Returns a list of functions on a row vector.
    """
    run, frames, axis = t.outputs[sample], 4, len(source.row_axis(t.outputs))
    total = frames * axis + frames * 4
    found = []
    for step in t.flow:
        if not isinstance(step, AttentionStep):
            matrix = np.eye(total)
            merge = step.matrix[sample] if step.matrix.dim() == 3 else step.matrix
            matrix[: frames * axis, : frames * axis] = merge.numpy()
            found.append(("merge", matrix))
            continue
        number = step.call.number
        held = frames // 2 if step.call.site == FRAMES else frames
        if number // held != sample:
            continue
        matrix = np.zeros((total, total))
        own = np.zeros(total, bool)
        if step.call.site == FRAMES:
            for i, rows in enumerate(weigh(step.call)):
                start = frames * axis + (2 * (number % held) + i) * 4
                matrix[start : start + 4, start : start + 4] = rows
                own[start : start + 4] = True
        else:
            frame = number % frames
            index = [frame * axis + source.position(run, frame, row) for row in range(len(run.rows[frame]))]
            keys = (
                index if step.call.site == OWN else range(frames * axis + frame * 4, frames * axis + frame * 4 + 4)
            )
            matrix[np.ix_(index, list(keys))] = weigh(step.call)[0]
            own[index] = True
        found.append((own, matrix))
    return found


def start_row(source, t, sample, track):
    axis = len(source.row_axis(t.outputs))
    row = np.zeros(4 * axis + 16)
    places = source.places(t.outputs[sample], track)
    for frame, position in places:
        row[frame * axis + position] = 1 / len(places)
    return row


def test_rollout_equals_explicit_matrices(ran):
    source, _, t = ran
    bound = source.bind(t.outputs, t.batch, None)
    found = rollout(t, bound, residual=0.3)
    for number, target in enumerate(bound.rows):
        weigh = lambda call: t.records[call].rows(slice(None)).mean(1).double().numpy()  # noqa: E731
        row = start_row(source, t, target.sample, target.object)
        for own, matrix in reversed(matrices(source, t, target.sample, weigh)):
            row = row @ matrix if isinstance(own, str) else np.where(own, 0.3 * row, row) + 0.7 * row @ matrix
        assert np.allclose(found[number].numpy(), row[-16:], atol=1e-6)
    assert 0.1 < found.sum(-1).max() < 1.0 + 1e-5
    assert found.min() >= 0


def test_rollout_with_a_maximum_normalises_rows_that_exist(ran):
    source, _, t = ran
    found = rollout(t, residual=0.5, fuse="max")
    for sample in range(len(t.batch)):
        weigh = lambda call: t.records[call].rows(slice(None)).amax(1).double().numpy()  # noqa: E731
        row = start_row(source, t, sample, 0)
        for own, matrix in reversed(matrices(source, t, sample, weigh)):
            if isinstance(own, str):
                row = row @ matrix
                continue
            step = 0.5 * np.diag(own.astype(float)) + 0.5 * matrix
            step[own] /= step[own].sum(-1, keepdims=True)
            row = np.where(own, 0, row) + np.where(own, row, 0) @ step
        assert np.allclose(found[sample].numpy(), row[-16:], atol=1e-6)


def test_gradient_maps_equal_autograd_on_explicit_attention():
    source = TrackedSource()
    batch = source.encode(tracked_samples(2))
    t = trace(source, batch, grad=True)
    bound = source.bind(t.outputs, batch, None)
    found, columns = grad_attention(t, bound), legrad(t, bound)
    scores = source.score(t.outputs, t.batch, bound)
    frames, axis = 4, len(source.row_axis(t.outputs))
    for number, target in enumerate(bound.rows):
        row, mean = np.zeros(16), np.zeros(16)
        for frame in range(frames):
            for layer in range(2):
                call = CallKey(READ, layer, target.sample * frames + frame)
                rows, slope = _slopes(t, call, scores[number])
                patches = slice(4 * frame, 4 * frame + 4)
                # every step that reads the patches counts, over all rows of the stream
                mean[patches] += slope.clip(0).mean(0).sum(0) / (frames * axis) / 3
                if layer == 1:
                    start = start_row(source, t, target.sample, target.object)[: frames * axis].reshape(
                        frames, axis
                    )
                    run = t.outputs[target.sample]
                    index = [source.position(run, frame, i) for i in range(len(run.rows[frame]))]
                    row[patches] += start[frame, index] @ (rows * slope).clip(0).mean(0)
        for block in range(2):
            _, slope = _slopes(t, CallKey(FRAMES, 0, 2 * target.sample + block), scores[number], every=True)
            for i in range(2):
                start = 8 * block + 4 * i
                mean[start : start + 4] += slope[i].clip(0).mean(0).sum(0) / (frames * 4) / 3
        assert np.allclose(found[number].numpy(), row, atol=1e-6 + 1e-5 * abs(row).max())
        assert np.allclose(columns[number].numpy(), mean, atol=1e-7 + 1e-4 * abs(mean).max())


def _slopes(t, call, score, every=False):
    """A and dL/dA = dL/dO V^T of one call (head, query, key), by autograd at its output."""
    record = t.records[call]
    (gradient,) = torch.autograd.grad(score, record.node, retain_graph=True, allow_unused=True)
    rows = record.rows(slice(None)).detach().double().numpy()
    slope = np.zeros_like(rows)
    if gradient is not None:
        slope = (gradient @ record.v.transpose(-1, -2)).double().detach().numpy()
    return (rows, slope) if every else (rows[0], slope[0])


def test_relevance_refuses_rows_that_are_carried_from_frame_to_frame():
    source = TrackedSource()
    t = trace(source, source.encode(tracked_samples(1)), grad=True)
    with pytest.raises(CaptureError, match=r"made of others \(tracks into frame 1\)"):
        relevance(t, source.bind(t.outputs, t.batch, None))


def test_tokens_of_a_stream_say_their_frame(ran):
    _, _, t = ran
    axis = stream_tokens(t.labels(CallKey(FRAMES, 0, 1)))
    assert axis.frame.tolist() == np.repeat(range(4), 4).tolist()
    assert len(axis.where("patch")) == 16
    rows = stream_tokens(t.labels(CallKey(READ, 0, 3)), "query")
    size = len(rows) // 4
    assert rows.frame[size * 2] == 2
    assert rows.label[size + ANCHORS] == "0"
    assert len(stream_tokens(t.labels(CallKey(READ, 0, 3)))) == 16


# ------------------------------------------------------------------------------------------- wrong labels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda said: {"at": {**said.at, "frame": Part((7,), 4)}}, r"'frame' at \[7\] on an axis of 4"),
        (lambda said: {"query_place": Place(said.query_place.axis, (0,) * len(said.query))}, r"'query' at \[0, 0"),
        (lambda said: {"at": {**said.at, "frame": Part((0,), 4)}}, r"declares the group|say in"),
        (lambda said: {"key_place": Place(said.key, (0, 1, 2, 3))}, r"declares\s+ragged axes"),
        (
            lambda said: {
                "query_place": Place(TokenAxis.of_kind("track", 9 + len(said.query)), said.query_place.index)
            },
            r"axes of \[",
        ),
    ],
)
def test_labels_that_do_not_fit_are_named(change, message):
    from dataclasses import replace

    class Wrong(TrackedSource):
        def label(self, call, batch, outputs):
            said = super().label(call, batch, outputs)
            return replace(said, **change(said)) if call.site == READ else said

    source = Wrong()
    with pytest.raises(CaptureError, match=message):
        capture_batch(source, source.encode(tracked_samples(1)), CapturePlan((SitePlan(READ, rows="all"),)))


@pytest.mark.parametrize("sparse", [False, True])
def test_merges_that_differ_from_sample_to_sample(sparse):
    from foveate.capture.merging import pull_back

    vectors, matrix = torch.randn(3, 2, 5), torch.randn(3, 5, 4) * (torch.rand(3, 5, 4) < 0.5)
    found = pull_back(vectors, matrix.to_sparse() if sparse else matrix)
    assert torch.allclose(found, torch.einsum("ist,itu->isu", vectors, matrix), atol=1e-6)


def test_renormalised_slot_weights_are_the_ones_that_move_values():
    """Slot attention by its definition: softmax over slots, a constant added, renormalised over inputs."""
    from foveate.capture.tap import Tap

    class Slots(torch.nn.Module):
        def forward(self, x, scores):
            weights = scores.softmax(-1) + 1e-6
            weights = weights / weights.sum(dim=1, keepdim=True)
            return weights.transpose(1, 2) @ x

    scores, x = 3 * torch.randn(2, 4, 4), torch.randn(2, 4, 6)
    module = Slots()
    with Tap(module) as tap:
        module(x, scores)
    (record,) = tap.records
    raw = scores.double().exp()
    raw = raw / raw.sum(2, keepdim=True) + 1e-6
    expected = (raw / raw.sum(1, keepdim=True)).transpose(1, 2)
    assert torch.allclose(record.rows(slice(None))[:, 0].double(), expected, atol=1e-6)
    assert record.sums_to_one
    check = record.certificate(range(4))
    assert check.value_error < 1e-6
    assert check.row_error < 1e-5
    assert not tap.unlinked


def test_softmax_weights_divided_by_something_else_stay_unlinked():
    from foveate.capture.tap import Tap

    class Gated(torch.nn.Module):
        def forward(self, x, scores):
            return (scores.softmax(-1) / torch.arange(1.0, 5.0)) @ x

    module = Gated()
    with Tap(module) as tap:
        module(torch.randn(2, 4, 6), torch.randn(2, 4, 4))
    assert not tap.records
    assert len(tap.unlinked) == 1
