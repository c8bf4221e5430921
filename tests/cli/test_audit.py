"""``foveate audit`` from outside: text, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from foveate.cli import main

TABLE = """mean = 95.2 patches out of 256 total

| Metric | Mean | Std | Min | Max |
|---|---|---|---|---|
| Attention Entropy | 4.53 | 0.31 | 3.12 | {most} |
"""


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "study.md"
    path.write_text(TABLE.format(most="5.89"))
    return path


def test_impossible_ends_with_6_and_says_why(document: Path) -> None:
    result = CliRunner().invoke(main, ["audit", str(document)])
    assert result.exit_code == 6
    assert "K = 256, as stated: IMPOSSIBLE" in result.stdout
    assert "5.89 > 5.5452; H <= ln 256" in result.stdout
    assert "24 x 24" in result.stdout


def test_another_grid_can_save_it(document: Path) -> None:
    result = CliRunner().invoke(main, ["audit", str(document), "--tokens", "576"])
    assert result.exit_code == 0
    assert "nothing impossible" in result.stdout


def test_json(document: Path) -> None:
    result = CliRunner().invoke(main, ["audit", str(document), "--json", "--tokens", "256", "--tokens", "576"])
    assert result.exit_code == 0  # possible on one of the two
    payload = json.loads(result.stdout)
    assert (payload["schema_version"], payload["possible"]) == (1, True)
    (table,) = payload["tables"]
    assert [(v["tokens"], v["possible"]) for v in table["verdicts"]] == [(256, False), (576, True)]
    assert table["verdicts"][0]["findings"][0]["formula"] == "H <= ln 256"


def test_possible_table_and_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "fine.md"
    path.write_text(TABLE.format(most="5.39"))
    assert CliRunner().invoke(main, ["audit", str(path)]).exit_code == 0
    missing = CliRunner().invoke(main, ["audit", str(tmp_path / "none.csv")])
    assert missing.exit_code == 2
    assert "remedy" in missing.stderr
