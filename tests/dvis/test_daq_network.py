"""The whole model: blocks of frames, gradients, held decisions, and the small cases at the edge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from daq_models import TINY, frames, given_segments, tiny
from foveate.errors import ModelError, SampleError, UsageError
from foveate_dvis.daq.loading import random_daq
from foveate_dvis.daq.network import DvisDaq
from foveate_dvis.daq.outputs import DaqOutputs, Refined
from foveate_dvis.daq.postprocess import answer
from foveate_dvis.daq.state import TrackerState

LIVELY = {"select_threshold": 0.6, "first_threshold": 0.6}
STRICT = {**LIVELY, "keep_threshold": 0.5, "noise_frames": 2}


def model(mode: str = "online", seed: int = 0, **rules: Any) -> DvisDaq:
    return tiny(mode, seed=seed, **(LIVELY | rules))


# ------------------------------------------------------------------------------------ frames in blocks


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("sizes", [(2, 2, 2, 1), (4, 3), (6, 1)])
@pytest.mark.parametrize("seed", [1, 3])
def test_blocks_equal_the_whole(mode: str, sizes: tuple[int, ...], seed: int) -> None:
    """Windows of two frames stay whole, so nothing differs, not even the last bit."""
    net, clip = model(mode, seed), frames(7, seed=seed)
    whole = net(clip)
    assert len({track.start for track in whole.tracks}) > 1
    parts, state = [], None
    for block in clip.split(sizes):
        parts.append(net(block, state=state))
        state = parts[-1].state
    last = parts[-1]
    assert last.tracks == whole.tracks
    assert last.ids == whole.ids
    assert torch.equal(last.pred_logits, whole.pred_logits)
    assert [(r.frame, r.ids, r.valid, r.births, r.deaths) for p in parts for r in p.rows] == [
        (r.frame, r.ids, r.valid, r.births, r.deaths) for r in whole.rows
    ]
    assert sum((p.births for p in parts), ()) == whole.births
    assert sum((p.deaths for p in parts), ()) == whole.deaths
    for part in parts:
        _same_frames(part, whole)
    assert last.state.next_frame == 7
    if mode == "offline":
        _same_refined(net, parts, clip.split(sizes), whole)


def _same_frames(part: DaqOutputs, whole: DaqOutputs) -> None:
    """A block's frames are those of the whole clip; tracks dropped later may still be in an earlier block."""
    where = list(part.frames)
    for row, track in enumerate(part.ids):
        if track in whole.ids:
            theirs = whole.ids.index(track)
            assert torch.equal(part.pred_masks[row], whole.pred_masks[theirs, where])
            assert torch.equal(part.frame_logits[row], whole.frame_logits[theirs, where])
            assert torch.equal(part.alive[row], whole.alive[theirs, where])


def _same_refined(net: DvisDaq, parts: list[DaqOutputs], blocks: Any, whole: DaqOutputs) -> None:
    refined, expected = parts[-1].refined, whole.refined
    assert refined is not None
    assert expected is not None
    assert refined.names == expected.names
    assert torch.equal(refined.logits, expected.logits)
    assert torch.equal(refined.importance, expected.importance)
    for part, block in zip(parts, blocks, strict=True):
        masks = net.refined_masks(refined, block, part.first_frame)
        assert torch.equal(masks, expected.masks[:, list(part.frames)])
    assert torch.equal(refined.masks, expected.masks[:, list(parts[-1].frames)])


def test_a_carried_state_holds_no_graph_and_leaves_the_old_one_alone() -> None:
    net, clip = model("offline"), frames(4).requires_grad_()
    first = net(clip[:2])
    before = first.state
    net(clip[2:], state=before)
    assert before.next_frame == 2
    assert not any(track.state.requires_grad or track.logit_sum.requires_grad for track in before.tracks)
    assert not any(frame.embeds.requires_grad for frame in before.frames)
    again = net(clip[2:], state=before)
    assert torch.equal(again.pred_logits, net(clip[2:], state=before).pred_logits)


def test_without_refining_there_is_no_refined_answer() -> None:
    out = model("offline")(frames(2), refine=False)
    assert out.refined is None
    assert len(out.state.frames) == 2


def test_refined_masks_of_frames_never_read() -> None:
    net = model("offline")
    refined = net(frames(2)).refined
    assert refined is not None
    with pytest.raises(SampleError, match="frames 1 to 2 of 2"):
        net.refined_masks(refined, frames(2), 1)


# ------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("what", ["class", "mask"])
def test_gradients_reach_the_pixels(mode: str, what: str) -> None:
    """The directional derivative of one track's score, against a central difference with the decisions held."""
    net, clip = model(mode, seed=1).double(), frames(4, seed=1, dtype=torch.float64)
    intact = net(clip)

    def scored(x: Tensor) -> Tensor:
        out = net(x, held=intact)
        logits, masks = out.final_logits, out.final_masks
        return logits[0, 0] if what == "class" else masks[0][:, 2:5, 3:9].clamp(min=-100).sum()

    pixels = clip.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scored(pixels), pixels)
    assert gradient.abs().amax(dim=(1, 2, 3)).gt(0).all()  # every frame
    direction = torch.randn(clip.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        change = (scored(clip + step * direction) - scored(clip - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), change, rtol=1e-4, atol=1e-7)


def test_a_score_depends_on_earlier_frames_through_the_recurrence() -> None:
    net, clip = model("online", seed=1), frames(4, seed=1).requires_grad_()
    out = net(clip)
    track = next(i for i, alive in enumerate(out.alive) if alive.all())
    (gradient,) = torch.autograd.grad(out.frame_logits[track, 3, 0], clip)
    assert gradient[0].abs().max() > 0


# ------------------------------------------------------------------------------------ held decisions


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_held_by_itself_changes_nothing(mode: str) -> None:
    net, clip = model(mode, seed=3), frames(5, seed=3)
    intact = net(clip)
    again = net(clip, held=intact)
    assert again.tracks == intact.tracks
    assert torch.equal(again.final_logits, intact.final_logits)
    assert again.final_names == intact.final_names


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_held_keeps_tracks_where_the_picture_has_changed(mode: str) -> None:
    net, clip = model(mode, seed=3), frames(5, seed=3)
    intact, other = net(clip), frames(5, seed=8)
    free, held = net(other), net(other, held=intact)
    assert free.tracks != intact.tracks
    assert held.tracks == intact.tracks
    assert held.final_names == intact.final_names
    assert not torch.equal(held.final_logits, intact.final_logits)


def test_held_decisions_of_other_frames_are_refused() -> None:
    net, clip = model(seed=3), frames(4, seed=3)
    first = net(clip[:2])
    with pytest.raises(UsageError, match="do not fit"):
        net(clip[2:], state=first.state, held=first)
    with pytest.raises(UsageError, match="2 frames, the block has 4"):
        net(clip, held=first)


# ------------------------------------------------------------------------------------ the edge


@pytest.mark.parametrize("mode", ["online", "offline"])
@pytest.mark.parametrize("ovis", [True, False])
def test_no_track_at_all(mode: str, ovis: bool) -> None:
    net = model(mode, first_threshold=1.0, select_threshold=1.0, ovis_rule=ovis)
    out = net(frames(3))
    assert out.tracks == ()
    assert out.pred_logits.shape == (0, 4)
    assert out.pred_masks.shape == (0, 3, 8, 16)
    assert out.frame_logits.shape == (0, 3, 4)
    if mode == "offline":  # the refiner still has the chains of queries
        refined = out.refined
        assert refined is not None
        assert refined.linked == (True,) * 6
    else:
        found = _answers(out)
        assert found.masks.shape == (0, 3, 30, 60)


def _answers(out: DaqOutputs) -> Any:
    return answer(out.final_logits, out.final_masks, max_num=4, padded=(32, 64), shown=(30, 60), original=(30, 60))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_one_frame(mode: str) -> None:
    out = model(mode)(frames(1))
    assert len(out.rows) == 1
    assert out.rows[0].slot_scores.shape == (0,)
    assert out.final_masks.shape[1] == 1
    if out.refined is not None:
        assert torch.equal(out.refined.importance, torch.ones_like(out.refined.importance))
    assert out.final_logits.isfinite().all()


def one_track(exact: bool, top: int = 1) -> tuple[DvisDaq, Tensor]:
    net, clip = given_segments("offline", count=3, seed=7, top=top, exact=exact, **STRICT)
    return net, clip


def test_one_track_is_refined_and_upstream_skips_it() -> None:
    net, clip = one_track(exact=False)
    refined = net(clip).refined
    assert refined is not None
    assert sum(not made for made in refined.linked) == 1
    assert len(refined.logits) == 6
    exact, clip = one_track(exact=True)
    skipped = exact(clip).refined
    assert skipped is not None
    assert skipped.logits.shape == (0, 4)
    assert skipped.masks.shape == (0, 3, 4, 6)
    assert skipped.names == ()


def test_a_model_of_one_query() -> None:
    config = replace(TINY, num_queries=1, num_new_ins=1, refiner=tiny("offline").config.refiner)
    out = random_daq(config)(frames(3))
    assert isinstance(out.refined, Refined)
    assert len(out.refined.logits) == 1


def test_upstream_order_and_ours_hold_the_same_instances() -> None:
    ours, clip = given_segments("offline", count=4, seed=0, top=8, **STRICT)
    exact, _ = given_segments("offline", count=4, seed=0, top=8, exact=True, **STRICT)
    a, b = ours(clip).refined, exact(clip).refined
    assert a is not None
    assert b is not None
    assert set(a.names) == set(b.names)
    order = [b.names.index(name) for name in a.names]
    torch.testing.assert_close(a.logits, b.logits[order], rtol=0, atol=1e-9)
    scores = a.unrefined_logits.softmax(-1)[:, :-1].amax(-1)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_frames_that_cannot_be_read() -> None:
    net = model()
    for bad, said in (
        (torch.zeros(2, 3, 30, 64), "multiples of 32"),
        (torch.zeros(0, 3, 32, 64), "at least one frame"),
        (torch.zeros(2, 1, 32, 64), "expected floating"),
        (torch.zeros(2, 3, 32, 64, dtype=torch.uint8), "uint8"),
        (torch.zeros(3, 32, 64), "expected floating"),
    ):
        with pytest.raises(SampleError, match=said):
            net(bad)


def test_the_same_seed_gives_the_same_tracks_and_randomness_is_left_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b = random_daq(TINY, seed=4), random_daq(TINY, seed=4)
    a(frames(3))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert [track.id for track in model()(frames(5)).tracks] == list(range(len(model()(frames(5)).tracks)))


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_every_new_tensor_is_made_where_the_frames_are(mode: str) -> None:
    """With another default device, a tensor made without naming one would land there and fail to combine."""
    net, clip = given_segments(mode, count=4, seed=5, **STRICT)
    expected = net(clip)
    with torch.device("meta"):
        out = net(clip)
    assert torch.equal(out.final_logits, expected.final_logits)


def test_a_state_moves_as_a_whole() -> None:
    state = model("offline")(frames(3)).state.to("meta")
    assert isinstance(state, TrackerState)
    for track in state.tracks:
        tensors = [track.state, track.position, track.logit_sum, *track.stored, *track.states]
        assert all(tensor.is_meta for tensor in tensors)
    assert all(frame.embeds.is_meta and frame.logits.is_meta for frame in state.frames)


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(ModelError, match="expected equal"):
        replace(TINY, num_new_ins=5)
    with pytest.raises(ModelError, match="one size"):
        replace(TINY, mask_dim=16)
    with pytest.raises(ModelError, match="multiple of 5"):
        replace(TINY, heads=5)
