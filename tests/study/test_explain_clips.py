"""`foveate attribute` and `foveate faithfulness` on runs of clips: what is stored, in which unit, over videos."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray as xr
from click.testing import CliRunner
from PIL import Image

from clip_fakes import ClipSource, TrackSource, bound_clips, clips
from foveate.attribution.attention import ReadoutAttention
from foveate.attribution.gradients import SaliencyAbs
from foveate.cli import main
from foveate.data.manifest import Manifest
from foveate.data.run import Run
from foveate.errors import PluginError, StoreError, UsageError
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.leaderboard import build_leaderboard
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.units import Unit
from foveate.stats.intervals import bootstrap_mean
from foveate.study.attribute import Settings as AttributeSettings
from foveate.study.attribute import add_external, attribute_run, plan_run
from foveate.study.capture import run_capture
from foveate.study.clip_frames import alike, cell_counts, frame_coords, map_shape
from foveate.study.faithfulness import estimate_faithfulness, run_faithfulness
from foveate.study.faithfulness_job import Settings

METHODS = ("readout", "saliency_abs", "ablation")
PROTOCOL = Protocol(baselines=("mean", "freeze"), steps=4)


def scoring(kind="cells", **options):
    return Settings(Scoring(PROTOCOL, random_orders=4, unit=Unit(kind, **options)))


def write_clips(folder, samples, videos=None):
    """A table of frame folders with masks; ``videos`` names the recording of each."""
    lines = ["path,mask,video" if videos else "path,mask"]
    for number, sample in enumerate(samples):
        place = folder / sample.id
        place.mkdir()
        for t, frame in enumerate(sample.pixels):
            Image.fromarray(frame).save(place / f"{t:03}.png")
        np.save(folder / f"{sample.id}-mask.npy", sample.mask)
        row = [sample.id, f"{sample.id}-mask.npy", *([videos[number]] if videos else [])]
        lines.append(",".join(row))
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return Manifest.discover(folder / "clips.csv", media="clip")


def make(folder, source, samples, methods=METHODS, videos=None):
    run_capture(source, write_clips(folder, samples, videos), folder / "run.zarr")
    run = Run.open(folder / "run.zarr")
    assert run.ok.size == len(samples)
    if methods:
        attribute_run(run, methods, source=source)
    return run


@pytest.fixture(scope="module")
def source():
    return ClipSource(seed=3)


@pytest.fixture(scope="module")
def made(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("clips")
    make(folder, source, clips(4, frames=8), videos=["a", "a", "b", "c"])
    return folder


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    return Run.open(tmp_path / "copy" / "run.zarr")


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Clips of 4, 6 and 8 frames read whole: 2, 3 and 4 frame cells."""
    folder = tmp_path_factory.mktemp("ragged")
    source = ClipSource(frames=None, seed=3)
    return make(folder, source, clips(4, frames=[4, 8, 6, 4])), source


def test_maps_of_clips_have_frames_with_their_places_in_time(run, source):
    product = run.product("attributions/readout")
    assert product["map"].dims == ("sample", "target", "frame", "y", "x")
    assert product["map"].shape == (4, 1, 2, 4, 4)
    assert product["frame_first"].values.tolist() == [[1, 5]] * 4  # of 8 frames, 1 3 5 7 are read
    assert product["frame_last"].values.tolist() == [[3, 7]] * 4
    for i in range(4):
        batch, bound = bound_clips(source, [run.load_sample(i)])
        want = ReadoutAttention().attribute(source, batch, bound).values
        np.testing.assert_allclose(product["map"].values[i], want, atol=1e-6)
        assert product["target_class"].values[i, 0] == bound.rows[0].class_index
    assert product.attrs["evaluations_per_patch"] == 1 / 32
    assert run.product("attributions/ablation").attrs["forward_passes"] == 33


def test_shorter_clips_end_in_nan(ragged):
    run, source = ragged
    assert cell_counts(run).tolist() == [2, 4, 3, 2]
    assert map_shape(run) == (4, 4, 4)
    assert alike(run, [0, 1, 2, 3]) == [[0, 3], [1], [2]]
    values = run.product("attributions/saliency_abs")["map"].values
    assert run.product("attributions/saliency_abs")["converged"].values.all()
    for i, count in enumerate(cell_counts(run)):
        batch, bound = bound_clips(source, [run.load_sample(i)])
        want = SaliencyAbs().attribute(source, batch, bound).values
        np.testing.assert_allclose(values[i, :, :count], want, rtol=1e-4)
        assert np.isnan(values[i, :, count:]).all()
    coords = frame_coords(run)
    assert coords["frame_first"][1].tolist() == [[0, 2, -1, -1], [0, 2, 4, 6], [0, 2, 4, -1], [0, 2, -1, -1]]


def test_a_job_on_clips_that_was_cut_off_goes_on(ragged, tmp_path, monkeypatch):
    import foveate.study.attribute as job

    run, source = ragged
    shutil.copytree(run.path.parent, tmp_path / "copy")
    other, calls, real = Run.open(tmp_path / "copy" / "run.zarr"), [], job.explain_all

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    settings = AttributeSettings(seed=5, batch_size=1, overwrite=True)
    monkeypatch.setattr(job, "explain_all", failing)
    with pytest.raises(KeyboardInterrupt):
        attribute_run(other, ["saliency_abs"], source=source, settings=settings)
    monkeypatch.setattr(job, "explain_all", real)
    attribute_run(other, ["saliency_abs"], source=source, settings=AttributeSettings(seed=5, batch_size=4))
    got = other.product("attributions/saliency_abs")["map"].values
    np.testing.assert_allclose(got, run.product("attributions/saliency_abs")["map"].values, rtol=1e-4)
    with pytest.raises(StoreError, match="other settings"):
        attribute_run(other, ["saliency_abs"], source=source, settings=AttributeSettings(seed=6))


def test_the_price_of_a_method_counts_frame_cells(run, source):
    plan = {one.method: one for one in plan_run(run, ["ablation", "occlusion"], source=source)}
    assert plan["ablation"].forward == 4 * 33
    assert plan["occlusion"].forward == 4 * (2 * 9 + 1)
    assert plan["ablation"].evaluations_per_patch == 33 / 32


def test_another_grouping_of_frames_than_the_captured_one_is_refused(run):
    with pytest.raises(
        UsageError, match="was captured in 4 frames of 2 frame cells, but the model now reads 6 of 3"
    ):
        attribute_run(run, ["uniform"], source=ClipSource(frames=6, seed=3))


def test_a_method_that_forgets_the_frames_is_a_plugin_error(run, source, monkeypatch):
    from foveate.attribution.reference import Uniform
    from foveate.interfaces import AttributionMap

    def flat(self, source, batch, bound, *, seed=0):
        return AttributionMap("uniform", np.ones((len(bound), 4, 4), np.float32), source.cells(batch))

    monkeypatch.setattr(Uniform, "attribute", flat)
    with pytest.raises(PluginError, match=r"expected maps \(4, frame, 4, 4\)"):
        attribute_run(run, ["uniform"], source=source)


def test_maps_of_another_tool_over_frames(run, tmp_path):
    random = np.random.default_rng(0)
    heat = random.random((4, 4, 16, 16))  # one plane for each frame that the model reads
    np.save(tmp_path / "heat.npy", heat)
    add_external(run, "heat", tmp_path / "heat.npy")
    got = run.product("attributions/heat")["map"].values[:, 0]
    want = heat.reshape(4, 2, 2, 4, 4, 4, 4).mean((2, 4, 6))
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.savez(tmp_path / "cells.npz", **{name: heat[i, ::2] for i, name in enumerate(run.samples["id"].values)})
    add_external(run, "cells", tmp_path / "cells.npz")
    got = run.product("attributions/cells")["map"].values[:, 0]
    np.testing.assert_allclose(got, heat[:, ::2].reshape(4, 2, 4, 4, 4, 4).mean((3, 5)), rtol=1e-5)
    np.save(tmp_path / "wrong.npy", heat[:, :3])
    with pytest.raises(UsageError, match=r"4 frames, or 2 frame cells, that the model reads; got shape \(3"):
        add_external(run, "wrong", tmp_path / "wrong.npy")


# --------------------------------------------------------------------------------------- faithfulness


@pytest.mark.parametrize("kind", ["cells", "tubes", "frames"])
def test_stored_curves_are_what_a_direct_computation_gives(run, source, kind):
    twin = ClipSource(seed=99)
    settings = scoring(kind)
    report = run_faithfulness(
        run, source=source, settings=settings, twin=twin, twin_methods=(ReadoutAttention(), SaliencyAbs())
    )
    place = "faithfulness" if kind == "cells" else f"faithfulness/{kind}"
    curves = run.product(f"{place}/curves")
    assert {f"{place}/scores", f"{place}/agreement"} <= set(run.products())
    controls = {row.method for row in report.board.controls}
    expected = {"uniform", "centre", "edge", "saturation", "motion", "one_frame", "oracle", "random"}
    assert controls == expected | {"readout@untrained", "saliency_abs@untrained"}
    position = 2
    batch, bound = bound_clips(source, [run.load_sample(position)])
    from foveate.attribution.objective import Objective

    stored = run.product("attributions/ablation")["map"].values[[position], 0].reshape(1, -1).astype(float)
    direct = score_maps(Objective(source, batch, bound), {"ablation": stored}, run.grid, settings.scoring)
    for name, i in (("ablation", 0), ("random", 1)):
        np.testing.assert_allclose(
            curves["curve"].sel({"method": name}).values[position, 0], direct.curves[0, i], atol=2e-6
        )
    area = np.trapezoid(curves["curve"].values, curves["fraction"].values, axis=-1)
    scores = run.product(f"{place}/scores")
    np.testing.assert_allclose(scores["area"].transpose(*curves["curve"].dims[:-1]).values, area, atol=1e-7)
    assert curves.attrs["unit"] == kind
    assert curves.attrs["unit_value"] == "sum"
    assert curves.attrs["frame_cells"] == [2, 2, 2, 2]
    assert report.board.n == 3  # videos a, b and c
    text = " ".join(report.to_text().split())
    assert f"3 videos, over {kind}" in text
    assert "windows of one video are averaged first" in text
    assert "image" not in text
    oracle = next(row for row in report.board.rows if row.method == "oracle")
    assert oracle.localisation["roc_auc"].estimate > 0.9


def test_all_units_lie_side_by_side(run, source):
    for kind in ("cells", "tubes", "frames"):
        run_faithfulness(run, source=source, methods=["readout"], settings=scoring(kind))
    there = {name for name in run.products() if name.endswith("curves")}
    assert there == {"faithfulness/curves", "faithfulness/tubes/curves", "faithfulness/frames/curves"}
    assert run.product("faithfulness/frames/curves").sizes["step"] == 3
    with pytest.raises(StoreError, match="other settings"):
        run_faithfulness(run, source=source, methods=["readout"], settings=scoring("tubes", span=1))


def test_curves_of_clips_of_different_length_have_their_own_fractions(ragged, tmp_path):
    run, source = ragged
    shutil.copytree(run.path.parent, tmp_path / "copy")
    run = Run.open(tmp_path / "copy" / "run.zarr")
    settings = scoring("frames")
    run_faithfulness(run, source=source, settings=settings)
    curves, scores = run.product("faithfulness/frames/curves"), run.product("faithfulness/frames/scores")
    assert curves["fraction"].dims == ("sample", "step")
    for i, count in enumerate(cell_counts(run)):
        wanted = PROTOCOL.counts(int(count)) / count
        np.testing.assert_allclose(curves["fraction"].values[i, : wanted.size], wanted)
        assert (curves["fraction"].values[i, wanted.size :] == 1.0).all()
        batch, bound = bound_clips(source, [run.load_sample(i)])
        from foveate.attribution.objective import Objective

        own = run.product("attributions/readout")["map"].values[[i], 0, :count].reshape(1, -1).astype(float)
        direct = score_maps(Objective(source, batch, bound), {"readout": own}, run.grid, settings.scoring)
        mine = curves["curve"].sel({"method": "readout"}).values[i, 0]
        np.testing.assert_allclose(mine[..., : wanted.size], direct.curves[0, 0], atol=2e-6)
        area = np.trapezoid(direct.curves[0, 0].astype(float), wanted, axis=-1)
        got = scores["area"].sel({"method": "readout"}).transpose("sample", "target", ...).values[i, 0]
        np.testing.assert_allclose(got, area, atol=2e-6)


def test_windows_of_one_video_count_once():
    random = np.random.default_rng(0)
    area = random.random((3, 6, 1, 1, 1))
    area[1, 4] = np.nan  # one method lacks a window of video c
    videos = ["a", "a", "b", "c", "c", "c"]
    data = xr.Dataset(
        {
            "area": (("method", "sample", "mode", "baseline", "scale"), area),
            "role": ("method", ["method", "method", "control"]),
            "converged": ("method", np.ones(3)),
        },
        coords={"method": ["x", "y", "random"], "mode": ["deletion"], "baseline": ["mean"], "scale": ["logit"]},
    )
    board = build_leaderboard(data.assign_coords(video=("sample", videos)))
    flat = area[..., 0, 0, 0]
    by_video = np.stack([flat[:, :2].mean(1), flat[:, 2], flat[:, [3, 5]].mean(1)], axis=1)
    assert board.n == 3
    for number, name in enumerate(("x", "y")):
        row = next(row for row in board.rows if row.method == name)
        want = bootstrap_mean(by_video[number] - by_video[2])
        assert row.versus_random.difference == pytest.approx(want)
        assert row.deletion == pytest.approx(by_video[number].mean())
    alone = build_leaderboard(data.assign_coords(video=("sample", list("abcdef"))))
    assert alone.n == build_leaderboard(data).n == 6


def test_one_video_of_many_windows_gives_no_verdict(run, source):
    report = run_faithfulness(run, source=source, settings=scoring("tubes"))
    scores = run.product("faithfulness/tubes/scores")
    one = build_leaderboard(scores.assign_coords(video=("sample", ["same"] * 4)))
    assert one.n == 1
    assert {row.versus_random.verdict for row in one.rows if row.versus_random} == {"no interval"}
    assert report.board.n == 3


def test_units_and_freeze_are_for_clips(tmp_path):
    from foveate.testing.tiny import TinySource, tiny_samples

    for sample in tiny_samples(2):
        Image.fromarray(sample.pixels).save(tmp_path / f"{sample.id}.png")
    source = TinySource()
    run_capture(source, tmp_path, tmp_path / "run.zarr")
    run = Run.open(tmp_path / "run.zarr")
    attribute_run(run, ["readout"], source=source)
    for settings in (scoring("tubes"), scoring()):
        with pytest.raises(UsageError, match="for clips"):
            run_faithfulness(run, source=source, settings=settings)
    assert not [name for name in run.products() if name.startswith("faithfulness")]


# ------------------------------------------------------------------------------------------- tracks


def test_tracks_are_explained_against_their_own_mask(tmp_path):
    source = TrackSource()
    samples = clips(3, frames=8, seed=4)
    for t in range(2, 6):  # a second track that is born and dies
        samples[0].pixels[t, 10:13, 2:5] = (20, 20, 240)
    run = make(tmp_path, source, samples, methods=("saliency_abs", "ablation"))
    product = run.product("attributions/saliency_abs")
    assert product["map"].shape == (3, 2, 2, 4, 4)
    assert product["target_track"].values.tolist() == [["t0", "t2"], ["t1", ""], ["t2", ""]]
    assert product["target_object"].values.tolist() == [[0, 2], [1, -1], [2, -1]]
    assert np.isnan(product["target_box"].values).all()
    report = run_faithfulness(run, source=source, settings=scoring("cells"))
    assert "own_mask" in report.board.beyond
    assert {row.method for row in report.board.controls} >= {"own_mask", "motion", "one_frame"}
    assert "own_box" not in {row.method for row in report.board.rows}
    curves = run.product("faithfulness/curves")
    # The score is the mean over the track's own mask: no order of cells can do better than the mask's.
    deletion = run.product("faithfulness/scores")["area"].sel({"mode": "deletion", "baseline": "mean"})
    assert np.isfinite(curves["curve"].sel({"method": "own_mask"}).values[0]).all()
    assert float(deletion.sel({"method": "own_mask"}).mean()) < float(deletion.sel({"method": "random"}).mean())
    words = " ".join(report.to_text().split())
    assert "Better than the object's own mask, filled evenly" in words
    assert "mass in own mask" in report.to_text()


# ------------------------------------------------------------------------------------- command line


def test_the_command_line_scores_tubes_and_frames(run, source, monkeypatch, tmp_path):
    monkeypatch.setattr(Run, "open_source", lambda self, **_: source)
    runner = CliRunner()
    base = ["faithfulness", str(run.path), "--untrained", "none", "--steps", "2", "--random-orders", "2"]
    dry = runner.invoke(main, [*base, "--unit", "tubes", "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    done = runner.invoke(
        main,
        [
            *base,
            "--unit",
            "tubes",
            "--tube-frames",
            "1",
            "--unit-value",
            "mean",
            "-o",
            str(tmp_path / "t"),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["facts"]["unit"] == "tubes"
    assert said["facts"]["unit_span"] == 1
    assert said["facts"]["unit_value"] == "mean"
    assert said["facts"]["baselines"] == ["mean", "blur"]
    assert (tmp_path / "t" / "leaderboard.md").is_file()
    frames = runner.invoke(main, [*base, "--unit", "frames", "--json"])
    assert frames.exit_code == 0, frames.output
    assert json.loads(frames.stdout)["main_protocol"]["baseline"] == "freeze"
    wrong = runner.invoke(main, [*base, "--unit", "frames", "--tube-frames", "2"])
    assert wrong.exit_code == 2
    made = runner.invoke(main, ["attribute", str(run.path), "-m", "motion", "-m", "one_frame", "--json"])
    assert made.exit_code == 0, made.output
    assert {one["method"] for one in json.loads(made.stdout)["methods"]} == {"motion", "one_frame"}
    cost = estimate_faithfulness(run, source=source, settings=scoring("frames"))
    assert cost.samples == 4


def test_a_clip_without_a_track_has_no_map_and_is_no_error(tmp_path):
    source = TrackSource()
    samples = clips(3, frames=8, seed=4)
    samples[1].pixels[:] = 40  # nothing swims here
    run = make(tmp_path, source, samples, methods=("saliency_abs",))
    product = run.product("attributions/saliency_abs")
    assert product["map"].shape == (3, 1, 2, 4, 4)
    assert np.isnan(product["map"].values[1]).all()
    assert product["target_track"].values[:, 0].tolist() == ["t0", "", "t2"]
    board = run_faithfulness(run, source=source, settings=scoring("frames")).board
    assert board.n == 2
    assert np.isnan(run.product("faithfulness/frames/curves")["curve"].values[1]).all()


def test_a_clip_of_one_frame_is_scored(tmp_path):
    source = ClipSource(frames=1, tubelet=1, seed=3)
    run = make(tmp_path, source, clips(2, frames=1), methods=("readout", "motion"))
    assert (run.product("attributions/motion")["map"].values == 0).all()
    for kind in ("cells", "tubes", "frames"):
        report = run_faithfulness(run, source=source, settings=scoring(kind))
        assert report.board.n == 2
    assert run.product("faithfulness/frames/curves").sizes["step"] == 2
    one, three = (run.product(f"faithfulness/{name}curves")["curve"] for name in ("", "tubes/"))
    np.testing.assert_allclose(one.values, three.values, atol=1e-6)  # of one frame, tubes are cells


def test_default_leaves_out_what_a_model_of_clips_does_not_allow(run, source, monkeypatch):
    from foveate.attribution.attention import Rollout
    from foveate.errors import CaptureError

    def refuse(self, trace, bound):
        raise CaptureError("rollout: an opaque step")

    monkeypatch.setattr(Rollout, "tokens", refuse)
    names = {one.method for one in plan_run(run, ["default"], source=source)}
    assert "rollout" not in names
    assert {"readout", "legrad", "gradcam", "ig"} <= names
    import foveate.study.attribute_plan as plan

    monkeypatch.setattr(plan, "DEFAULT_METHODS", ("rollout", "legrad"))
    report = attribute_run(run, ["default"], source=source)
    assert [one.method for one in report.methods] == ["legrad"]
    assert report.left_out == {"rollout": "rollout: an opaque step"}
    with pytest.raises(CaptureError, match="opaque"):
        attribute_run(run, ["default", "rollout"], source=source)
