"""Tracks that die, that are away for a while, and that are born after others died: from capture to the picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dvis.test_source import clips, source
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.render import clip_run
from foveate.render.clip_overlay import compose
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan


@pytest.fixture(scope="module")
def opened():
    return source(seed=1, patience=2)  # all tracks die in frame 3, others are born in frame 6


@pytest.fixture(scope="module")
def run(opened, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("reborn")
    for t, pixels in enumerate(clips(1, frames=12)[0].pixels):
        (folder / "clip").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / "clip" / f"{t:02d}.png")
    plan = build_plan(opened, sites=["tracker.cross"], rows="all", reductions=(), dtype="float32")
    run_capture(opened, folder, folder / "run.zarr", plan=plan, top=40)
    return Run.open(folder / "run.zarr")


def test_the_clip_has_deaths_gaps_and_later_births(opened):
    clip = opened.forward(opened.encode(clips(1, frames=12))).clips[0]
    deaths = [row.frame for row in clip.rows for _ in row.deaths]
    births = [row.frame for row in clip.rows for _ in row.births]
    assert deaths
    assert max(births) > min(deaths), "nothing is born after a death: the test would show nothing"


def test_a_run_of_it_is_valid_and_rows_exist_where_tracks_do(opened, run: Run):
    assert not validate(run.path)
    clip = opened.forward(opened.encode([run.load_sample(0)])).clips[0]
    site, query = run.site("tracker.cross"), run.tokens("tracker.cross", "query", 0)
    rows = np.asarray(site["attention"].isel(sample=0, layer=-1).values).sum(axis=(1, 3))  # (frame, query)
    for frame, there in enumerate(clip.rows):
        carried = {str(track) for track in there.ids if track >= 0}
        for place, name in enumerate(query.label or ()):
            if query.kind[place] == query.kind[query.where("track")[0]]:
                assert (rows[frame, place] > 0) == (name in carried), (frame, name)


def test_a_track_is_drawn_where_it_is_and_nowhere_else(run: Run):
    marks, frames = clip_run.tracks_of(run, 0), list(clip_run.shown_frames(run, 0))
    assert marks
    seen = set()
    for track in marks:
        overlay = clip_run.overlay_of(run, 0, None, [track], size=64)
        assert not any((pixels == track.colour).all(-1).any() for pixels in frames)
        for frame, drawn in enumerate(compose(frames, overlay)):
            there = bool((np.nan_to_num(track.masks[frame]) >= 0.5).any() or np.isfinite(track.boxes[frame]).all())
            assert bool((drawn == track.colour).all(-1).any()) == there, (track.name, frame)
            seen.add(there)
    assert seen == {True, False}
