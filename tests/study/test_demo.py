"""The demonstration from end to end, small: every file it names exists and every number can be read back."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from foveate.cli import main
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.errors import UsageError
from foveate.study.attribute_plan import DEFAULT_METHODS
from foveate.study.demo import run_demo
from foveate.study.story import PHOTOS


@pytest.mark.slow
def test_demo_tells_the_whole_story(tmp_path):
    out = tmp_path / "demo"
    result = CliRunner().invoke(main, ["demo", "-o", str(out), "--images", "6", "--steps", "2", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["captured"] == 6
    assert told["photos"] == len(PHOTOS)
    assert told["accuracy"] > 0.5
    assert all((tmp_path / path).is_file() for path in told["files"])
    assert {path.rpartition(".")[2] for path in told["files"]} >= {"csv", "json", "md", "png", "txt"}
    run = Run.open(out / "rim-vit.zarr")
    assert {f"attributions/{name}" for name in DEFAULT_METHODS} <= set(run.products())
    assert not validate(out / "rim-vit.zarr")
    assert not validate(out / "photos.zarr")

    lines = []
    again = run_demo(out, images=6, steps=2, say=lines.append)  # nothing is computed twice
    assert again.captured == 6
    assert again.seconds["attribute"] < told["seconds"]["attribute"]


def test_one_picture_is_no_statistics(tmp_path):
    with pytest.raises(UsageError, match="at least 2"):
        run_demo(tmp_path / "demo", images=1)
    assert not (tmp_path / "demo").exists()
