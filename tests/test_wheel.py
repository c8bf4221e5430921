"""The wheel, installed where nothing of the repository can help it, finds its registry, plugins and weights."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ASSETS = ROOT / "core/foveate/assets"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as ``pip wheel`` makes it, in the build environment that is there."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    run(*pip, cwd=folder)
    (built,) = folder.glob("foveate-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty environment with the wheel: the folder of its scripts.

    Its dependencies are lent by a path file, which takes no time; but editable installs are not lent, since
    ``.pth`` files are only read in an environment's own site-packages.
    """
    folder = tmp_path_factory.mktemp("env")
    venv.create(folder, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    pip = (sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel)
    run(*pip, cwd=folder)
    (site / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return folder / "bin"


def foveate(installed: Path, *arguments: str, cwd: Path) -> dict[str, object]:
    code = "from foveate.cli import main; main(prog_name='foveate')"
    return dict(json.loads(run(installed / "python", "-c", code, *arguments, "--json", cwd=cwd)))


def test_the_code_comes_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import foveate; print(foveate.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where


def test_it_finds_its_registry_and_its_weights(installed: Path, tmp_path: Path) -> None:
    told = foveate(installed, "models", cwd=tmp_path)
    rows = {row["model"]: row for row in told["models"]}  # type: ignore[index, attr-defined, union-attr]
    assert "foveate/rim-vit" in rows
    code = "from foveate.plugins.registry import resolve; w = resolve('foveate/rim-vit').weights"
    code += "; print(w, w.is_dir())"
    path, there = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert path.startswith(str(installed.parent))
    assert there == "True"


def test_it_finds_its_plugins(installed: Path, tmp_path: Path) -> None:
    told = foveate(installed, "plugins", "--load", cwd=tmp_path)
    own = {row["plugin"]: row["state"] for row in told["plugins"] if row["distribution"] == "foveate"}  # type: ignore[attr-defined]
    assert own == dict.fromkeys(("attribution", "detr", "dvis", "metrics", "render", "vit"), "loaded")


def test_it_opens_the_model_that_ships(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    told = foveate(installed, "inspect", "foveate/rim-vit", cwd=tmp_path)
    assert told["sites"]


def test_nothing_is_left_behind(wheel: Path) -> None:
    """Every tracked file below the packages is in the wheel, and nothing else is."""
    import zipfile

    listed = subprocess.run(
        ["git", "ls-files", "core/foveate", "plugins"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git checkout")
    tracked = {path.split("/", 1)[1] for path in listed.stdout.split()} | {"foveate/registry.toml"}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert tracked - packed == set()


def test_requirements_never_exclude_a_newer_torch_or_numpy() -> None:
    """Only lower bounds: pip then has no reason to replace what is installed."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    wishes = [Requirement(line) for line in requires("foveate") or ()]
    assert {"torch", "numpy"} <= {wish.name for wish in wishes}
    for wish in wishes:
        assert all(part.operator == ">=" for part in wish.specifier), f"{wish}: only lower bounds are allowed"
        assert wish.url is None, f"{wish}: no addresses"


def test_installing_into_this_environment_would_install_nothing_else(tmp_path: Path) -> None:
    """What pip itself says: with torch and numpy there, a plain install of foveate changes neither."""
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-build-isolation", ROOT)
    said = run(*pip, cwd=tmp_path)
    changes = [line for line in said.splitlines() if line.startswith("Would install")]
    assert changes == ["Would install foveate-0.1.0"]
