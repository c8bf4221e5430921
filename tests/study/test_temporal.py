"""Analyses over time on the small segmenter of clips, against slow sums of what the run holds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.study.detection import Finding, Report
from foveate.study.temporal import ANALYSES, analyse_clips, by_video, video_line
from foveate.study.temporal_frames import SiteMass, _cross
from foveate.study.temporal_subject import ClipSubject
from foveate.temporal.frame_mass import horizon, past_share
from temporal_runs import capture


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture(tmp_path_factory.mktemp("swim"))


@pytest.fixture(scope="module")
def subject(path: Path) -> ClipSubject:
    return ClipSubject(Run.open(path))


@pytest.fixture(scope="module")
def frames(subject: ClipSubject) -> Report:
    return analyse_clips(subject, ["frames"])


def test_mass_between_frames_is_the_sum_over_pairs_of_cells(frames: Report, path: Path) -> None:
    run = Run.open(path)
    stored = run.product("temporal/frames/encoder.self")
    for i, count in ((0, 6), (1, 6)):
        rows = run.site("encoder.self")["attention"].isel(sample=i, layer=1, head=2).values.astype(np.float64)
        query, key = (run.tokens("encoder.self", axis, i) for axis in ("query", "key"))
        expected = np.zeros((count, count))
        for q in range(len(query)):
            for k in range(len(key)):
                expected[query.frame[q], key.frame[k]] += rows[q, k]
        queries = np.array([(query.frame == t).sum() for t in range(count)])
        np.testing.assert_allclose(
            stored["mass"].values[i, 1, 2, :count, :count], expected / queries[:, None], rtol=1e-5
        )
        np.testing.assert_allclose(stored["even"].values[i, 1, 2, :count, :count], 1 / count, rtol=1e-6)
        share = expected / expected.sum(1, keepdims=True)
        apart = np.abs(np.subtract.outer(np.arange(count), np.arange(count)))
        horizon = float((share * apart).sum(1).mean())
        assert float(stored["horizon"].values[i, 1, 2]) == pytest.approx(horizon, rel=1e-5)
        cross = float((1 - np.diag(share)).mean())
        assert float(stored["cross"].values[i, 1, 2]) == pytest.approx(cross, rel=1e-5)
        line = frames.values.query("quantity == 'mass on other frames' and layer == 1")
        assert line["baseline"].tolist()[i] == pytest.approx(1 - 1 / count)
        heads = stored["cross"].values[i, 1].mean()
        assert line["value"].tolist()[i] == pytest.approx(heads, rel=1e-5)


def test_rows_of_no_frame_give_their_mass_on_each(frames: Report, path: Path) -> None:
    run = Run.open(path)
    stored = run.product("temporal/frames/decoder.cross")
    assert stored["mass"].dims == ("sample", "layer", "head", "key_frame")
    key = run.tokens("decoder.cross", "key", 1)
    rows = run.site("decoder.cross")["attention"].isel(sample=1, layer=2, head=1).values.astype(np.float64)
    expected = [rows[:, key.frame == t].sum(1).mean() for t in range(6)]
    np.testing.assert_allclose(stored["mass"].values[1, 2, 1], expected, rtol=1e-5)
    share = stored["mass"].values[1, 2].astype(np.float64)
    share /= share.sum(1, keepdims=True)
    reached = np.exp(-(share * np.log(share)).sum(1)).mean()
    value = frames.values.query("site == 'decoder.cross' and layer == 2")["value"].tolist()[1]
    assert value == pytest.approx(reached, rel=1e-5)


def test_sharpened_rows_are_not_even(path: Path, frames: Report) -> None:
    lift = Run.open(path).product("temporal/frames/encoder.self")["lift"].values
    assert np.nanmax(lift) > 1.2


def test_sites_without_frames_are_refused_with_the_reason(frames: Report) -> None:
    assert frames.left_out == {"frames, decoder.self": "decoder.self: its keys belong to no frame"}


def test_windows_of_one_video_count_once() -> None:
    rng = np.random.default_rng(0)
    values, base = rng.random(6), rng.random(6)
    values[2], base[4] = np.nan, np.nan
    finding = Finding("q", "u", values, base)
    pooled = by_video(finding, ["a", "b", "a", "b", "b", "c"])
    np.testing.assert_allclose(pooled.values, [values[0], values[[1, 3]].mean(), values[5]])
    np.testing.assert_allclose(pooled.baseline, [base[0], base[[1, 3]].mean(), base[5]])
    assert video_line("x", finding, ["a", "b", "a", "b", "b", "c"]).n == 3


@pytest.mark.parametrize(("videos", "verdict"), [(7, "untested"), (8, "above")])
def test_few_videos_get_no_verdict(videos: int, verdict: str) -> None:
    values = 2.0 + np.random.default_rng(1).random(videos)
    line = video_line("x", Finding("q", "u", values, 1.0, "even"), [str(i) for i in range(videos)])
    assert line.verdict == verdict


def test_shorter_clips_are_measured_on_their_own_frames() -> None:
    """A clip of 4 frames beside one of 6 has the numbers that it has alone."""
    rng = np.random.default_rng(2)
    mass = np.full((2, 1, 1, 6, 6), np.nan)
    mass[0, 0, 0], mass[1, 0, 0, :4, :4] = rng.dirichlet(np.ones(6), 6), rng.dirichlet(np.ones(4), 4)
    shape = (2, 1, 1, 6)
    both = SiteMass(mass, mass, np.zeros(shape), np.zeros(shape), False, [0], [0], [6, 4])
    for number in (horizon, past_share, _cross):
        found = both.each(number, "mass")[1]
        np.testing.assert_allclose(found, number(mass[1:, ..., :4, :4])[0])
        assert np.isfinite(found).all()
    np.testing.assert_allclose(both.lift[0], 1.0)


def test_runs_that_have_no_time_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "frame_cells", lambda run, i: np.zeros(2, np.int64))
    with pytest.raises(UsageError, match="every clip is one frame"):
        ClipSubject(Run.open(path))
    monkeypatch.setattr(Run, "media", "image")
    with pytest.raises(UsageError, match="a run of images has no frames"):
        ClipSubject(Run.open(path))


def test_unknown_analysis_names_those_there_are(subject: ClipSubject) -> None:
    with pytest.raises(UsageError, match="of clips"):
        analyse_clips(subject, ["heads"])


def test_the_command_chooses_by_what_the_run_holds(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(main, ["analyse", str(path), "--analysis", "frames", "--json", "-o", str(out)])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert {line["analysis"] for line in told["lines"]} == {"frames"}
    assert all(line["verdict"] == "untested" for line in told["lines"])  # three videos
    assert {Path(file).name for file in told["files"]} >= {"lines.csv", "values.csv", "frames_encoder.self.png"}
    assert all(Path(file).stat().st_size for file in told["files"])
    listed = json.loads(CliRunner().invoke(main, ["analyse", "--list", "--json"]).stdout)["analyses"]
    assert {entry["name"] for entry in listed if entry["of"] == "clips"} == set(ANALYSES)
    wrong = CliRunner().invoke(main, ["analyse", str(path), "--truth", str(path / "zarr.json")])
    assert wrong.exit_code == 2
    assert "--truth is for runs of images" in wrong.output
