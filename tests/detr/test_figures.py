"""Figures of detectors: what they draw is what the run holds, and what cannot be drawn is said."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.trace import trace
from foveate.cli import main
from foveate.data.run import Run
from foveate.detection.mass import box_shares
from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import CapturePlan, SitePlan, Target
from foveate.plugins.manager import plugin_manager
from foveate.plugins.opening import open_source
from foveate.render.detection import CrossTable, DetectedObject, cross_objects, film_strip, objects
from foveate.render.detection_run import (
    answers_of,
    cross_table,
    first_with_objects,
    layer_strips,
    object_panels,
    object_rows,
    objects_of,
    reading_site,
)
from foveate.render.panel import Panel, Rule
from foveate.study.capture import run_capture
from foveate.testing.shapes import scenes, write_dataset

MODEL = "foveate/shapes-cdetr"
RULE = Rule("model", "maps", 12)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("figures")
    manifest = write_dataset(folder / "pictures", 6, seed=17)
    source = open_source(MODEL)
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in source.sites))
    run_capture(source, manifest, folder / "run.zarr", plan=plan, reference=MODEL, top=10, batch_size=6)
    return Run.open(folder / "run.zarr")


def panels(count: int) -> list[Panel]:
    rng = np.random.default_rng(0)
    grid = CellGrid.regular(3, 4, height=30, width=40)
    image = rng.integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return [Panel.of_map(image, Geometry.identity(30, 40), rng.random((3, 4)), grid) for _ in range(count)]


def found(count: int) -> list[DetectedObject]:
    return [DetectedObject("shape", 0.9, i, (2.0 + i, 3.0, 12.0 + i, 20.0)) for i in range(count)]


# ------------------------------------------------------------------------------ from the run


def test_objects_are_the_answers_above_the_threshold_with_their_queries(run: Run) -> None:
    source = open_source(MODEL)
    for position in range(len(run)):
        sample = run.load_sample(position)
        batch = source.encode([sample])
        expected = [p for p in source.predictions(source.forward(batch), batch)[0] if p.score > 0.5]
        if not expected:
            continue
        got = objects_of(run, position)
        assert [(one.label, one.query) for one in got] == [(p.label, p.object) for p in expected]
        np.testing.assert_allclose([one.box for one in got], [p.box for p in expected], rtol=1e-4)
    assert (
        objects_of(run, first_with_objects(run), at_most=1)[0].score
        == answers_of(run, first_with_objects(run))[0].score
    )


def test_a_panel_is_the_row_of_the_objects_own_query(run: Run) -> None:
    position = first_with_objects(run)
    ours = objects_of(run, position)
    drawn, rule = object_panels(run, position, ours, layer=1, head=2)
    stored = run.site("decoder.cross")["attention"].isel(sample=position, layer=1, head=2)
    for one, panel in zip(ours, drawn, strict=True):
        np.testing.assert_allclose(panel.values.ravel(), stored.isel(query=one.query).values, rtol=1e-6)
        assert panel.uniform == pytest.approx(1 / 144)
    assert "layer 1 of 0–2" in rule.what
    assert "head 2" in rule.what


def test_a_table_of_segments_without_boxes_is_refused() -> None:
    """Otherwise all mass would seem to lie outside every object."""
    segments = [DetectedObject("sky", 0.9, i, box) for i, box in enumerate((None, (float("nan"),) * 4))]
    with pytest.raises(UsageError, match="segments without boxes"):
        cross_table(panels(2), segments)


@pytest.mark.parametrize("name", ["YOLOS", "OWLv2", "EoMT", "DETR"])
def test_rows_are_those_that_the_answer_is_read_from_also_in_self_attention(tmp_path, name: str) -> None:
    """Encoder-only detectors: the detection token's row, or the patch's; asked of the source, object by object."""
    source, samples = tiny(name, threshold=0.0, max_objects=3), photos((64, 96))
    Image.fromarray(samples[0].pixels).save(tmp_path / "photo.png")
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in source.sites))
    run_capture(source, tmp_path, tmp_path / "run.zarr", plan=plan, top=3)
    kept = Run.open(tmp_path / "run.zarr")
    traced = trace(source, source.encode([kept.load_sample(0)]))
    bound = source.bind(traced.outputs, traced.batch, Target())
    shown = {one.query: one for one in answers_of(kept, 0)}
    site, dataset = reading_site(kept)
    rows = object_rows(dataset, 0, [shown[int(row.object)] for row in bound.rows])
    weights = source.readout(traced.batch, traced.outputs, bound)[site].weights
    assert len(bound) == len(rows) == 3
    for layer, number in enumerate(dataset["layer"].values):
        record = next(traced.records[key] for key in traced.records if (key.site, key.layer) == (site, number))
        expected = torch.einsum("tq,hqk->thk", weights, record.rows(slice(None))[0].float())
        np.testing.assert_allclose(rows[:, layer], expected.numpy(), atol=1e-3)  # stored in float16
    assert expected.std(0).max() > 0.01  # the objects' rows differ


def test_the_strip_has_every_layer(run: Run) -> None:
    position = first_with_objects(run)
    ours = objects_of(run, position)
    strips, layers, _ = layer_strips(run, position, ours)
    assert layers == [0, 1, 2]
    for layer in layers:
        alone, _ = object_panels(run, position, ours, layer=layer)
        for strip, panel in zip(strips, alone, strict=True):
            np.testing.assert_array_equal(strip[layer].values, panel.values)


def test_the_table_is_the_mass_in_each_box_and_outside_all(run: Run) -> None:
    position = next(i for i in range(len(run)) if len(objects_of(run, i)) > 1)
    ours = objects_of(run, position)
    drawn, _ = object_panels(run, position, ours)
    table = cross_table(drawn, ours)
    assert table.values.shape == (len(ours), len(ours) + 1)
    for row, panel in zip(table.values, drawn, strict=True):
        values, cells = panel.visible_values
        for column, one in enumerate(ours):
            inside = (values * box_shares(cells, np.array([one.box]))[0]).sum() / values.sum()
            assert row[column] == pytest.approx(inside)
    own = np.diag(table.values[:, :-1])
    assert (own > table.chance[:-1] * 3).all()  # the trained model reads its objects at their place
    np.testing.assert_allclose(table.values.sum(1), 1.0, atol=0.2)


# ------------------------------------------------------------------------------- from the shell


@pytest.mark.parametrize("kind", ["objects", "film-strip", "cross-objects"])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_kind_is_drawn_and_says_what_it_shows(run: Run, tmp_path, kind: str, suffix: str) -> None:
    out = tmp_path / f"f.{suffix}"
    result = CliRunner().invoke(main, ["plot", str(run.path), "--kind", kind, "-o", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["bytes"] == out.stat().st_size
    if suffix == "png":
        said = Image.open(out).info["Description"]
        assert MODEL in said
        assert "K = 144" in said


def test_the_same_data_give_the_same_bytes(run: Run, tmp_path) -> None:
    renderer = plugin_manager().spec("renderer", "objects").create()
    one, two = (renderer.render(run, out=tmp_path / name) for name in ("a.png", "b.png"))
    assert one.read_bytes() == two.read_bytes()


def test_a_classifier_and_rows_not_kept_are_refused(run: Run, tmp_path) -> None:
    manifest = write_dataset(tmp_path / "pictures", 2, seed=17)
    source = open_source(MODEL)
    run_capture(source, manifest, tmp_path / "rows.zarr", reference=MODEL, batch_size=2)
    few = Run.open(tmp_path / "rows.zarr")
    with pytest.raises(UsageError, match="not kept"):
        object_panels(few, 0, objects_of(few, 0))
    classifier = open_source("foveate/rim-vit")
    run_capture(classifier, manifest, tmp_path / "vit.zarr", reference="foveate/rim-vit", batch_size=2)
    with pytest.raises(UsageError, match="no object queries"):
        objects_of(Run.open(tmp_path / "vit.zarr"), 0)
    with pytest.raises(UsageError, match="densely"):
        plugin_manager().spec("renderer", "points").create().render(run, out=tmp_path / "p.png")


def test_no_object_above_the_threshold_is_said(tmp_path) -> None:
    blank = np.full((96, 96, 3), 120, np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(blank).save(tmp_path / "in" / "blank.png")
    source = open_source(MODEL)
    run_capture(source, tmp_path / "in", tmp_path / "run.zarr", reference=MODEL)
    with pytest.raises(UsageError, match=r"no object above the threshold 0\.5"):
        objects_of(Run.open(tmp_path / "run.zarr"), 0)


def test_sampling_points_are_drawn(tmp_path) -> None:
    """A deformable detector with random weights, opened again from its folder."""
    tiny("RT-DETR").module.save_pretrained(tmp_path / "model")
    for i, drawn in enumerate(scenes(2, seed=5)):
        Image.fromarray(drawn.image).save(tmp_path / f"{i}.png")
    options = {"threshold": 0.0, "image_size": 96}
    reference = str(tmp_path / "model")
    run_capture(
        open_source(reference, **options),
        [tmp_path / "0.png", tmp_path / "1.png"],
        tmp_path / "run.zarr",
        reference=reference,
        options=options,
    )
    result = CliRunner().invoke(
        main,
        ["plot", str(tmp_path / "run.zarr"), "--kind", "points", "-o", str(tmp_path / "p.png"), "--query", "3"],
    )
    assert result.exit_code == 0, result.output
    assert "query 3" in Image.open(tmp_path / "p.png").info["Description"]


# --------------------------------------------------------------------------------- drawings alone


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="no object"):
        objects([], [], RULE)
    with pytest.raises(UsageError, match="2 objects but 1 maps"):
        objects(found(2), panels(1), RULE)
    with pytest.raises(UsageError, match="frames for 3 layers"):
        film_strip(found(1), [panels(2)], [0, 1, 2], RULE)
    with pytest.raises(UsageError, match="per-image"):
        film_strip(found(1), [panels(2)], [0, 1], RULE, scale="per-image")
    with pytest.raises(UsageError, match="a table"):
        cross_objects(found(2), CrossTable(np.ones((2, 2)), np.ones(2)), panels(1)[0], RULE)


def test_boxes_are_drawn_where_they_are() -> None:
    from matplotlib.patches import Rectangle

    picture = objects(found(3), panels(3), RULE)
    first = picture.figure.axes[0]
    drawn = [p.get_bbox().extents for p in first.patches if isinstance(p, Rectangle)]
    assert [(y0, x0, y1, x1) for x0, y0, x1, y1 in map(tuple, drawn)] == [one.box for one in found(3)]


def test_an_object_without_a_box_and_a_signed_map_are_drawn() -> None:
    one = DetectedObject("segment", 0.7, 0, None)
    assert "signed" in objects([one], [_signed()], RULE).caption
    assert "PER-IMAGE" in objects([one], panels(1), RULE, scale="per-image").caption


def _signed() -> Panel:
    grid = CellGrid.regular(3, 4, height=30, width=40)
    image = np.zeros((30, 40, 3), np.uint8)
    values = np.random.default_rng(1).normal(size=(3, 4))
    return Panel.of_map(image, Geometry.identity(30, 40), values, grid, signed=True)
