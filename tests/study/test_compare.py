"""Comparing runs end to end: capture two models with different grids and crops, and read what is said."""

import csv
import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.study.capture import run_capture
from foveate.study.compare import compare_runs, match
from foveate.study.compare_maps import attribution_maps, readout_maps
from foveate.study.plan import build_plan
from foveate.testing.tiny import TinyConfig, TinyCropSource, TinySource, tiny_samples

N = 8


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for sample in tiny_samples(N, height=40, width=64, seed=3):
        Image.fromarray(sample.pixels).save(folder / f"{sample.id}.png")
    return folder


def capture(source, images, out, **plan):
    run_capture(source, images, out, plan=build_plan(source, **plan))
    return Run.open(out)


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    a = capture(TinySource(), images, folder / "a.zarr")
    b = capture(TinyCropSource(TinyConfig(patch=4)), images, folder / "b.zarr")
    return a, b


def test_matched_by_hash_whatever_the_names(runs, images, tmp_path):
    for number, path in enumerate(sorted(images.iterdir())[2:]):
        (tmp_path / f"renamed-{9 - number}.png").write_bytes(path.read_bytes())
    other = capture(TinySource(), tmp_path, tmp_path / "other.zarr")
    matched = match(runs[0], other)
    assert (len(matched), matched.only_a, matched.only_b) == (N - 2, 2, 0)
    hashes = [run.samples["sha256"].values[list(p)] for run, p in ((runs[0], matched.a), (other, matched.b))]
    np.testing.assert_array_equal(*hashes)


def test_the_row_that_is_read_is_the_stored_one(runs):
    a, _ = runs
    maps = readout_maps(a, range(N))
    site = a.site(a.site_ids[0])
    stored = site["attention"].values[:, -1].astype(float).mean(axis=1)[:, 0]  # last layer, mean of heads, CLS
    np.testing.assert_allclose(maps.values.reshape(N, -1), stored[:, 1:], atol=1e-12)
    np.testing.assert_allclose(maps.unplaced, stored[:, 0])
    assert maps.rule.layer == "last layer"


def test_two_models_are_compared_on_the_coarser_grid(runs):
    report = compare_runs(*runs)
    assert report.result.reasons == ()
    meeting = report.result.meeting
    assert (meeting.coarser, meeting.shape) == ("a", (4, 4))
    assert meeting.shared.mean() == pytest.approx(40 / 64, abs=0.01)
    assert np.all(meeting.lost_a > 0)
    words = " ".join(report.to_text().split())
    assert f"{N} images in both runs" in words
    assert "Mass lost outside: A" in words
    assert "CLS, registers" in words


def test_a_run_agrees_fully_with_itself_and_an_earlier_layer_does_not(runs):
    a, _ = runs
    own = compare_runs(a, a).result.measures["spearman"]
    assert own.own.estimate == pytest.approx(1.0)
    assert own.verdict == "beyond chance"
    first = compare_runs(a, a, layer=-2)
    assert first.result.rule.layer == "1 layers before the last"
    with pytest.raises(UsageError, match="not kept"):
        compare_runs(a, a, layer=7)


def test_layers_are_counted_from_the_models_end_not_from_what_was_kept(runs, images, tmp_path):
    early = capture(TinySource(), images, tmp_path / "early.zarr", layers="0")
    with pytest.raises(UsageError, match="layer -1 was not kept"):
        compare_runs(runs[0], early)
    assert compare_runs(early, early, layer=0).result.rule.layer == "1 layers before the last"


def test_full_rows_and_head_means_give_the_same_comparison(runs, images, tmp_path):
    full = capture(TinySource(), images, tmp_path / "full.zarr", rows="all", heads="mean")
    np.testing.assert_allclose(readout_maps(full, [0]).values, readout_maps(runs[0], [0]).values, atol=2e-4)


def test_topk_has_no_mean_over_heads():
    with pytest.raises(UsageError, match="topk"):
        build_plan(TinySource(), heads="mean", reductions=("entropy", "topk"))


def test_nothing_in_common_is_an_error_that_says_so(runs, tmp_path):
    for sample in tiny_samples(2, seed=99):
        Image.fromarray(sample.pixels).save(tmp_path / f"other-{sample.id}.png")
    other = capture(TinySource(), tmp_path, tmp_path / "other.zarr")
    with pytest.raises(UsageError, match="no image is in both runs"):
        compare_runs(runs[0], other)


def test_an_attribution_that_was_not_run_names_the_command(runs):
    with pytest.raises(UsageError, match=r"no attribution 'rollout'") as failure:
        compare_runs(*runs, method="rollout")
    assert "foveate attribute" in str(failure.value)


def with_maps(run, values, *, labels=None, converged=None, **attrs):
    """Store maps as `foveate attribute` does."""
    import xarray as xr

    n = len(run)
    data = xr.Dataset(
        {
            "map": (("sample", "target", "y", "x"), values[:, None].astype(np.float32)),
            "converged": (
                ("sample", "target"),
                np.ones((n, 1), bool) if converged is None else converged[:, None],
            ),
            "target_label": (("sample", "target"), np.array(labels or ["red"] * n, object)[:, None]),
        }
    )
    run.write_product("attributions/ig", data, {"target_kind": "class", "scale": "logit", "signed": True, **attrs})


def test_attributions_need_the_same_target_and_settings(runs):
    rng = np.random.default_rng(0)
    a, b = runs
    with_maps(a, rng.normal(size=(N, 4, 4)), options={"n_steps": 32})
    with_maps(b, rng.normal(size=(N, 8, 8)), options={"n_steps": 32}, labels=["red"] * (N - 1) + ["blue"])
    report = compare_runs(a, b, method="ig")
    assert len(report.result.kept) == N - 1
    assert "different answers" in report.to_text()
    assert report.shapes == ()
    with_maps(b, rng.normal(size=(N, 8, 8)), options={"n_steps": 64})
    refused = compare_runs(a, b, method="ig")
    assert refused.result.measures == {}
    assert "option n_steps is 32 and 64" in refused.to_text()


def test_maps_that_did_not_converge_are_left_out(runs):
    a, _ = runs
    fine = np.arange(N) != 2
    with_maps(a, np.random.default_rng(0).normal(size=(N, 4, 4)), converged=fine)
    assert np.isnan(attribution_maps(a, range(N), "ig").values[2]).all()
    assert compare_runs(a, a, method="ig").result.kept == tuple(np.flatnonzero(fine))


def test_command_writes_files_and_prints_json(runs, tmp_path):
    paths = [str(run.path) for run in runs]
    shown = CliRunner().invoke(main, ["compare", *paths, "-o", str(tmp_path), "--figure", "svg"])
    assert shown.exit_code == 0, shown.output
    assert "spearman" in shown.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"compare.txt", "compare.csv", "compare.json", "side_by_side.svg"}
    assert len(list(csv.DictReader((tmp_path / "compare.csv").open()))) == N
    printed = CliRunner().invoke(main, ["compare", *paths, "--json"])
    data = json.loads(printed.stdout)
    assert data["schema_version"] == 1
    assert data["matched"] == N
    saved = json.loads((tmp_path / "compare.json").read_text())
    assert saved["measures"] == data["measures"]
    assert "median agreement" in (tmp_path / "side_by_side.svg").read_text()
