from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fake_packages import Install
from foveate.cli import main
from foveate.plugins.registry import models, registry

USER = """schema = 1
[[family]]
id = "mine"
source = "vit"
model_types = ["a", "b"]
[[model]]
id = "me/mine"
family = "mine"
licence = "MIT"
provenance = "made for a test"
"""


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install: Install) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(USER)
    monkeypatch.setenv("FOVEATE_REGISTRY", str(path))
    registry.cache_clear()
    return path


def test_lists_every_model(user: Path) -> None:
    told = json.loads(CliRunner().invoke(main, ["models", "--json"]).stdout)
    assert [row["model"] for row in told["models"]] == list(models())
    assert told["models"][-1] == {
        "model": "me/mine",
        "family": "mine",
        "source": "vit",
        "licence": "MIT",
        "weights": "hub or folder",
        "owner": "user",
    }


def test_filters_by_family_and_lists_families(user: Path) -> None:
    text = CliRunner().invoke(main, ["models", "--family", "mine"]).stdout
    assert text.splitlines()[1].split() == ["me/mine", "mine", "vit", "MIT", "hub", "or", "folder", "user"]
    assert len(text.splitlines()) == 2
    text = CliRunner().invoke(main, ["models", "--families"]).stdout
    assert "a, b" in text


def test_problems_go_to_stderr(user: Path) -> None:
    user.write_text(USER + "colour = 'red'\n")
    registry.cache_clear()
    result = CliRunner().invoke(main, ["models", "--json"])
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert "warning: user: model 'me/mine': unknown key 'colour'" in result.stderr
