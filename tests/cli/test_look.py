from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from fake_packages import Install
from foveate.cli import main
from foveate.testing.synthetic import rim_discs

TINY = """
@hookimpl
def foveate_sources():
    return [SourceSpec("tiny-tests", "foveate.testing.tiny:TinySource", "")]
"""


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(rim_discs(1, seed=4).images[0]).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_json_and_figure(install: Install, photo: Path, tmp_path: Path) -> None:
    install("tiny", TINY)
    out = tmp_path / "out.svg"
    result = CliRunner().invoke(
        main, ["look", "any", str(photo), "--source", "tiny-tests", "-o", str(out), "--json"]
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["schema_version"] == 1
    assert told["out"] == str(out)
    assert told["predictions"][0]["label"] in out.read_text(encoding="utf-8")
    assert told["caveats"]


def test_text_options_and_errors(install: Install, photo: Path, tmp_path: Path) -> None:
    install("tiny", TINY)
    start = ["look", "any", str(photo), "--source", "tiny-tests", "-o", str(tmp_path / "o.png"), "--no-check"]
    result = CliRunner().invoke(main, [*start, "--layer", "0", "--head", "1"])
    assert result.exit_code == 0, result.stderr
    assert "layer 0 of 0–1, head 1 of 3" in result.stdout
    assert result.stdout.splitlines()[-1] == str(tmp_path / "o.png")
    assert CliRunner().invoke(main, [*start, "--head", "x"]).exit_code == 2
    assert CliRunner().invoke(main, [*start, "--layer", "7"]).exit_code == 2
    assert CliRunner().invoke(main, [*start[:-3], "-o", str(tmp_path / "o.bmp")]).exit_code == 2
    (tmp_path / "text.jpg").write_text("not a picture")
    assert CliRunner().invoke(main, ["look", "any", str(tmp_path / "text.jpg"), *start[3:]]).exit_code == 5


def test_the_shipped_model_finds_the_disc(photo: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    data = rim_discs(1, seed=4)
    arguments = ["look", "foveate/rim-vit", str(photo), "-o", str(tmp_path / "o.png"), "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["predictions"][0]["class_index"] == data.labels[0]
    y, x = (int(place) for place in told["maps"]["attention"]["peak"])
    assert data.masks[0, y - 4 : y + 4, x - 4 : x + 4].any()
    assert told["deletion"]["row"] < told["deletion"]["random"]


def test_a_video_given_to_a_model_of_images(install: Install, tmp_path: Path) -> None:
    install("tiny", TINY)
    (tmp_path / "reef.MP4").write_bytes(b"\x00\x00\x00 ftypisom")
    result = CliRunner().invoke(main, ["look", "any", str(tmp_path / "reef.MP4"), "--source", "tiny-tests"])
    assert result.exit_code == 5
    assert "a video, but this model takes images" in result.stderr
    assert "choose a model of clips" in result.stderr
