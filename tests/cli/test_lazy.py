"""Help and lists must be instant: measured by what gets imported, which no slow machine can blur."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from foveate.cli import VERBS

HEAVY = ("torch", "numpy", "pandas", "xarray", "zarr", "matplotlib", "scipy", "transformers", "captum", "PIL")
COMMANDS = [
    ["--help"],
    ["--version"],
    ["plugins"],
    ["plugins", "--json"],
    ["plugins", "--load"],
    ["models"],
    ["models", "--json"],
    ["models", "--families"],
    *([verb, "--help"] for verb in VERBS if find_spec(f"foveate.cli.{verb}")),
]
RUN = """
import json, sys
from foveate.cli import main
try:
    main(sys.argv[1:], prog_name="foveate")
finally:
    print(json.dumps([name for name in {heavy!r} if name in sys.modules]), file=sys.stderr)
"""
GREEDY = (
    "import numpy\nfrom foveate.plugins.hooks import hookimpl\n@hookimpl\ndef foveate_metrics():\n    return []\n"
)


def imported_by(arguments: list[str], *, path: Path | None = None, **environment: str) -> list[str]:
    """Heavy packages in ``sys.modules`` after a command has run in a fresh interpreter."""
    done = run_main(arguments, path=path, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    return list(json.loads(done.stderr.splitlines()[-1]))


def run_main(
    arguments: list[str], *, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FOVEATE_")}
    if path is not None:
        inherited["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", RUN.format(heavy=HEAVY), *arguments],
        capture_output=True,
        text=True,
        env=inherited | environment,
        timeout=60,
    )


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_nothing_heavy_is_imported(arguments: list[str]) -> None:
    # Third parties that a developer has installed are not on trial here.
    assert imported_by(arguments, FOVEATE_PLUGINS="") == []


def test_this_test_can_fail(tmp_path: Path) -> None:
    """A plugin that imports numpy when registering is seen by the very same measurement."""
    info = tmp_path / "greedy-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text("[foveate]\ngreedy = greedy_plugin\n")
    (tmp_path / "greedy_plugin.py").write_text(GREEDY)
    assert imported_by(["plugins", "--load"], path=tmp_path) == ["numpy"]
    assert imported_by(["plugins"], path=tmp_path) == [], "listing imports nothing of it"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, foveate; print([n for n in {HEAVY!r} if n in sys.modules])"
    code += f"; foveate.hookimpl, foveate.MetricSpec; print([n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_completion_knows_the_verbs_and_imports_nothing_heavy() -> None:
    found = run_main([], _FOVEATE_COMPLETE="bash_complete", COMP_WORDS="foveate do", COMP_CWORD="1")
    assert found.stdout.split() == ["plain,doctor"]
    assert json.loads(found.stderr.splitlines()[-1]) == []
