"""``foveate motion`` from the outside: videos and masks on disk, words, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from fake_packages import Install
from foveate.cli import main
from foveate.testing.motion_tasks import LABELS, motion_clips

SOURCE = """
@hookimpl
def foveate_sources():
    return [SourceSpec("space-time-tests", "foveate.testing.space_time:SpaceTimeSource", ""),
            SourceSpec("tiny-tests", "foveate.testing.tiny:TinySource", "")]
"""
COUNT = 12


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """A table of clips: folders of frames, masks as arrays, the true class."""
    made = motion_clips("colour", COUNT, 3)
    rows = ["path,mask,label"]
    for i in range(COUNT):
        folder = tmp_path / f"clip-{i}"
        folder.mkdir()
        for t, pixels in enumerate(made.clips[i]):
            Image.fromarray(pixels).save(folder / f"{t}.png")
        np.save(tmp_path / f"mask-{i}.npy", made.masks[i])
        rows.append(f"clip-{i},mask-{i}.npy,{LABELS['colour'][made.labels[i]]}")
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "clips.csv"


def motion(*arguments: str | Path) -> Result:
    source = ("--source", "space-time-tests", "--option", "task=colour")
    return CliRunner().invoke(main, ["motion", "any", *map(str, arguments), *source])


def test_json_file_and_words_agree(install: Install, table: Path, tmp_path: Path) -> None:
    install("space-time", SOURCE)
    out = tmp_path / "deep/out.json"
    said = motion(table, "--json", "-o", out, "--draws", "2", "--truth", "label")
    assert said.exit_code == 0, said.stderr
    told = json.loads(said.stdout)
    assert told.pop("schema_version") == 1
    assert told == json.loads(out.read_text())
    assert (told["n"], told["failed"], told["masks"]) == (COUNT, {}, {"given": COUNT})
    assert told["removal"]["draws"] == 2
    assert told["target"]["truth"] == "label"
    assert told["scales"][0]["coalitions"]["both"]["estimate"] > 0.95
    words = motion(table, "--draws", "2", "--truth", "label")
    assert words.exit_code == 0, words.stderr
    assert words.stdout.startswith(f"motion-colour: {told['verdict']}")
    assert f"({COUNT} videos, probability)" in words.stdout
    for sentence in told["caveats"]:
        assert sentence in words.stdout


def test_a_bad_clip_is_named_with_exit_code_5(install: Install, table: Path, tmp_path: Path) -> None:
    install("space-time", SOURCE)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    with table.open("a") as file:
        file.write("broken.mp4,,red\n")
    said = motion(table, "--json", "--no-edges", "--draws", "1")
    assert said.exit_code == 5
    told = json.loads(said.stdout)
    assert list(told["failed"]) == ["broken.mp4"]
    assert told["clips"] == COUNT
    assert "failed: broken.mp4" in said.stderr


def test_dry_run_says_the_cost(install: Install, table: Path) -> None:
    install("space-time", SOURCE)
    said = motion(table, "--dry-run", "--json", "--at-most", "5", "--draws", "2")
    assert said.exit_code == 0, said.stderr
    told = json.loads(said.stdout)
    assert told["clips"] == 5
    assert told["forwards"] == 5 * told["forwards_per_clip"]


def test_wrong_uses_are_usage_errors(install: Install, table: Path) -> None:
    install("space-time", SOURCE)
    assert motion().exit_code == 2
    assert motion(table, "--target", "red", "--truth", "label").exit_code == 2
    assert motion(table, "--margin", "0.9").exit_code == 2
    assert motion(table, "--target", "green").exit_code == 2
    image_model = CliRunner().invoke(main, ["motion", "any", str(table), "--source", "tiny-tests"])
    assert image_model.exit_code == 2
    assert "reads images" in image_model.stderr


def test_a_run_brings_its_model_and_its_clips(install: Install, table: Path, tmp_path: Path) -> None:
    install("space-time", SOURCE)
    run, options = tmp_path / "run.zarr", ("--source", "space-time-tests", "--option", "task=colour")
    captured = CliRunner().invoke(main, ["capture", "any", str(table), "-o", str(run), *options])
    assert captured.exit_code == 0, captured.output
    said = CliRunner().invoke(main, ["motion", str(run), "--json", "--draws", "2", "--no-edges"])
    assert said.exit_code == 0, said.output
    told, direct = (
        json.loads(said.stdout),
        json.loads(motion(table, "--json", "--draws", "2", "--no-edges").stdout),
    )
    assert told["masks"] == {"given": COUNT}
    assert told["scales"] == direct["scales"]


def test_the_figure_says_what_was_found(install: Install, table: Path, tmp_path: Path) -> None:
    install("space-time", SOURCE)
    picture = tmp_path / "cues.png"
    said = motion(table, "--json", "--no-edges", "--draws", "1", "--figure", picture)
    assert said.exit_code == 0, said.stderr
    with Image.open(picture) as image:
        words = str(image.text["Description"])
    told = json.loads(said.stdout)
    assert told["model"] in words
    assert "margin 0.1" in words
    assert "appearance neutral" in words
