"""The faithfulness job end to end on a tiny model: what is stored, what may not matter, what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
from click.testing import CliRunner
from PIL import Image

from foveate.attribution.attention import ReadoutAttention
from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.interfaces import BoundTarget, Target, TargetRow
from foveate.study.attribute import Settings as AttributeSettings
from foveate.study.attribute import attribute_run
from foveate.study.capture import run_capture
from foveate.study.faithfulness import estimate_faithfulness, run_faithfulness
from foveate.study.faithfulness_inputs import bind, stored_maps
from foveate.study.faithfulness_job import Settings
from foveate.testing.tiny import TinySource, tiny_samples

N = 6
METHODS = ("readout", "saliency_abs", "ig")
SCORING = Scoring(Protocol(steps=4), random_orders=4)
SETTINGS = Settings(SCORING)


def write_images(folder, count=N, *, masks=True):
    lines = ["path,mask"] if masks else ["path"]
    for sample in tiny_samples(count, seed=5):
        Image.fromarray(sample.pixels).save(folder / f"{sample.id}.png")
        Image.fromarray((sample.mask * 255).astype(np.uint8)).save(folder / f"{sample.id}-mask.png")
        lines.append(f"{sample.id}.png,{sample.id}-mask.png" if masks else f"{sample.id}.png")
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder / "images.csv"


def make(folder, source, *, masks=True, methods=METHODS, scale="logit"):
    run_capture(source, write_images(folder, masks=masks), folder / "run.zarr")
    run = Run.open(folder / "run.zarr")
    attribute_run(run, methods, source=source, settings=AttributeSettings(Target(scale=scale)))
    return run


@pytest.fixture(scope="module")
def source():
    return TinySource(seed=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("made")
    make(folder, source)
    return folder


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run with its images, so that each test may write to it."""
    shutil.copytree(made, tmp_path / "copy")
    return Run.open(tmp_path / "copy" / "run.zarr")


def test_every_stored_number_is_what_a_direct_computation_gives(run, source):
    report = run_faithfulness(run, source=source, settings=SETTINGS)
    curves, scores = run.product("faithfulness/curves"), run.product("faithfulness/scores")
    position = 3
    bound = bind(source, [run.load_sample(position)], Target())
    stored = run.product("attributions/ig")["map"].values[[position], 0].reshape(1, -1).astype(float)
    direct = score_maps(bound.objective, {"ig": stored}, run.grid, SCORING)
    for name, i in (("ig", 0), ("random", 1)):
        mine = curves["curve"].sel({"method": name}).values[position, 0]
        np.testing.assert_allclose(mine, direct.curves[0, i], atol=2e-6)
    area = np.trapezoid(curves["curve"].values, curves["fraction"].values, axis=-1)
    kept = scores["area"].transpose(*curves["curve"].dims[:-1]).values
    np.testing.assert_allclose(kept, area, atol=1e-7)
    row = next(r for r in report.board.rows if r.method == "ig")
    first = scores["area"].sel({"method": "ig", "mode": "deletion", "baseline": "mean", "scale": "probability"})
    assert row.deletion == pytest.approx(float(first.mean()))


def test_controls_run_beside_methods_and_everything_that_fixes_a_score_is_stored(run, source):
    twin = TinySource(seed=77)
    report = run_faithfulness(run, source=source, settings=SETTINGS, twin=twin, twin_methods=(ReadoutAttention(),))
    roles = {row.method: row.role for row in report.board.rows}
    assert {name for name, role in roles.items() if role == "method"} == set(METHODS)
    controls = {"uniform", "centre", "edge", "saturation", "oracle", "random", "readout@untrained"}
    assert {name for name, role in roles.items() if role == "control"} == controls
    attrs = run.product("faithfulness/scores").attrs
    for name in ("target", "baselines", "scales", "grid", "ties", "steps", "seed", "random_orders", "maps"):
        assert name in attrs, name
    assert attrs["target"] == "class (what the model answers)"
    oracle = next(row for row in report.board.rows if row.method == "oracle")
    assert oracle.localisation["roc_auc"].estimate > 0.9


def test_an_own_map_of_the_model_beats_its_own_reverse(run, source):
    """Exact single-patch effects against their negative, entered as another tool's maps."""
    position_maps = []
    for position in run.ok:
        bound = bind(source, [run.load_sample(int(position))], Target())
        x, base = bound.objective.inputs, bound.objective.inputs.mean((-2, -1), keepdim=True)
        effect = np.zeros((4, 4))
        with torch.no_grad():
            intact = float(bound.objective(x))
            for y, c in np.ndindex(4, 4):
                changed = x.clone()
                changed[..., 8 * y : 8 * y + 8, 8 * c : 8 * c + 8] = base
                effect[y, c] = intact - float(bound.objective(changed))
        position_maps.append(effect)
    for name, sign in (("own", 1), ("reverse", -1)):
        store_external(run, name, sign * np.array(position_maps))
    report = run_faithfulness(run, source=source, methods=["own", "reverse"], settings=SETTINGS)
    own, reverse = (next(r for r in report.board.rows if r.method == name) for name in ("own", "reverse"))
    assert own.deletion < reverse.deletion
    assert own.insertion > reverse.insertion
    assert own.versus_random.superiority > reverse.versus_random.superiority


def store_external(run, name, values):
    n = len(run)
    data = xr.Dataset(
        {
            "map": (("sample", "target", "y", "x"), values[:, None].astype(np.float32)),
            "converged": (("sample", "target"), np.ones((n, 1), bool)),
            "target_class": (("sample", "target"), np.full((n, 1), -1, np.int32)),
        }
    )
    run.write_product(f"attributions/{name}", data, {"source": "external"})


def test_a_job_that_was_cut_off_goes_on_and_ends_as_if_it_had_not(run, made, source, tmp_path, monkeypatch):
    import foveate.study.faithfulness_job as job

    calls, real = [], job.score_maps

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    small = Settings(SCORING, batch_size=2)
    monkeypatch.setattr(job, "score_maps", failing)
    with pytest.raises(KeyboardInterrupt):
        run_faithfulness(run, source=source, settings=small)
    monkeypatch.setattr(job, "score_maps", lambda *args: (calls.append(1), real(*args))[1])
    calls.clear()
    run_faithfulness(run, source=source, settings=small)
    assert len(calls) == 1, "two of three batches were there already"
    resumed = run.product("faithfulness/curves")["curve"].values
    shutil.copytree(made, tmp_path / "fresh")
    fresh = Run.open(tmp_path / "fresh" / "run.zarr")
    run_faithfulness(fresh, source=source, settings=SETTINGS)
    np.testing.assert_allclose(resumed, fresh.product("faithfulness/curves")["curve"].values, atol=2e-6)


def test_a_draw_of_images_leaves_the_others_open(run, source):
    few = Settings(SCORING, samples=4)
    report = run_faithfulness(run, source=source, settings=few)
    assert report.board.n == 4
    areas = run.product("faithfulness/scores")["area"].values
    assert np.isfinite(areas).all(axis=tuple(i for i in range(areas.ndim) if i != 1)).sum() == 4
    assert run_faithfulness(run, source=source, settings=SETTINGS).board.n == N


def test_other_settings_need_permission(run, source):
    run_faithfulness(run, source=source, settings=SETTINGS)
    other = Settings(Scoring(Protocol(steps=5), random_orders=4))
    with pytest.raises(Exception, match="other settings"):
        run_faithfulness(run, source=source, settings=other)
    run_faithfulness(run, source=source, settings=Settings(other.scoring, overwrite=True))
    assert run.product("faithfulness/curves").sizes["step"] == 6


def test_without_masks_there_is_no_oracle_and_no_localisation(tmp_path, source):
    run = make(tmp_path, source, masks=False, methods=("readout",))
    report = run_faithfulness(run, source=source, settings=SETTINGS)
    assert "oracle" not in {row.method for row in report.board.rows}
    assert all(not row.localisation for row in report.board.rows)
    assert "faithfulness/agreement" not in run.products()


def test_maps_of_another_answer_are_refused(run):
    with pytest.raises(UsageError, match="the map explains class"):
        run_faithfulness(run, source=TinySource(seed=8), settings=SETTINGS)


def test_maps_of_different_targets_are_refused(run, source):
    named = AttributeSettings(target=Target(label="red", scale="logit"), overwrite=True)
    attribute_run(run, ("readout",), source=source, settings=named)
    with pytest.raises(UsageError, match="different targets"):
        run_faithfulness(run, source=source, settings=SETTINGS)
    report = run_faithfulness(run, source=source, methods=["readout"], settings=SETTINGS)
    assert "red" in report.to_text().splitlines()[0]


def test_a_run_without_maps_names_the_command(tmp_path, source):
    run_capture(source, write_images(tmp_path), tmp_path / "run.zarr")
    with pytest.raises(UsageError, match="no attribution") as failure:
        stored_maps(Run.open(tmp_path / "run.zarr"), None)
    assert "foveate attribute" in str(failure.value)


class ValueSource(TinySource):
    """A target without classes: its score is a value and nothing else."""

    def score(self, outputs, batch, bound):
        if bound.scale != "value":
            raise UsageError("only a value")
        return super().score(outputs, batch, bound.at("logit"))


def test_a_target_that_is_a_value_is_scored_on_that_scale(tmp_path):
    value = ValueSource(seed=1)
    run = make(tmp_path, value, methods=("readout",), scale="value")
    report = run_faithfulness(run, source=value, settings=SETTINGS)
    assert {key.scale for key in report.board.protocols} == {"value"}


class TwoTargets(TinySource):
    """Explains its two best classes, on every third image only one: ragged, as a detector's objects are."""

    def bind(self, outputs, batch, target):
        best = outputs.topk(2, dim=-1).indices.tolist()
        rows = [
            TargetRow(i, "class", c, str(c))
            for i, classes in enumerate(best)
            for c in classes[: 1 if batch.ids[i].endswith(("0.png", "3.png")) else 2]
        ]
        return BoundTarget(tuple(rows), target.scale)


def test_several_targets_an_image_are_scored_each_and_averaged(tmp_path):
    two = TwoTargets(seed=1)
    run_capture(two, write_images(tmp_path), tmp_path / "run.zarr")
    run = Run.open(tmp_path / "run.zarr")
    attribute_run(run, ("saliency_abs",), source=two, settings=AttributeSettings(max_targets=2))
    report = run_faithfulness(run, source=two, settings=SETTINGS)
    areas = run.product("faithfulness/scores")["area"].sel({"method": "saliency_abs"}).values
    there = np.isfinite(areas[..., 0, 0, 0])
    assert there[:, 0].all()
    assert there[:, 1].tolist() == [i not in (0, 3) for i in range(N)]
    assert report.board.n == N
    row = next(r for r in report.board.rows if r.method == "saliency_abs")
    assert row.deletion == pytest.approx(np.nanmean(areas[..., 0, 0, 0], axis=1).mean())


def test_the_estimate_counts_pictures_and_writes_nothing(run, source):
    cost = estimate_faithfulness(run, source=source, settings=SETTINGS)
    maps = len(METHODS) + 5
    assert len(cost.methods) == maps + 1
    assert cost.forwards == N * 2 * ((2 * maps + 4) * 3 + 2)
    assert cost.seconds > 0
    assert "faithfulness/curves" not in run.products()


@pytest.fixture
def opened(monkeypatch, source):
    monkeypatch.setattr(Run, "open_source", lambda self, **_: source)


def test_command(run, opened, tmp_path):
    call = ["faithfulness", str(run.path), "--steps", "4", "--random-orders", "4", "--untrained", "none"]
    planned = CliRunner().invoke(main, [*call, "--dry-run", "--json"])
    assert json.loads(planned.stdout)["samples"] == N, planned.output
    shown = CliRunner().invoke(main, [*call, "-o", str(tmp_path / "out"), "--figure", "svg"])
    assert shown.exit_code == 0, shown.output
    assert "Faithfulness of explanations: tiny" in shown.stdout
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"leaderboard.{suffix}" for suffix in ("txt", "md", "csv", "json", "svg")} | {"agreement.csv"}
    printed = json.loads(CliRunner().invoke(main, [*call, "--json"]).stdout)
    table = list(csv.DictReader((tmp_path / "out" / "leaderboard.csv").open()))
    assert [row["method"] for row in table] == [row["method"] for row in printed["rows"]]
    assert printed["schema_version"] == 1


def test_a_lost_image_is_reported_and_the_rest_is_scored(run, opened):
    (run.path.parent / "tiny-2.png").unlink()
    call = ["faithfulness", str(run.path), "--steps", "4", "--random-orders", "4", "--untrained", "none"]
    shown = CliRunner().invoke(main, call)
    assert shown.exit_code == 5, shown.output
    assert "failed:" in shown.stderr
    assert f"{N - 1} images" in shown.stdout
