from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fake_packages import Install
from foveate.cli import main
from foveate.cli.inspect import _ranges

TINY = """
@hookimpl
def foveate_sources():
    return [SourceSpec("tiny-tests", "foveate.testing.tiny:TinySource", ""),
            SourceSpec("crop-tests", "foveate.testing.tiny:TinyCropSource", "")]
"""


def test_says_what_the_model_is(install: Install) -> None:
    install("tiny", TINY)
    arguments = [
        "inspect",
        "any",
        "--source",
        "tiny-tests",
        "--option",
        "layers=3",
        "--option",
        "image=48",
        "--json",
    ]
    told = json.loads(CliRunner().invoke(main, arguments).stdout)
    assert told["schema_version"] == 1
    assert told["input"] == [3, 48, 48]
    assert told["grid"] == [6, 6]
    assert told["targets"] == ["class"]
    assert told["facts"]["layers"] == 3
    (site,) = told["sites"]
    assert site["layers"] == [0, 1, 2]
    assert site["key"] == {"cls": 1, "patch": 36}
    assert site["readout"] == "cls"


def test_prints_it_and_the_crop(install: Install) -> None:
    install("tiny", TINY)
    text = CliRunner().invoke(main, ["inspect", "any", "--source", "crop-tests"]).stdout
    # 192 x 256 becomes 32 x 42, of which 32 x 32 are kept.
    assert "76% of a 4:3 picture reaches the model" in text
    assert "17 (1 cls + 16 patch)" in text


def test_an_unknown_model_is_usage(install: Install) -> None:
    result = CliRunner().invoke(main, ["inspect", "no such model"])
    assert result.exit_code == 2
    assert "not in the registry" in result.stderr


def test_a_bad_device_is_usage(install: Install) -> None:
    install("tiny", TINY)
    result = CliRunner().invoke(main, ["inspect", "any", "--source", "tiny-tests", "--device", "toaster"])
    assert result.exit_code == 2
    assert "remedy: --device cpu" in result.stderr


@pytest.mark.parametrize(
    ("layers", "said"), [([], ""), ([4], "4"), ([0, 1, 2], "0-2"), ([0, 1, 5, 7, 8], "0-1, 5, 7-8")]
)
def test_ranges(layers: list[int], said: str) -> None:
    assert _ranges(layers) == said
