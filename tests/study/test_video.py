"""``foveate video``: what is drawn over a clip is what the run holds, and the file plays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("av")
pytest.importorskip("transformers")

from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.plugins.opening import open_source
from foveate.render import clip_run
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan
from foveate.study.video import VideoPlan, draw_video
from foveate.testing.swimming import write_dataset
from run_fakes import make_run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two clips with all rows of the cross-attention, by the untrained model."""
    folder = tmp_path_factory.mktemp("video")
    manifest = write_dataset(folder / "clips", 2, seed=3)
    source = open_source("foveate/swim-vis-untrained", threshold=0.0, max_objects=3)
    plan = build_plan(source, sites=["decoder.cross"], rows="all", reductions=(), dtype="float32")
    run_capture(source, manifest, folder / "run.zarr", plan=plan, reference="foveate/swim-vis-untrained")
    return folder / "run.zarr"


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return Run.open(place)


def test_frames_are_those_that_the_model_read(run: Run) -> None:
    frames = list(clip_run.shown_frames(run, 1))
    whole = run.load_sample(1).pixels
    np.testing.assert_array_equal(np.stack(frames), whole[run.frame_index(1)])


def test_a_track_s_row_is_laid_cell_by_cell_on_its_frames(run: Run) -> None:
    answers = run.predictions.isel(sample=0)
    track = str(answers["track"].values[1])
    chosen = clip_run.attention_over_time(run, 0, track=track, layer=1, head=2)
    site = run.site("decoder.cross")
    query = run.tokens("decoder.cross", "query", 0).label.index(track)
    row = site["attention"].sel(layer=1, head=2).isel(sample=0, query=query).values.astype(np.float64)
    key = run.tokens("decoder.cross", "key", 0)
    rows, columns = chosen.laid.grid.shape
    for j, weight in enumerate(row):
        cell = chosen.laid.values[key.frame[j], int(key.y[j] * rows // 48), int(key.x[j] * columns // 48)]
        assert cell == pytest.approx(weight, abs=1e-9)
    assert chosen.mass.sum() == pytest.approx(1.0, abs=1e-5)
    np.testing.assert_allclose(chosen.uniform, 1 / 6)
    assert f"track {track}" in chosen.rule.what
    assert "head 2" in chosen.rule.what


def test_heads_are_averaged(run: Run) -> None:
    single = [clip_run.attention_over_time(run, 0, track=None, query=1, head=h).laid.values for h in range(4)]
    mean = clip_run.attention_over_time(run, 0, track=None, query=1).laid.values
    np.testing.assert_allclose(mean, np.mean(single, axis=0), atol=1e-9)


def test_tracks_come_with_their_masks_and_keep_their_colour(run: Run) -> None:
    every = clip_run.tracks_of(run, 0)
    names = [str(name) for name in run.predictions["track"].values[0] if str(name)]
    assert [track.name.split()[0] for track in every] == names
    alone = clip_run.tracks_of(run, 0, names[1])[0]
    assert alone.colour == every[1].colour
    np.testing.assert_array_equal(alone.masks, run.tracks["mask"].values[0, 1])
    assert clip_run.tracks_of(run, 0, least=1.1) == []
    with pytest.raises(UsageError, match="no track 'x'"):
        clip_run.tracks_of(run, 0, "x")


def test_the_verb_writes_a_file_that_plays(place: Path, tmp_path: Path) -> None:
    import av

    out = tmp_path / "clip.mp4"
    words = ["video", str(place), "-o", str(out), "--sample", "1", "--size", "200", "--json"]
    dry = CliRunner().invoke(main, [*words, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not out.exists()
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    told, planned = json.loads(done.stdout), json.loads(dry.stdout)
    assert told["written"]
    assert not planned["written"]
    assert (told["frames"], told["tracks"]) == (planned["frames"], planned["tracks"]) == (6, told["tracks"])
    with av.open(str(out)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 6
    assert "one scale over the clip" in told["caption"]


def test_slower_and_faster_than_the_clip(run: Run, tmp_path: Path) -> None:
    slow = draw_video(run, VideoPlan(fps=2, size=100), tmp_path / "slow.mp4")
    assert (slow.frames, slow.fps) == (6, 2)
    plain = draw_video(run, VideoPlan(with_map=False, size=100), tmp_path / "plain.webp")
    assert plain.caption == ""


def test_what_cannot_be_drawn(run: Run, tmp_path: Path) -> None:
    for plan, words in (
        (VideoPlan(sample=9), "no sample"),
        (VideoPlan(track="77"), "no track '77'"),
        (VideoPlan(method="rollout"), "no attribution 'rollout'"),
        (VideoPlan(scale="per-image"), "would not compare"),
        (VideoPlan(head="x"), "--head x"),
        (VideoPlan(site="encoder.self"), "no site 'encoder.self'"),
    ):
        with pytest.raises(UsageError, match=words):
            draw_video(run, plan, tmp_path / "no.mp4")
    with pytest.raises(UsageError, match="a run of images has no frames"):
        draw_video(make_run(tmp_path).run, VideoPlan(), tmp_path / "no.mp4")
    assert not (tmp_path / "no.mp4").exists()


def test_without_a_track_the_best_one_s_row_is_shown(run: Run) -> None:
    for position in (0, 1):
        best = str(run.predictions["track"].values[position][0])
        chosen = clip_run.attention_over_time(run, position)
        asked = clip_run.attention_over_time(run, position, track=best)
        np.testing.assert_array_equal(chosen.laid.values, asked.laid.values)
        assert chosen.rule.what.startswith(f"attention of track {best},")
    chosen = clip_run.attention_over_time(run, 0, query=0)
    assert chosen.rule.what.startswith("attention of row 0,")


def test_an_attribution_is_that_of_the_track(place: Path) -> None:
    from foveate.study.attribute import Settings, attribute_run

    source = open_source("foveate/swim-vis-untrained", threshold=0.0, max_objects=3)
    attribute_run(Run.open(place), ["saliency_abs"], source=source, settings=Settings())
    run = Run.open(place)
    product = run.product("attributions/saliency_abs")
    names = [str(name) for name in run.predictions["track"].values[0] if str(name)]
    assert len(names) == 3
    maps = []
    for name in names:
        target = [str(t) for t in product["target_track"].values[0]].index(name)
        chosen = clip_run.attribution_over_time(run, 0, "saliency_abs", track=name)
        np.testing.assert_array_equal(chosen.laid.values, product["map"].values[0, target])
        assert f"track {name}" in chosen.rule.what
        maps.append(chosen.laid.values)
    assert not np.allclose(maps[0], maps[1])
    with pytest.raises(UsageError, match="does not explain track 77"):
        clip_run.attribution_over_time(run, 0, "saliency_abs", track="77")


def test_a_tracker_without_rows_over_patches_is_drawn_with_its_tracks(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path / "clips", 1, seed=3)
    source = open_source("foveate/swim-vis-untrained", threshold=0.0, max_objects=3)
    plan = build_plan(source, sites=["decoder.self"], rows="all", reductions=(), dtype="float32")
    run_capture(source, manifest, tmp_path / "run.zarr", plan=plan, reference="foveate/swim-vis-untrained")
    run = Run.open(tmp_path / "run.zarr")
    done = draw_video(run, VideoPlan(size=100), tmp_path / "tracks.mp4")
    assert len(done.tracks) == 3
    assert "no attention rows over patches" in done.note
    with pytest.raises(UsageError, match="no place in the picture"):
        draw_video(run, VideoPlan(site="decoder.self"), tmp_path / "no.mp4")
