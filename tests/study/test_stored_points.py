"""Sampling points in a run: the dense row comes back from them, and their metrics are what plain loops say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("transformers")

from detr_models import photos, tiny
from foveate.capture.sampling import reference_point, sampling_points
from foveate.capture.trace import trace
from foveate.cli import main
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.detection import sampling_points as points
from foveate.errors import StoreError, UsageError
from foveate.interfaces import CallKey, TokenAxis
from foveate.render.detection_stored import stored
from foveate.study.capture import run_capture
from foveate.study.measure import measure_run
from foveate.study.measure_points import NAMES, POINT_METRICS, stored_splat
from foveate.study.plan import build_plan

CROSS = "decoder.cross"


def captured(name: str, folder: Path, **options: Any) -> Run:
    pictures = folder / "pictures"
    pictures.mkdir()
    for sample in photos((64, 96), (64, 96), (64, 96)):
        Image.fromarray(sample.pixels).save(pictures / f"{sample.id}.png")
    source: Any = tiny(name)
    plan = build_plan(source, **{"rows": "all", "reductions": ("points",), "dtype": "float32", **options})
    run_capture(source, [pictures], folder / "run.zarr", plan=plan, batch_size=2, top=7)
    return Run.open(folder / "run.zarr")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return captured("RT-DETR", tmp_path_factory.mktemp("points"))


# ---------------------------------------------------------------------------------------- in the run


def test_points_are_labelled_and_the_run_is_valid(run: Run) -> None:
    site = run.site(CROSS)
    assert site["location"].dims == ("sample", "layer", "head", "query", "point", "yx")
    assert site["weight"].dims == site["inside"].dims == site["level"].dims == site["location"].dims[:-1]
    assert site["reference"].dims == ("sample", "layer", "query", "place")
    assert list(site["yx"].values) == ["y", "x"]
    assert list(site["place"].values) == ["y", "x", "height", "width"]
    assert site["inside"].dtype == bool
    assert "location" not in run.site("encoder.self")
    assert validate(run.path, deep=True) == []


@pytest.mark.parametrize("name", ["RT-DETRv2, discrete", "Deformable DETR"])
def test_the_stored_points_make_the_captured_rows(name: str, tmp_path: Path) -> None:
    run = captured(name, tmp_path)
    for site_id in run.site_ids:
        site = run.site(site_id)
        if "location" not in site:
            continue
        for position in run.ok:
            made = stored_splat(run, site_id, int(position))
            rows = site["attention"].isel(sample=int(position)).transpose(*made.dims)
            np.testing.assert_allclose(made.values, rows.values, atol=1e-5)
            assert list(made["query_index"].values) == list(site["query_index"].values)


def test_a_run_without_points_says_what_to_do(tmp_path: Path) -> None:
    run = captured("RT-DETR", tmp_path, reductions=("entropy",))
    with pytest.raises(UsageError, match="--reductions points"):
        stored_splat(run, CROSS, 0)
    with pytest.raises(UsageError, match="no sampling points were kept"):
        measure_run(run, ["points_in_image"])
    report = measure_run(run, ["entropy"])
    assert all(item.metric == "entropy" for item in report.written)


def test_plans_ask_points_of_deformable_sites_only() -> None:
    plan = build_plan(tiny("RT-DETR"), reductions=("entropy", "points"))
    kept = {part.site: part.reductions for part in plan.sites}
    assert kept[CROSS] == ("entropy", "points")
    assert kept["encoder.self"] == ("entropy",)
    with pytest.raises(UsageError, match="attends deformably"):
        build_plan(tiny("DETR"), reductions=("points",))
    with pytest.raises(UsageError, match="rows kept"):
        build_plan(tiny("RT-DETR"), reductions=("points",), rows="none")


# ------------------------------------------------------------------------------------------ pictures


def test_pictures_come_from_the_run_alone(run: Run, tmp_path: Path) -> None:
    """The run was captured from a source in memory: it could not be opened again."""
    with pytest.raises(StoreError, match="source in memory"):
        run.open_source()
    for kind in ("points", "splat"):
        out = tmp_path / f"{kind}.png"
        args = [
            "plot",
            str(run.path),
            "--kind",
            kind,
            "-o",
            str(out),
            "--query",
            "3",
            "--layer",
            "0",
            "--head",
            "1",
        ]
        result = CliRunner().invoke(main, args)
        assert result.exit_code == 0, result.output
        words = Image.open(out).info["Description"]
        assert "query 3" in words
        assert "head 1 of 4" in words


def test_drawn_points_are_those_of_the_model(run: Run) -> None:
    source: Any = tiny("RT-DETR")
    batch = source.encode([run.load_sample(0), run.load_sample(1)])  # the batch it was captured in
    with torch.no_grad():
        traced = trace(source, batch, sites=[CROSS])
        call = CallKey(CROSS, 1)
        expected = sampling_points(traced, call, 3, sample=1)
        reference = reference_point(source, batch, call, 3, sample=1)
    found, panel, rule = stored(run, 1, 3)
    order = np.argsort(expected.head, kind="stable")  # stored head by head
    for name, tolerance in (("y", 1e-2), ("x", 1e-2), ("weight", 1e-4), ("level", 0), ("head", 0)):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name)[order], atol=tolerance, rtol=1e-3)
    np.testing.assert_allclose(found.reference, reference, atol=1e-2)
    rows = run.site(CROSS)["attention"].isel(sample=1, layer=1, query=3).mean("head").values
    assert panel.values.sum() == pytest.approx(rows.sum(), abs=1e-4)
    assert "query 3, layer 1 of 0–1, mean of 4 heads" in str(rule)
    with pytest.raises(UsageError, match="query 99"):
        stored(run, 1, 99)
    with pytest.raises(UsageError, match="head 9"):
        stored(run, 1, 3, head=9)
    with pytest.raises(UsageError, match="no sampling points were kept of encoder"):
        stored(run, 1, 3, site="encoder.self")


# ------------------------------------------------------------------------------------------- metrics


def slow(site: Any, key: TokenAxis, at: tuple[int, int, int, int]) -> dict[str, Any]:
    """Every metric of one row (sample, layer, head, query), in plain Python from the definitions."""
    location, weight, level = (site[name].values[at].astype(float) for name in ("location", "weight", "level"))
    sample, layer, _, query = at
    ry, rx, rh, rw = (float(value) for value in site["reference"].values[sample, layer, query])
    sizes, counts = {}, {}
    for number in sorted(set(key.level.tolist())):
        cells = np.flatnonzero(key.level == number)
        sizes[number] = float(key.height[cells[0]]), float(key.width[cells[0]])
        counts[number] = len(set(key.y[cells].tolist())), len(set(key.x[cells].tolist()))
    mass, by_level = 0.0, [0.0] * len(sizes)
    in_cells, in_boxes = [], []
    for (y, x), share, of in zip(location, weight, level, strict=True):
        (height, width), (rows, columns) = sizes[int(of)], counts[int(of)]
        by_level[int(of)] += share
        for i in range(rows):
            for j in range(columns):
                down = max(0.0, 1 - abs(y / height - 0.5 - i))
                mass += share * down * max(0.0, 1 - abs(x / width - 0.5 - j))
        in_cells.append((share, (y - ry) / height, (x - rx) / width))
        in_boxes.append((share, (y - ry) / rh, (x - rx) / rw))
    found: dict[str, Any] = {"points_in_image": mass, "points_level_mass": by_level}
    for unit, offsets in (("cells", in_cells), ("boxes", in_boxes)):
        total = sum(share for share, _, _ in offsets)
        length = sum(share * math.hypot(y, x) for share, y, x in offsets) / total
        my, mx = (sum(o[0] * o[k] for o in offsets) / total for k in (1, 2))
        square = sum(share * ((y - my) ** 2 + (x - mx) ** 2) for share, y, x in offsets) / total
        found |= {f"points_distance_{unit}": length, f"points_spread_{unit}": math.sqrt(square)}
        if unit == "cells":
            found |= {"points_one_sided": math.hypot(my, mx) / length, "points_direction": math.atan2(my, mx)}
    return found


def test_every_metric_against_plain_loops(run: Run) -> None:
    report = measure_run(run, [metric.name for metric in POINT_METRICS], sites=[CROSS])
    assert {item.metric for item in report.written} == set(NAMES)
    site, key = run.site(CROSS).load(), run.tokens(CROSS, "key")
    shape = site["weight"].shape[:-1]
    chosen = np.random.default_rng(1).integers(0, shape, (12, 4))
    for at in map(tuple, chosen):
        expected = slow(site, key, at)
        assert set(expected) == set(NAMES)
        for name, value in expected.items():
            stored = run.product(f"metrics/{CROSS}/{name}")[name].values[at]
            np.testing.assert_allclose(stored, value, rtol=2e-4, atol=2e-4, err_msg=name)


def test_mass_in_the_image_is_the_sum_of_the_row(run: Run) -> None:
    measure_run(run, ["points_in_image"])
    stored = run.product(f"metrics/{CROSS}/points_in_image")["points_in_image"]
    rows = run.site(CROSS)["attention"].sum("key")
    np.testing.assert_allclose(stored.values, rows.values, atol=1e-5)
    assert stored.attrs["computed_from"] == "stored float32 sampling points"


def test_the_command_lists_summarises_and_writes_them(run: Run) -> None:
    listed = json.loads(CliRunner().invoke(main, ["metrics", "--list", "--json"]).output)
    assert set(NAMES) <= {item["name"] for item in listed["metrics"]}
    result = CliRunner().invoke(main, ["metrics", str(run.path), "--site", CROSS, "--json", "--overwrite"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    lines = {line["metric"]: line for line in told["summary"]}
    assert lines["points_in_image"]["n"] == len(run)
    assert 0 < lines["points_in_image"]["mean"] <= 1
    assert "points_direction" not in lines  # an angle has no plain mean
    assert "points_level_mass" not in lines
    assert "entropy" in lines


# ------------------------------------------------------------------------------------- properties


def keys() -> TokenAxis:
    parts = [TokenAxis.patches(n, n + 1, height=48.0, width=60.0, level=3 + i) for i, n in enumerate((8, 4, 2))]
    return TokenAxis.concat(*parts, TokenAxis.of_kind("padding", 4))


def cloud(*shape: int, seed: int = 0, span: float = 1.6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    location = (rng.random((*shape, 2)) - 0.5) * span * np.array([48.0, 60.0]) + np.array([24.0, 30.0])
    return location, rng.dirichlet(np.ones(shape[-1]), shape[:-1]), rng.integers(0, 3, shape)


def test_rows_are_sums_over_points_and_sum_to_the_mass_in_the_image() -> None:
    location, weight, level = cloud(2, 3, 4, 5, 12)
    rows = points.splat(location, weight, level, keys())
    np.testing.assert_allclose(rows.sum(-1), points.image_mass(location, weight, level, keys()), atol=1e-12)
    order = np.random.default_rng(2).permutation(12)
    moved = points.splat(location[..., order, :], weight[..., order], level[..., order], keys())
    np.testing.assert_allclose(moved, rows, atol=1e-14)
    np.testing.assert_array_equal(points.splat(location[1], weight[1], level[1], keys()), rows[1])
    assert (rows[..., -4:] == 0).all()  # padding behind the maps reads nothing
    far = points.splat(location + 1e4, weight, level, keys())
    assert (far == 0).all()


def test_turning_the_picture_turns_directions_and_nothing_else() -> None:
    rng = np.random.default_rng(3)
    offset, weight = rng.normal(size=(4, 9, 2)), rng.dirichlet(np.ones(9), 4)
    level, angle = np.zeros((4, 9), int), 0.7
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])  # of (y, x)
    key = TokenAxis.patches(4, 4, height=4.0, width=4.0, level=0)
    reference = np.zeros((4, 4))

    def offsets(values: np.ndarray) -> points.Offsets:
        args = (values[None, None], weight[None, None], level[None, None], reference[None])
        return points.offsets_in_cells(*args, key)

    before, after = offsets(offset), offsets(offset @ turn.T)
    for name in ("length", "spread", "one_sided"):
        np.testing.assert_allclose(getattr(after, name), getattr(before, name), atol=1e-12)
    turned = (after.direction - before.direction + np.pi) % (2 * np.pi) - np.pi
    np.testing.assert_allclose(turned, angle, atol=1e-12)


def test_what_is_not_defined_is_nan() -> None:
    location, weight, level = cloud(1, 1, 2, 5)
    reference = np.array([[[24.0, 30.0, 0.0, 0.0], [24.0, 30.0, 6.0, 6.0]]])
    found = points.offsets_in_boxes(location, weight, reference)
    assert np.isnan(found.length[0, 0, 0])
    assert np.isfinite(found.length[0, 0, 1])
    still = points.offsets_in_cells(
        np.broadcast_to(np.array([24.0, 30.0]), location.shape), weight, level, reference, keys()
    )
    assert (still.length == 0).all()
    assert np.isnan(still.direction).all()
    assert np.isnan(still.one_sided).all()
    with pytest.raises(UsageError, match="full grid"):
        points.level_cells(TokenAxis.patches(3, 3, height=9.0, width=9.0, level=0).take(range(8)))
    with pytest.raises(UsageError, match="no key has a place"):
        points.level_cells(TokenAxis.of_kind("object", 3))
