"""``foveate metrics`` from outside."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from PIL import Image

from foveate.cli import main
from foveate.metrics.study import COLUMNS
from foveate.study.capture import run_capture
from foveate.testing.tiny import TinySource


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    run_capture(TinySource(), folder, folder / "run.zarr")
    return folder / "run.zarr"


def test_list_needs_no_run() -> None:
    text = CliRunner().invoke(main, ["metrics", "--list"])
    assert text.exit_code == 0
    assert "entropy_normalised" in text.stdout
    listed = json.loads(CliRunner().invoke(main, ["metrics", "--list", "--json"]).stdout)
    assert {"gini", "attention_entropy"} <= {row["name"] for row in listed["metrics"]}


def test_measure_prints_a_summary_over_images(run: Path) -> None:
    names = ["--metric", "entropy_normalised", "--metric", "received_mass"]
    result = CliRunner().invoke(main, ["metrics", str(run), *names])
    assert result.exit_code == 0, result.output
    assert "entropy_normalised" in result.stdout
    assert "received_mass" not in result.stdout  # its mean over keys is a constant
    assert "2 products" in result.stderr
    payload = json.loads(CliRunner().invoke(main, ["metrics", str(run), *names, "--json"]).stdout)
    (line,) = payload["summary"]
    assert (line["n"], line["uniform"]) == (4, pytest.approx(1.0))
    assert line["low"] <= line["mean"] <= line["high"] < 1
    assert {item["metric"] for item in payload["written"]} == {"entropy_normalised", "received_mass"}


def test_tables(run: Path, tmp_path: Path) -> None:
    csv, wide = tmp_path / "stats.csv", tmp_path / "wide.csv"
    result = CliRunner().invoke(main, ["metrics", str(run), "--csv", str(csv), "--wide", str(wide), "--json"])
    assert result.exit_code == 0, result.output
    assert [entry["K"] for entry in json.loads(result.stdout)["tables"]] == [16, 16]
    assert tuple(pd.read_csv(csv).columns) == COLUMNS
    assert "gini" in pd.read_csv(wide).columns
    assert CliRunner().invoke(main, ["audit", str(csv)]).exit_code == 0


def test_usage_errors(run: Path, tmp_path: Path) -> None:
    for arguments, code in (
        ([], 2),
        ([str(tmp_path / "none.zarr")], 4),
        ([str(run), "--metric", "entropie"], 2),
        ([str(run), "--csv", str(tmp_path / "x.txt")], 2),
    ):
        result = CliRunner().invoke(main, ["metrics", *arguments])
        assert result.exit_code == code, (arguments, result.output)
        assert "remedy" in result.stderr or "expected" in result.stderr


def test_a_run_without_captured_images_is_an_error(run: Path, tmp_path: Path) -> None:
    import shutil

    import zarr

    empty = tmp_path / "empty.zarr"
    shutil.copytree(run, empty)
    zarr.open_group(empty, mode="r+")["samples/status"][:] = 0  # type: ignore[index]
    for arguments in (["--metric", "gini"], ["--csv", str(tmp_path / "none.csv")]):
        result = CliRunner().invoke(main, ["metrics", str(empty), *arguments])
        assert result.exit_code == 4, result.output
        assert "no captured sample of 4" in result.stderr
        assert "continues" in result.stderr
    assert not (tmp_path / "none.csv").exists()
