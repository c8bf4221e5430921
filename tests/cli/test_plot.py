from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from foveate.cli import main
from run_fakes import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("plot"), count=2).path


def test_list_names_the_kinds() -> None:
    result = CliRunner().invoke(main, ["plot", "--list", "--json"])
    told = json.loads(result.stdout)
    assert {"triptych", "grid", "matrix", "distributions", "methods"} <= {kind["name"] for kind in told["kinds"]}
    assert "triptych" in CliRunner().invoke(main, ["plot", "--list"]).stdout


def test_draws_what_was_asked_for(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "p.svg"
    arguments = ["plot", str(run), "--sample", "1", "--layer", "0", "--head", "1", "-o", str(out)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() == str(out)
    assert "head 1 of 3" in out.read_text(encoding="utf-8")
    result = CliRunner().invoke(main, ["plot", str(run), "--kind", "matrix", "-o", str(out), "--json"])
    assert json.loads(result.stdout)["bytes"] == out.stat().st_size


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--kind", "hologram"], 2),
        (["--head", "x"], 2),
        (["--method", "a", "--method", "b"], 2),
        (["--count", "3"], 2),  # not an option of a triptych
        (["--kind", "distributions"], 2),
    ],
)
def test_bad_requests_end_with_their_code(run: Path, tmp_path: Path, arguments: list[str], code: int) -> None:
    start = ["plot", str(run), "-o", str(tmp_path / "p.png")] if arguments else ["plot"]
    assert CliRunner().invoke(main, [*start, *arguments]).exit_code == code


def test_no_run_there(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["plot", str(tmp_path / "absent.zarr")]).exit_code == 4
