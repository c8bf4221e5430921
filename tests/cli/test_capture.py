"""``foveate capture`` and ``foveate validate`` from the outside: words, JSON, exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from PIL import Image

from foveate.cli import main
from foveate.data.ledger import Ledger
from foveate.data.run import Run
from foveate.errors import ModelError
from foveate.testing.tiny import tiny_samples

MODEL = "foveate/rim-vit"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, sample in enumerate(tiny_samples(5, height=64, width=80)):
        Image.fromarray(sample.pixels).save(folder / f"{i}.png")
    return folder


def foveate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_capture_then_validate_then_again(tmp_path, images):
    run = tmp_path / "run.zarr"
    done = foveate("capture", MODEL, images, "-o", run, "--rows", "all", "--layers", "-2:")
    assert done.exit_code == 0, done.output
    assert "5 of 5 samples captured" in done.stdout
    assert "P V equals" in done.stdout
    opened = Run.open(run)
    assert opened.site(opened.site_ids[0])["layer"].values.tolist() == [2, 3]
    assert opened.open_source().card.id == MODEL
    checked = foveate("validate", run, "--deep", "--json")
    assert (checked.exit_code, json.loads(checked.stdout)["valid"]) == (0, True)
    again = foveate("capture", MODEL, images, "-o", run, "--rows", "all", "--layers", "-2:", "--json")
    said = json.loads(again.stdout)
    assert (said["schema_version"], said["resumed"], said["captured"], said["complete"]) == (1, 5, 5, True)


def test_model_is_opened_again_only_with_the_same_weights(tmp_path, images):
    foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr")
    run = Run.open(tmp_path / "r.zarr")
    model = {**run.attrs["model"], "weights_sha256": "0" * 64}
    with pytest.raises(ModelError, match="captured with weights 000000000000"):
        Run(run.path, {**run.attrs, "model": model}).open_source()


def test_failed_samples_are_listed_with_exit_code_5(tmp_path, images):
    (images / "letter.jpg").write_text("dear")
    (images / "notes.txt").write_text("x")
    done = foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr", "--json")
    assert done.exit_code == 5
    assert "not an image" in json.loads(done.stdout)["failed"]["letter.jpg"]
    assert "letter.jpg: " in done.stderr
    assert "ignored: 1 x .txt" in done.stderr
    (images / "letter.jpg").unlink()
    Image.new("RGB", (64, 64)).save(images / "letter.jpg")
    assert foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr").exit_code == 5
    assert foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr", "--retry-failed").exit_code == 0


def test_dry_run_says_the_cost_and_writes_nothing(tmp_path, images):
    run = tmp_path / "r.zarr"
    words = foveate("capture", MODEL, images, "-o", run, "--dry-run")
    assert words.exit_code == 0
    assert "nothing was written" in words.stdout
    assert "layer 4, head 4, query 1, key 65" in words.stdout
    said = json.loads(foveate("capture", MODEL, images, "-o", run, "--dry-run", "--json").stdout)
    assert said["bytes"] == 5 * 4 * 4 * (65 * 2 + 65 * 4 + 65 * 4)
    assert said["fits"]
    assert list(tmp_path.iterdir()) == [images]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--layers", "9"], 2, "layers that exist: vision.encoder.self: 0 to 3"),
        (["--sites", "decoder"], 2, "no site 'decoder'"),
        (["--rows", "cls"], 2, "not a rule"),
        (["--rows", "99"], 2, "has queries 0 to 64"),
        (["--reductions", "sum"], 2, "sum"),
        (["--heads", "max"], 2, "Invalid value"),
    ],
)
def test_what_does_not_exist_is_a_usage_error(tmp_path, images, arguments, code, words):
    done = foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr", *arguments)
    assert done.exit_code == code
    assert words in done.stderr
    assert not (tmp_path / "r.zarr").exists()


def test_unknown_model_missing_input_and_other_plan(tmp_path, images):
    run = tmp_path / "r.zarr"
    assert foveate("capture", "no-such-model", images, "-o", run).exit_code == 2
    missing = foveate("capture", MODEL, tmp_path / "gone", "-o", run)
    assert (missing.exit_code, "no such file" in missing.stderr) == (2, True)
    assert foveate("capture", MODEL, images, "-o", run).exit_code == 0
    other = foveate("capture", MODEL, images, "-o", run, "--rows", "all")
    assert other.exit_code == 4
    assert "plan.sites" in other.stderr
    assert "remedy: write to another path" in other.stderr


def test_validate_says_what_is_wrong_with_exit_code_4(tmp_path, images):
    run = tmp_path / "r.zarr"
    assert foveate("validate", run).exit_code == 4
    foveate("capture", MODEL, images, "-o", run)
    next(path for path in (run / "sites").rglob("c/0/*/*/*") if path.is_file()).unlink()
    done = foveate("validate", run)
    assert done.exit_code == 4
    assert "file is missing" in done.stdout


def test_real_process_interrupted_exits_130_and_continues(tmp_path, images):
    """Ctrl-C in a real process: a valid store, exit code 130, and the same call finishes the job."""
    for i in range(5, 32):
        Image.open(images / "0.png").rotate(i).save(images / f"{i}.png")
    run = tmp_path / "r.zarr"
    slow = (
        "import sys, time; from foveate.data import layout, manifest; layout.BATCH_SAMPLES = 4\n"
        "load = manifest.load_row\n"
        "def slowly(row):\n    time.sleep(0.1)\n    return load(row)\n"
        "manifest.load_row = slowly\n"
        "from foveate.cli import main; main()"
    )
    arguments = ["capture", MODEL, str(images), "-o", str(run), "--batch-size", "4"]
    job = subprocess.Popen(
        [sys.executable, "-c", slow, *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell that starts the tests in the background makes them, and so their children, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(Ledger(run).entries()) < 2 and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    job.send_signal(signal.SIGINT)
    _, stderr = job.communicate(timeout=60)
    assert job.returncode == 130, stderr
    assert foveate("validate", run, "--deep").exit_code == 0
    assert 8 <= Run.open(run).ok.size < 32
    finished = json.loads(foveate(*arguments, "--json").stdout)
    assert (finished["captured"], finished["resumed"] >= 8) == (32, True)


def test_what_is_odd_about_a_file_is_said_not_only_stored(tmp_path, images):
    for i in (1, 3):
        picture = Image.open(images / f"{i}.png")
        picture.putalpha(128)
        picture.save(images / f"{i}.png")
    done = foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr")
    assert done.exit_code == 0
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert said.endswith(": 1.png and 1 more")
    again = json.loads(foveate("capture", MODEL, images, "-o", tmp_path / "r.zarr", "--json").stdout)
    assert list(again["notes"].values()) == [["1.png", "3.png"]]
