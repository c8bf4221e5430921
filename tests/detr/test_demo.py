"""The detection demonstration from end to end, small; its precision against the training script's own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("transformers")

from foveate.cli import main
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.errors import UsageError
from foveate.study.capture import run_capture
from foveate.study.demo_detr import METHODS, MODEL, most_objects, precision, run_detector_demo
from foveate.testing.shapes import scenes, write_dataset


@pytest.mark.slow
def test_demo_tells_the_whole_story(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "detr", "-o", str(out), "--images", "4", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["captured"] == 4
    assert told["precision"] > 0.75
    assert all((tmp_path / path).is_file() for path in told["files"])
    methods = {row["method"]: row["role"] for row in told["leaderboard"]["rows"]}
    assert methods["own_box"] == "control"
    assert {name for name, role in methods.items() if role != "control"} == set(METHODS)
    assert any(name.endswith("@untrained") for name in methods)
    assert not validate(out / "shapes-cdetr.zarr")

    again = run_detector_demo(out, images=4, steps=2, say=lambda _: None)  # nothing is computed twice
    assert again.seconds["attribute"] < told["seconds"]["attribute"]
    assert again.precision == told["precision"]


def test_one_picture_is_no_statistics(tmp_path):
    with pytest.raises(UsageError, match="at least 2"):
        run_detector_demo(tmp_path / "demo", images=1)
    assert not (tmp_path / "demo").exists()


def test_a_subject_that_is_a_model_is_refused():
    result = CliRunner().invoke(main, ["demo", "detr", "--model", "foveate/rim-vit"])
    assert result.exit_code == 2
    assert "--model" in result.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from foveate.plugins.opening import open_source

    folder = tmp_path_factory.mktemp("shapes")
    manifest = write_dataset(folder / "pictures", 8, seed=31)
    run_capture(open_source(MODEL), manifest, folder / "run.zarr", reference=MODEL, top=10, batch_size=8)
    return Run.open(folder / "run.zarr"), manifest.with_name("objects.json")


def test_precision_falls_when_the_truth_is_another(run, tmp_path):
    captured, truth = run
    assert precision(captured, truth) > 0.9
    known = json.loads(truth.read_text())
    for objects in known["images"].values():
        for one in objects:
            one["box"] = [edge + 40.0 for edge in one["box"]]
    (tmp_path / "moved.json").write_text(json.dumps(known))
    assert precision(captured, tmp_path / "moved.json") < 0.1


def test_the_picture_with_most_objects_is_drawn(run):
    captured, _ = run
    found = (captured.predictions["score"].values > 0.5).sum(1)
    assert found[most_objects(captured)] == found.max()
    true = [len(drawn) for drawn in scenes(8, seed=31)]
    assert np.mean(np.abs(found - true)) < 0.5
