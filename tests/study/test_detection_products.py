"""Analyses as products of a run, and objects of models that answer with masks only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from PIL import Image

pytest.importorskip("transformers")

from click.testing import CliRunner

import foveate
from detr_models import photos, tiny
from foveate.cli import main
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.errors import UsageError
from foveate.render.detection import film_strip
from foveate.render.detection_run import first_with_objects, layer_answers, layer_strips, objects_of
from foveate.study.capture import run_capture
from foveate.study.detection import analyse_run
from foveate.study.detection_subject import Subject, mask_bounds
from foveate.study.plan import build_plan
from foveate.testing.shapes import write_dataset

MODEL = "foveate/shapes-cdetr"
NAMES = ("queries", "objects", "borders")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("products")
    source = foveate.open(MODEL)
    manifest = write_dataset(folder, 5, seed=4)
    run_capture(source, manifest, folder / "run.zarr", plan=build_plan(source, rows="all"), reference=MODEL)
    return Run.open(folder / "run.zarr")


def test_products_hold_every_number_of_the_report(run: Run) -> None:
    truth = run.path.parent / "objects.json"
    report = analyse_run(Subject(run, truth, at_most=4), NAMES, seed=3)
    assert report.products == [f"analyses/{name}" for name in NAMES]
    for name in NAMES:
        table: xr.Dataset = run.product(f"analyses/{name}")
        lines = [line for line in report.lines if line.analysis == name]
        assert table.sizes == {"sample": len(run), "finding": len(lines)}
        for number, line in enumerate(lines):
            one = table.isel(finding=number)
            assert (str(one["quantity"].item()), str(one["site"].item())) == (line.quantity, line.site)
            assert int(one["layer"]) == (-1 if line.layer is None else line.layer)
            for key in ("mean", "low", "high", "p", "n"):
                np.testing.assert_allclose(float(one[key]), getattr(line, key))
            ends = [float(one[key]) for key in ("difference", "difference_low", "difference_high")]
            np.testing.assert_allclose(ends, line.difference)
            assert str(one["verdict"].item()) == line.verdict
            rows = report.values.query("analysis == @name and quantity == @line.quantity and site == @line.site")
            rows = rows[(rows["layer"].isna() & (line.layer is None)) | (rows["layer"] == line.layer)]
            rows = rows[(rows["head"].isna() & (line.head is None)) | (rows["head"] == line.head)]
            if list(rows["sample"]) == ["(all images)"]:
                np.testing.assert_allclose(float(one["whole_value"]), rows["value"].iloc[0])
                assert np.isnan(one["value"].values).all()
                continue
            ids = list(table["sample"].values)
            for sample, value, baseline in zip(rows["sample"], rows["value"], rows["baseline"], strict=True):
                at = ids.index(sample)
                np.testing.assert_allclose(one["value"].values[at], value)
                np.testing.assert_allclose(one["baseline"].values[at], baseline)
            assert np.isnan(one["value"].values[4:]).all()  # at_most: the others were not looked at
        assert table.attrs["images"] == 4
        assert table.attrs["interval_seed"] == 3
        assert len(table.attrs["truth_sha256"]) == 64
    assert validate(run.path) == []


def test_a_product_is_replaced_whole_and_can_be_left_out(run: Run) -> None:
    analyse_run(Subject(run), ["queries"])
    assert run.product("analyses/queries").attrs["images"] == 5
    assert run.product("analyses/queries").attrs["truth_sha256"] == ""
    report = analyse_run(Subject(run), ["patterns"], store=False)
    assert report.products == []
    assert "analyses/patterns" not in run.products()


def test_layer_answers_are_kept_and_drawn(run: Run, tmp_path: Path) -> None:
    before = CliRunner().invoke(
        main, ["plot", str(run.path), "--kind", "film-strip", "-o", str(tmp_path / "a.png")]
    )
    assert before.exit_code == 0, before.output
    assert "final answer" in Image.open(tmp_path / "a.png").info["Description"]
    report = analyse_run(Subject(run), ["readouts"])
    assert report.products == ["analyses/readouts", "layer_answers"]
    table = run.product("layer_answers")
    source: Any = run.open_source()
    batch = source.encode([run.load_sample(0), run.load_sample(1)])
    for layer, answers in enumerate(source.layer_answers(batch)):
        one = table.isel(layer=layer, sample=[0, 1])
        np.testing.assert_allclose(one["box"].values, answers.boxes, atol=0.05)
        np.testing.assert_allclose(one["score"].values, answers.probabilities.max(-1), atol=1e-4)
        np.testing.assert_array_equal(one["class_index"].values, answers.probabilities.argmax(-1))
    position = first_with_objects(run)
    found = objects_of(run, position)
    said = layer_answers(run, position, found, [0, 2])
    assert said is not None
    for shown, (first, last) in zip(found, said, strict=True):
        np.testing.assert_allclose(last.box, shown.box, atol=0.05)
        assert (last.label, last.query) == (shown.label, shown.query)
        np.testing.assert_allclose(first.box, table["box"].values[position, 0, shown.query], rtol=1e-6)
    after = CliRunner().invoke(
        main, ["plot", str(run.path), "--kind", "film-strip", "-o", str(tmp_path / "b.png")]
    )
    assert after.exit_code == 0, after.output
    assert "each layer's own answer" in Image.open(tmp_path / "b.png").info["Description"]
    strips, layers, rule = layer_strips(run, position, found)
    with pytest.raises(UsageError, match="answers of"):
        film_strip(found, strips, layers, rule, answers=[row[:1] for row in said])


# ---------------------------------------------------------------------------------- masks, no boxes


def slow_bounds(mask: np.ndarray) -> tuple[float, float, float, float] | None:
    places = [(y, x) for y in range(mask.shape[0]) for x in range(mask.shape[1]) if mask[y, x]]
    if not places:
        return None
    down, across = zip(*places, strict=True)
    return float(min(down)), float(min(across)), float(max(down)) + 1, float(max(across)) + 1


def test_bounds_of_masks() -> None:
    rng = np.random.default_rng(0)
    for density in (0.0, 0.002, 0.05, 0.9):
        mask = rng.random((13, 17)) < density
        assert mask_bounds(mask) == slow_bounds(mask)
    assert mask_bounds(None) is None


def test_a_segmenters_objects_have_the_bounds_of_their_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    for sample in photos((64, 96), (80, 70)):
        Image.fromarray(sample.pixels).save(tmp_path / "in" / f"{sample.id}.png")
    source: Any = tiny("MaskFormer", threshold=0.1)
    plan = build_plan(source, rows="all")
    run_capture(
        source,
        [tmp_path / "in"],
        tmp_path / "run.zarr",
        plan=plan,
        options={"threshold": 0.1},
        top=7,
        batch_size=2,
    )
    run = Run.open(tmp_path / "run.zarr")
    alone = Subject(run)  # captured from memory: the model cannot be opened again
    assert all(one.box is None for objects in alone.objects for one in objects)
    monkeypatch.setattr(Run, "open_source", lambda self, **options: source)
    subject = Subject(run)
    batch = source.encode([run.load_sample(0), run.load_sample(1)])
    answers = source.predictions(source.forward(batch), batch)
    assert sum(map(len, subject.objects)) > 2
    for objects, given in zip(subject.objects, answers, strict=True):
        masks = {one.object: one.mask for one in given}
        for one in objects:
            assert one.box == slow_bounds(np.asarray(masks[one.query]))
    report = analyse_run(subject, ["borders", "objects"])
    assert {line.analysis for line in report.lines} == {"borders", "objects"}
    own = [line for line in report.lines if line.quantity.startswith("mass in the own box")]
    assert own
    assert all(0 <= line.mean <= 1 for line in own)
