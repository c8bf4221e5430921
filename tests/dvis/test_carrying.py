"""Identity and recurrence of trackers: what the source tells, and the analyses made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dvis.test_source import clips, source
from foveate.errors import UsageError
from foveate.study.temporal_identity import _at, _past, identity, recurrence
from foveate.temporal.identity import mask_overlap
from foveate_dvis.daq_carrying import carried, reach, twin_of
from foveate_dvis.daq_lags import frame_contributions
from foveate_dvis.daq_sites import ROW_CROSS


@pytest.fixture(scope="module")
def opened():
    return source(patience=3)


@pytest.fixture(scope="module")
def batch(opened):
    return opened.encode(clips(2))


class Subject:
    """A subject of clips in memory."""

    def __init__(self, opened, samples):
        self.source, self.samples = opened, samples
        self.frames = max(len(one.pixels) for one in samples)
        self.ids = [one.id for one in samples]

    def __len__(self):
        return len(self.samples)

    def sample(self, place):
        return self.samples[place]


def test_carried_frames_hold_the_rows_and_masks_of_their_tracks(opened, batch):
    from foveate.capture.engine import capture_batch
    from foveate.study.plan import build_plan

    outputs = opened.forward(batch)
    plan = build_plan(opened, sites=[ROW_CROSS], rows="all", reductions=(), dtype="float32")
    site = capture_batch(opened, batch, plan).sites[ROW_CROSS]
    for sample, (clip, steps) in enumerate(zip(outputs.clips, carried(opened, batch), strict=True)):
        assert steps
        for step in steps:
            rows = clip.rows[step.frame]
            assert set(step.tracks) <= {str(track) for track in rows.ids if track >= 0}
            for i, track in enumerate(step.tracks):
                query = site.query.label.index(track)
                stored = site.arrays["attention"][sample, step.frame, -1, :, query].mean(0)
                np.testing.assert_allclose(step.attention[i], stored, atol=1e-5)
                mask = clip.pred_masks[clip.ids.index(int(track)), step.frame] > 0
                np.testing.assert_array_equal(step.track_masks[i], mask.numpy())
            np.testing.assert_array_equal(step.query_masks, (clip.segmenter.masks[step.frame] > 0).numpy())


def test_identity_against_loops(opened):
    samples = clips(2)
    found = identity(Subject(opened, samples))
    mass, right, _ = (finding.values for finding in found.findings)
    for place, sample in enumerate(samples):
        frames = []
        for step in carried(opened, opened.encode([sample]))[0]:
            overlap = mask_overlap(step.track_masks, step.query_masks)
            rows = [i for i in range(len(step.tracks)) if overlap[i].max() > 0]
            if rows:
                frames.append(
                    [
                        np.mean([step.attention[i, overlap[i].argmax()] for i in rows]),
                        np.mean([step.attention[i].argmax() == overlap[i].argmax() for i in rows]),
                    ]
                )
        np.testing.assert_allclose([mass[place], right[place]], np.mean(frames, 0), atol=1e-9)
    queries = opened.config.num_queries
    np.testing.assert_allclose(found.findings[0].baseline, 1 / queries)
    assert set(found.products) == {"temporal/identity"}


def test_reach_is_the_exact_split_and_the_twin_follows_the_same_tracks(opened, batch):
    exact, told, twin = (
        frame_contributions(opened, batch),
        reach(opened, batch),
        reach(opened, batch, untrained=True),
    )
    for a, b, c in zip(exact, told, twin, strict=True):
        assert [str(one.track) for one in a] == [one.track for one in b] == [one.track for one in c]
        for one, other, random in zip(a, b, c, strict=True):
            np.testing.assert_array_equal(one.shares, other.shares)
            assert random.error < 1e-4
            # The same rows live in the same frames, whatever their weights.
            np.testing.assert_array_equal(np.isnan(random.shares).all(1), np.isnan(other.shares).all(1))
    own, other = opened.module.state_dict(), twin_of(opened).module.state_dict()
    assert not any(
        torch.equal(own[name], other[name]) for name in own if "tracker" in name and own[name].dim() > 1
    )


def test_recurrence_is_made_of_shares(opened):
    samples = clips(2)
    outcome = recurrence(Subject(opened, samples))
    past = outcome.findings[0]
    for place, sample in enumerate(samples):
        shares = np.stack([one.shares for one in reach(opened, opened.encode([sample]))[0]])
        table = np.nanmean(shares, 0)
        rows = [sum(table[t, :t]) for t in range(1, len(table)) if np.isfinite(table[t]).any()]
        assert past.values[place] == pytest.approx(np.mean(rows))
    assert past.baseline_is == "the untrained twin"
    assert np.isfinite(past.baseline).all()
    rule = outcome.findings[-1]
    assert rule.quantity.startswith("INVALID")
    assert (rule.values <= 0.5**opened.config.tracker.layers + 1e-6).all()
    assert outcome.products["temporal/recurrence"]["half_residual"].attrs["long_name"].endswith("shown beside")


def test_shares_by_lag_and_of_the_past_on_a_table_by_hand():
    table = np.array([[[1, 0, 0], [0.4, 0.6, 0], [0.1, 0.2, 0.7]]], float)
    np.testing.assert_allclose(_past(table), [(0.4 + 0.3) / 2])
    np.testing.assert_allclose(_at(table, 1), [(0.4 + 0.2) / 2])
    np.testing.assert_allclose(_at(table, 2), [0.1])


def test_models_without_tracks_or_recurrence_say_so(opened):
    import foveate

    other = Subject(foveate.open("foveate/swim-vis-untrained"), clips(1))
    with pytest.raises(UsageError, match="no tracks that read"):
        identity(other)
    with pytest.raises(UsageError, match="no state that is carried"):
        recurrence(other)
    with pytest.raises(UsageError, match="those of the online model"):
        recurrence(Subject(source(mode="offline"), clips(1)))


def test_the_analyses_are_listed(tmp_path: Path):
    from foveate.study.temporal import ANALYSES

    assert {"identity", "recurrence"} <= set(ANALYSES)
    assert ANALYSES["recurrence"].load() is recurrence
