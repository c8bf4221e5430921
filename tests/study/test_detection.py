"""The analyses of detectors, end to end on the detector that ships, and against slow sums of what a run holds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import foveate
from detr_models import tiny
from foveate.cli import main
from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.interfaces import Target
from foveate.study.capture import run_capture
from foveate.study.detection import ANALYSES, Finding, Line, analyse_run, line_of
from foveate.study.detection_rows import _members
from foveate.study.detection_subject import Subject
from foveate.study.plan import build_plan
from foveate.testing.shapes import write_dataset
from foveate.testing.tiny import TinySource

MODEL = "foveate/shapes-cdetr"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("shapes")
    source = foveate.open(MODEL)
    manifest = write_dataset(made, 8, seed=4)
    run_capture(source, manifest, made / "run.zarr", plan=build_plan(source, rows="all"), reference=MODEL)
    return made


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return Subject(Run.open(folder / "run.zarr"), folder / "objects.json")


@pytest.fixture(scope="module")
def lines(subject: Subject, folder: Path) -> list[Line]:
    return analyse_run(subject, out=folder / "out").lines


def of(lines: list[Line], analysis: str, quantity: str, **place: object) -> Line:
    found = [
        line
        for line in lines
        if line.analysis == analysis
        and line.quantity.startswith(quantity)
        and all(getattr(line, name) == value for name, value in place.items())
    ]
    assert found, (analysis, quantity, place)
    return found[0]


def test_every_analysis_but_levels_speaks(lines: list[Line]) -> None:
    assert {line.analysis for line in lines} == set(ANALYSES) - {"levels"}  # one feature map has no levels
    assert all(np.isfinite(line.mean) for line in lines)
    assert all(line.low <= line.mean <= line.high for line in lines if line.low == line.low)
    assert all(1 <= line.n <= 8 for line in lines)


def test_a_trained_detector_does_what_it_is_known_for(lines: list[Line]) -> None:
    own = of(lines, "objects", "mass in the own box", layer=2)
    assert own.verdict == "above"
    assert own.mean > 0.5 > 5 * own.baseline
    assert of(lines, "borders", "enrichment", layer=2).verdict == "above"
    cut = [line for line in lines if line.quantity.startswith("Jaccard of 60 % of the mass, cross")]
    assert [line.verdict for line in cut] == ["above", "below"]  # chance, the filled box
    last = of(lines, "readouts", "objects matched", layer=2)
    assert (last.mean, last.verdict) == (1, "above")


def test_mass_in_boxes_against_points(subject: Subject, lines: list[Line]) -> None:
    """Spread each cell's weight on 24 x 24 points a cell and count those inside the object's box."""
    run, per_image = subject.run, []
    for place, position in enumerate(subject.positions):
        site, masses = run.site("decoder.cross"), []
        for one in subject.objects[place]:
            row = (
                site["attention"]
                .isel(sample=position, layer=2, query=one.query)
                .astype("float64")
                .mean("head")
                .values
            )
            inside = 0.0
            top, left, bottom, right = one.box or (0, 0, 0, 0)
            for weight, cell in zip(row, range(row.size), strict=True):
                r, c = divmod(cell, 12)
                y = np.linspace(*run.grid.y[r : r + 2], 25)[:-1] + np.diff(run.grid.y)[r] / 48
                x = np.linspace(*run.grid.x[c : c + 2], 25)[:-1] + np.diff(run.grid.x)[c] / 48
                inside += weight * ((y > top) & (y < bottom)).mean() * ((x > left) & (x < right)).mean()
            masses.append(inside / row.sum())
        if masses:
            per_image.append(np.mean(masses))
    line = of(lines, "objects", "mass in the own box", layer=2)
    assert line.n == len(per_image)
    assert line.mean == pytest.approx(np.mean(per_image), abs=0.01)


def test_heads_against_a_gate_that_is_moved(subject: Subject, lines: list[Line]) -> None:
    """|dL/dxi| by central differences of a gate on what one head adds to the output projection."""
    source = subject.run.open_source()
    batch = source.encode([subject.sample(place) for place in range(len(subject.positions))])
    bound = source.bind(source.forward(batch), batch, Target()).at("logit")
    module = source.module.get_submodule("model.decoder.layers.2.encoder_attn.o_proj")
    gates = np.zeros((len(bound), 4))
    for head in range(4):
        side = []
        for gate in (1.05, 0.95):

            def scaled(
                _module: object, inputs: tuple[torch.Tensor], gate: float = gate, head: int = head
            ) -> tuple:
                x = inputs[0].clone()
                width = x.shape[-1] // 4
                x[..., head * width : (head + 1) * width] *= gate
                return (x,)

            with module.register_forward_pre_hook(scaled):
                side.append(source.score(source.forward(batch), batch, bound).double().detach().numpy())
        gates[:, head] = np.abs(side[0] - side[1]) / 0.1
    samples = np.array([row.sample for row in bound.rows])
    images = np.stack([gates[samples == sample].mean(0) for sample in np.unique(samples)])
    expected = images.mean(0) / np.linalg.norm(images.mean(0))
    found = [of(lines, "heads", "importance", site="decoder.cross", layer=2, head=head).mean for head in range(4)]
    assert found == pytest.approx(expected, abs=0.02)


def test_layers_are_read_by_the_models_own_heads(subject: Subject) -> None:
    source = subject.run.open_source()
    batch = source.encode([subject.sample(0), subject.sample(1)])
    first, second, last = source.layer_answers(batch)
    own = source.predictions(source.forward(batch), batch)
    for sample in range(2):
        for answer in own[sample]:
            assert last.probabilities[sample, answer.object].max() == pytest.approx(answer.score, abs=1e-5)
            assert last.boxes[sample, answer.object] == pytest.approx(answer.box, abs=1e-3)
    assert np.abs(first.boxes - last.boxes).max() > 0.5 < np.abs(second.boxes - first.boxes).max()
    out = source.module(pixel_values=batch.inputs, **batch.per_sample, output_hidden_states=True)
    state = source.module.model(pixel_values=batch.inputs, **batch.per_sample).intermediate_hidden_states[0]
    logits = source.module.class_labels_classifier(state.reshape(2, -1, state.shape[-1]))
    assert first.probabilities == pytest.approx(logits.sigmoid().detach().double().numpy(), abs=1e-5)
    assert out.logits.shape == logits.shape


def test_a_line_pairs_images_with_their_own_baseline() -> None:
    values, null = np.arange(2, 11) / 10, np.arange(1, 10) / 10
    values[2] = np.nan
    line = line_of("x", Finding("q", "u", values, null))
    assert (line.n, line.baseline, line.verdict) == (8, pytest.approx(4.2 / 8), "above")
    assert line.difference == pytest.approx((0.1, 0.1, 0.1))
    assert line_of("x", Finding("q", "u", values[1:], null[1:])).verdict == "untested"  # seven images
    assert line_of("x", Finding("q", "u", values)).verdict == ""
    assert line_of("x", Finding("q", "u", values, values * (1 + 2e-4))).verdict == "no"  # rounding
    assert line_of("x", Finding("q", "u", null, null[::-1])).verdict == "no"
    rare = np.array([0.0] * 21 + [0.2])  # one image in many: the interval touches 0
    assert line_of("x", Finding("q", "u", rare + 0.1, 0.1)).verdict == "no"
    whole = Finding("q", "u", np.array([2.0]), 1.0, whole=True, n=7)
    assert (line_of("x", whole).n, line_of("x", whole).verdict) == (7, "untested")
    assert line_of("x", replace(whole, p=0.01)).verdict == "above"
    assert line_of("x", replace(whole, p=0.2)).verdict == "no"


def test_what_cannot_be_made_is_said(subject: Subject, folder: Path, tmp_path: Path) -> None:
    blind = Subject(subject.run)
    report = analyse_run(blind, out=tmp_path)
    assert set(report.left_out) == {"levels", "segments"}
    assert "true masks" in report.left_out["segments"]
    with pytest.raises(UsageError, match="no true masks"):
        analyse_run(blind, ["segments"])
    with pytest.raises(UsageError, match="no analysis 'segment'"):
        analyse_run(blind, ["segment"])
    wrong = tmp_path / "truth.json"
    wrong.write_text("[]")
    with pytest.raises(UsageError, match="truth"):
        analyse_run(Subject(subject.run, wrong), ["groups"])
    wrong.write_text('{"images": {}}')
    with pytest.raises(UsageError, match="no image"):
        analyse_run(Subject(subject.run, wrong), ["groups"])


def test_a_run_without_objects_or_rows_is_refused(folder: Path, tmp_path: Path) -> None:
    run_capture(TinySource(), folder / "images", tmp_path / "vit.zarr")
    with pytest.raises(UsageError, match="belong to no object queries"):
        Subject(Run.open(tmp_path / "vit.zarr"))
    run_capture(foveate.open(MODEL), folder / "manifest.csv", tmp_path / "thin.zarr", reference=MODEL)
    with pytest.raises(UsageError, match="not kept"):
        analyse_run(Subject(Run.open(tmp_path / "thin.zarr")), ["objects"])


def test_no_object_above_the_threshold_is_said(folder: Path, tmp_path: Path) -> None:
    source = foveate.open(MODEL, threshold=0.999)
    plan = build_plan(source, rows="all")
    run_capture(
        source,
        folder / "manifest.csv",
        tmp_path / "none.zarr",
        plan=plan,
        reference=MODEL,
        options={"threshold": 0.999},
    )
    report = analyse_run(Subject(Run.open(tmp_path / "none.zarr")))
    assert {"queries", "objects", "borders", "heads", "scale"} <= set(report.left_out)
    assert "no object above" in report.left_out["heads"]
    assert {line.analysis for line in report.lines} <= {"patterns", "layers", "approximations", "redundancy"}


def test_padding_belongs_to_no_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(60, 90, 3), (80, 80, 3), (90, 50, 3)]):
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    source = tiny("DETR", threshold=0.01)
    options = {"threshold": 0.01}
    run_capture(
        source, tmp_path, tmp_path / "run.zarr", plan=build_plan(source, rows="all"), options=options, top=9
    )
    subject = Subject(Run.open(tmp_path / "run.zarr"))
    for place in range(3):
        members = _members(subject, "encoder.self", place)
        seen = subject.visible("encoder.self", "key", place)
        outside = np.setdiff1d(np.arange(members.shape[1]), seen)
        assert outside.size  # the canvas is larger than any picture
        assert not members[:, outside].any()
        assert (members[:, seen].sum(0) > 0.99).all()  # every cell of the picture is an object's or background
        rows, query, key = subject.seen("encoder.self", subject.run.site("encoder.self"), place)
        assert rows.shape[-2:] == (len(query), len(key)) == (seen.size, seen.size)
        assert rows.sum(-1) == pytest.approx(np.ones(rows.shape[:-1]), abs=5e-3)  # no weight on padding
    found = {line.quantity: line for line in analyse_run(subject, ["patterns"]).lines}
    assert found["mass in the own row and column"].baseline > 0.2


def test_levels_of_a_pyramid_share_the_mass(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    source = tiny("Deformable DETR", threshold=0.01)
    options = {"threshold": 0.01}
    run_capture(
        source, tmp_path, tmp_path / "run.zarr", plan=build_plan(source, rows="all"), options=options, top=9
    )
    lines = analyse_run(Subject(Run.open(tmp_path / "run.zarr")), ["levels"]).lines
    own = [line for line in lines if line.quantity.startswith("mass of objects") and line.layer == 1]
    assert len(own) == 4
    assert sum(line.mean for line in own) == pytest.approx(1, abs=1e-3)
    assert {line.baseline for line in own} == {0.25}


def test_command_line(folder: Path) -> None:
    listed = CliRunner().invoke(main, ["analyse", "--list"])
    assert all(name in listed.stdout for name in ANALYSES)
    call = [
        "analyse",
        str(folder / "run.zarr"),
        "--analysis",
        "queries",
        "--analysis",
        "patterns",
        "--at-most",
        "4",
    ]
    text = CliRunner().invoke(main, [*call, "-o", str(folder / "cli")])
    assert text.exit_code == 0, text.output
    assert "classes permuted" in text.stdout
    assert "encoder.self" in (folder / "cli" / "lines.csv").read_text()
    payload = json.loads(CliRunner().invoke(main, [*call, "--json"]).stdout)
    assert {line["analysis"] for line in payload["lines"]} == {"queries", "patterns"}
    assert all(line["n"] <= 4 for line in payload["lines"])
    assert CliRunner().invoke(main, ["analyse"]).exit_code == 2
    assert CliRunner().invoke(main, [*call[:2], "--analysis", "x"]).exit_code == 2


def test_a_true_box_that_is_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    table = json.loads((folder / "objects.json").read_text("utf-8"))
    name = next(image for image, listed in table["images"].items() if listed)
    table["images"][name][0]["box"][2] = float("nan")
    (tmp_path / "objects.json").write_text(json.dumps(table), "utf-8")
    broken = Subject(Run.open(folder / "run.zarr"), tmp_path / "objects.json")
    with pytest.raises(UsageError, match=f"image {name!r} has a box that is not finite"):
        broken.true_objects(broken.ids.index(name))
