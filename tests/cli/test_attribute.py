"""``foveate attribute`` from the outside: words, JSON, exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from foveate.cli import main
from foveate.data.run import Run
from foveate.testing.tiny import tiny_samples


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attribute")
    for i, sample in enumerate(tiny_samples(3, height=64, width=80)):
        Image.fromarray(sample.pixels).save(folder / f"{i}.png")
    done = foveate("capture", "foveate/rim-vit", folder, "-o", folder / "run.zarr")
    assert done.exit_code == 0, done.output
    return folder / "run.zarr"


@pytest.fixture
def run(captured, tmp_path):
    """The captured run, as good as new; images keep their place beside it."""
    import shutil

    shutil.copytree(captured.parent, tmp_path / "job")
    return tmp_path / "job" / "run.zarr"


def foveate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_words(run):
    done = foveate("attribute", run, "-m", "rollout", "-m", "ig", "--set", "ig.n_steps=8", "-m", "smoothgrad")
    assert done.exit_code == 0, done.output
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["method", "maps", "evaluations/patch", "seed", "Spearman", "maps", "converged"]
    assert [row.split()[:2] for row in rows] == [["rollout", "3"], ["ig", "3"], ["smoothgrad", "3"]]
    spearman = Run.open(run).product("attributions/smoothgrad")["seed_spearman"].values
    assert rows[2].split()[3] == f"{np.median(spearman):.2f}"
    assert Run.open(run).product("attributions/ig").attrs["options"]["n_steps"] == 8


def test_json(run):
    done = foveate("attribute", run, "-m", "kernelshap", "--set", "kernelshap.evaluations_per_patch=1", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["schema_version"] == 1
    (method,) = told["methods"]
    assert method["evaluations_per_patch"] == 2.0
    assert method["seed_spearman"] < 0.8
    assert method["converged"] is False
    assert told["failed"] == {}


def test_dry_run_writes_nothing(run):
    done = foveate("attribute", run, "-m", "default", "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    by_name = {method["method"]: method for method in told["methods"]}
    assert by_name["rollout"]["forward"] == 3
    assert by_name["ig"]["backward"] == 150
    assert told["seconds"] > 0
    assert not Run.open(run).products()


def test_external(run, tmp_path):
    np.save(tmp_path / "maps.npy", np.random.default_rng(0).random((3, 8, 10)))
    done = foveate("attribute", run, "--external", f"mine={tmp_path / 'maps.npy'}")
    assert done.exit_code == 0, done.output
    assert Run.open(run).products() == ["attributions/mine"]
    assert foveate("attribute", run, "--external", "mine").exit_code == 2


def test_a_lost_image_ends_with_5(run):
    (run.parent / "1.png").unlink()
    done = foveate("attribute", run, "-m", "saliency")
    assert done.exit_code == 5
    assert "failed: 1.png" in done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["saliency", "2"]


def test_list_and_usage(run):
    listed = json.loads(foveate("attribute", "--list", "--json").stdout)["methods"]
    assert {"ig", "rollout", "lime", "edge"} <= {method["name"] for method in listed}
    assert "integrated gradients" in foveate("attribute", "--list").stdout
    for arguments in (
        (),
        (run,),
        (run, "-m", "igg"),
        (run, "-m", "ig", "--set", "n_steps=3"),
        (run.parent, "-m", "ig"),
    ):
        done = foveate("attribute", *arguments)
        assert done.exit_code in (2, 4), done.output
        assert "error" in done.stderr


def test_a_hint_names_the_option_that_the_method_has() -> None:
    from foveate.cli.attribute import _more_effort
    from foveate.plugins.manager import plugin_manager

    expected = {"drise": "masks", "ig": "n_steps", "gradshap": "n_samples", "kernelshap": "evaluations_per_patch"}
    for method, option in expected.items():
        default = getattr(plugin_manager().spec("attribution", method).create(), option)
        assert f"--set {method}.{option}={2 * default}" in _more_effort(method)
    for method in ("rollout", "tool/of/others"):
        assert "--set" not in _more_effort(method)
