"""How far back a track reaches: exact decomposition, rollout's bound, and what taking its state away does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dvis.test_source import clips, source
from foveate.capture.norms import NormWeights
from foveate.capture.value_paths import trace_values
from foveate.errors import UsageError
from foveate.interfaces import CallKey
from foveate.temporal.frame_mass import horizon, lag_profile
from foveate_dvis.daq_knockout import knock_out_states
from foveate_dvis.daq_lags import frame_contributions, half_residual
from foveate_dvis.daq_sites import ROW_CROSS


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def opened():
    return source(patience=3)


@pytest.fixture(scope="module")
def batch(opened):
    return opened.encode(clips(2))


def test_contributions_add_up_to_the_models_own_logits(opened, batch):
    outputs = opened.forward(batch)
    for clip, tracks in zip(outputs.clips, frame_contributions(opened, batch), strict=True):
        assert [one.track for one in tracks] == [track.id for track in clip.tracks]
        for one in tracks:
            assert one.error < 1e-5
            for frame, rows in enumerate(clip.rows):
                if one.track in rows.born and one.track not in rows.deaths:
                    expected = rows.class_logits[rows.born.index(one.track)].double().numpy()
                    assert np.allclose(one.logits[frame].sum(0), expected, atol=1e-4)
                    assert (one.norms[frame, : clip.tracks[one.track].start] >= 0).all()
                    assert not one.norms[frame, frame + 1 :].any(), "a later frame contributes"
                else:
                    assert np.isnan(one.norms[frame]).all()


def test_one_layer_of_one_frame_equals_norm_weights(opened, batch):
    """In the first frame's first layer, what all keys together bring equals Kobayashi's contributions."""
    from foveate_dvis.daq_lags import _read

    path = trace_values(opened, batch)[CallKey(ROW_CROSS, 0, 0)]
    module = opened.model.tracker.transformer_cross_attention_layers[0].multihead_attn
    embeds = opened.forward(batch).clips[0].segmenter.embeds[0].double()
    expected = NormWeights(path).rows(range(path.shape.queries))[0].numpy()
    rows = path.record.rows(slice(None))[0].double()
    for key in range(len(embeds)):
        alone = torch.zeros_like(rows)
        alone[..., key] = rows[..., key]
        bias = module.in_proj_bias[2 * module.embed_dim :].double()
        whole, _ = _read(module, alone, embeds[:, None])
        # the value bias travels with the attention: Kobayashi et al. count it to its key
        carried = torch.einsum("hr,hc->rhc", rows[..., key], bias.unflatten(0, (module.num_heads, -1))).flatten(1)
        found = whole[:, 0] + carried @ module.out_proj.weight.double().T
        assert np.allclose(found.norm(dim=-1).numpy(), expected[:, key], atol=1e-6)


def test_half_residual_rollout_forgets_whatever_the_model(opened, batch):
    for seed in range(3):
        other = source(seed=seed, patience=3)
        for tracks in half_residual(other, batch):
            for one in tracks:
                assert not one.valid
                assert one.most_of_the_past == 0.5**other.config.tracker.layers
                for frame, row in enumerate(one.shares):
                    if np.isfinite(row).all():
                        assert row[:frame].sum() <= one.most_of_the_past + 1e-7
                        assert row.sum() <= 1 + 1e-6


def test_published_depth_leaves_a_sixty_fourth():
    from dataclasses import replace

    from daq_models import TINY, sharpened
    from foveate.interfaces import ModelCard
    from foveate_dvis.daq.loading import random_daq
    from foveate_dvis.daq_opening import OpenedDaq
    from foveate_dvis.daq_source import DaqSource

    deep = replace(TINY, tracker=replace(TINY.tracker, layers=6, patience=6))
    model = sharpened(random_daq(deep, seed=0), 0)
    with torch.no_grad():
        for layer in model.tracker.transformer_cross_attention_layers:
            layer.multihead_attn.out_proj.weight.mul_(0.01)
    opened = DaqSource(OpenedDaq(model, ModelCard("deep", "tiny", "tests")), shortest_edge=0)
    batch = opened.encode(clips(frames=3))
    (halves,), (exact,) = half_residual(opened, batch), frame_contributions(opened, batch)
    assert halves
    old = [track.track for track in exact if np.isfinite(track.norms[1]).all() and track.norms[0, 0] > 0]
    assert max(halves[track].shares[1, 0] for track in old) <= 2.0**-6 + 1e-7
    # This model hardly reads: most of a track is what it was. Rollout cannot tell.
    assert min(exact[track].shares[1, 0] for track in old) > 0.75
    assert all(one.error < 1e-5 for one in exact)


def test_shares_make_a_lag_profile(opened, batch):
    (track, *_) = frame_contributions(opened, batch)[0]
    lags, profile = lag_profile(track.shares)
    assert not np.nansum(profile[lags > 0])
    assert np.nanmax(np.abs(np.nansum(track.shares, 1)[np.isfinite(track.shares).all(1)] - 1)) < 1e-12
    assert horizon(track.shares) >= 0


def test_a_state_put_back_changes_nothing_and_taken_away_changes_something(opened, batch):
    outputs = opened.forward(batch)
    same = knock_out_states(opened, batch, replacement="same")
    new = knock_out_states(opened, batch)
    for clip, put_back, taken in zip(outputs.clips, same, new, strict=True):
        known = np.isfinite(put_back.change)
        assert known.any()
        assert np.nanmax(put_back.change) < 5e-4  # frames segmented alone round otherwise than in windows
        assert np.array_equal(known, np.isfinite(taken.change))
        assert np.nanmax(taken.change) > 1e-2
        assert np.nanmax(taken.change) <= 1
        for track in clip.tracks:
            cuts, frames = np.nonzero(known[track.id])
            assert (cuts > track.start).all(), "cut before its birth"
            assert (frames >= cuts).all()


def test_one_cut_equals_a_run_by_hand(opened):
    batch = opened.encode(clips(1))
    (found,) = knock_out_states(opened, batch, replacement="mean")
    from dataclasses import replace

    intact = opened.forward(batch).clips[0]
    first = opened.model(batch.inputs[0, :2])
    track = first.state.live[0].id
    mean = torch.stack([one.state for one in first.state.live]).mean(0)
    tracks = tuple(replace(one, state=mean) if one.id == track else one for one in first.state.tracks)
    held = replace(intact, rows=intact.rows[2:])
    changed = opened.model(batch.inputs[0, 2:], state=replace(first.state, tracks=tracks), held=held)
    for frame in range(2, 6):
        own, other = intact.rows[frame], changed.rows[frame - 2]
        if track not in own.born or track in own.deaths:
            assert np.isnan(found.change[track, 2, frame])
            continue
        p, q = (rows.class_logits[own.born.index(track)].double().softmax(-1) for rows in (own, other))
        assert abs(found.change[track, 2, frame] - float((p - q).abs().sum() / 2)) < 1e-6


def test_offline_models_and_wrong_replacements_are_refused(opened, batch):
    offline = source("offline")
    for call in (frame_contributions, half_residual, knock_out_states):
        with pytest.raises(UsageError, match="online"):
            call(offline, batch)
    with pytest.raises(UsageError, match="no replacement 'zero'"):
        knock_out_states(opened, batch, replacement="zero")
