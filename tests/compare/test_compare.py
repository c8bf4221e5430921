"""Agreement between models: planted relations through different crops, refusals, and the words."""

import csv
import io
import json

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import spearmanr

from foveate.compare.agreement import compare
from foveate.compare.maps import MapRule, MapSet
from foveate.compare.report import to_csv, to_dict, to_text
from foveate.compare.shape import compare_shapes
from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry

RULE = MapRule("readout", "last of those kept", "mean of heads")
N = 24


def scene(geometry, n, blobs, habit=0.0):
    """What a model that looks at the blobs (original pixels) would attend to, by cell of its own grid."""
    edges = np.linspace(0, geometry.input_height, n + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    y, x = np.meshgrid(
        (middle - geometry.offset_y) / geometry.scale_y,
        (middle - geometry.offset_x) / geometry.scale_x,
        indexing="ij",
    )
    value = np.full((n, n), 0.05)
    for cy, cx in blobs:
        value += np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 8.0**2))
    return value + habit * np.exp(-((y - 30) ** 2 + (x - 45) ** 2) / (2 * 20.0**2))


def maps(kind="same", *, grid=8, crop=False, habit=0.0, seed=0, noise=0.02, n=N, **rule):
    rng, other = np.random.default_rng(0), np.random.default_rng(seed + 1)
    values, geometry = [], []
    for _ in range(n):
        blobs = rng.uniform([10, 25], [50, 65], (2, 2))
        if kind == "elsewhere":
            blobs = other.uniform([10, 25], [50, 65], (2, 2))
        side = 32
        scale = side / 60
        g = (
            Geometry(60, 90, side, side, scale, scale, 0.0, -(90 * scale - side) / 2)
            if crop
            else Geometry(60, 90, side, side, side / 60, side / 90)
        )
        made = scene(g, grid, blobs, habit) + noise * other.random((grid, grid))
        values.append(made / made.sum())
        geometry.append(g)
    cells = CellGrid.regular(grid, grid, height=32, width=32)
    used = MapRule(**{**RULE.__dict__, **rule})
    return MapSet(f"{kind}-{grid}", used, np.array(values), cells, tuple(geometry), ("",) * n, np.zeros(n))


def test_two_models_that_look_at_the_same_things_agree_through_different_grids_and_crops():
    result = compare(maps(grid=6), maps(grid=14, crop=True))
    assert result.reasons == ()
    assert {name: one.verdict for name, one in result.measures.items()} == dict.fromkeys(
        ("spearman", "top_overlap", "js_divergence"), "beyond chance"
    )
    assert result.measures["spearman"].own.estimate > 0.75
    assert 0 < result.meeting.lost_a.mean() < 0.5
    assert result.meeting.lost_b.mean() < 0.1


def test_a_shared_habit_is_not_agreement():
    result = compare(maps(habit=2.0), maps("elsewhere", grid=12, habit=2.0))
    spearman = result.measures["spearman"]
    assert spearman.own.estimate > 0.4
    assert spearman.verdict == "inconclusive"
    assert abs(spearman.excess.difference.estimate) < 0.1


def test_identical_maps_agree_fully():
    result = compare(maps(), maps())
    assert result.measures["spearman"].own[:3] == pytest.approx((1.0, 1.0, 1.0))
    assert result.measures["top_overlap"].own.estimate == pytest.approx(1.0)
    assert result.measures["js_divergence"].own.estimate == pytest.approx(0.0, abs=1e-12)


def test_numbers_per_image_are_scipys_on_the_common_cells():
    result = compare(maps(grid=6), maps(grid=14, crop=True))
    for i in range(N):
        a, b = result.meeting.a[i], result.meeting.b[i]
        seen = np.isfinite(a) & np.isfinite(b)
        assert 6 < seen.sum() < 36
        assert result.measures["spearman"].per_image.own[i] == pytest.approx(spearmanr(a[seen], b[seen]).statistic)
        js = jensenshannon(a[seen], b[seen], base=2) ** 2
        assert result.measures["js_divergence"].per_image.own[i] == pytest.approx(js)


def test_the_order_of_images_and_the_sides_do_not_matter():
    a, b = maps(grid=6, n=12), maps(grid=14, crop=True, n=12)
    mixed = np.random.default_rng(5).permutation(12)
    plain, permuted, swapped = compare(a, b), compare(a.take(mixed), b.take(mixed)), compare(b, a)
    for name, one in plain.measures.items():
        np.testing.assert_allclose(permuted.measures[name].per_image.excess, one.per_image.excess[mixed])
        np.testing.assert_allclose(swapped.measures[name].per_image.excess, one.per_image.excess)


def test_one_image_has_numbers_but_no_verdict():
    result = compare(maps(n=1), maps(n=1, grid=12))
    assert result.measures["spearman"].verdict == "no interval"
    assert np.isfinite(result.measures["spearman"].own.estimate)
    assert "One image" in to_text(result)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "rollout"}, "method is 'readout' and 'rollout'"),
        ({"layer": "all"}, "layer is"),
        ({"head": "0"}, "head is"),
        ({"target": "class"}, "target is '' and 'class'"),
        ({"options": {"baseline": "zero"}}, "option baseline is None and 'zero'"),
    ],
)
def test_what_was_made_differently_gets_a_reason_and_no_score(change, words):
    result = compare(maps(), maps(**change))
    assert result.measures == {}
    assert any(words in reason for reason in result.reasons)
    assert "No score" in to_text(result)
    assert to_dict(result)["reasons"]


def test_images_with_different_answers_are_left_out_and_counted():
    a, b = maps(), maps(grid=12)
    labels = ["cat"] * N
    b = MapSet(b.model, b.rule, b.values, b.grid, b.geometry, ("dog",) * 4 + ("cat",) * (N - 4), b.unplaced)
    a = MapSet(a.model, a.rule, a.values, a.grid, a.geometry, tuple(labels), a.unplaced)
    result = compare(a, b)
    assert result.kept == tuple(range(4, N))
    assert "4 images left out: the models explain different answers" in result.notes
    nobody = compare(a, MapSet(b.model, b.rule, b.values, b.grid, b.geometry, ("dog",) * N, b.unplaced))
    assert nobody.reasons


def test_missing_maps_are_left_out():
    a, b = maps(), maps(grid=12)
    a.values[3] = np.nan
    result = compare(a, b)
    assert 3 not in result.kept
    assert len(result.kept) == N - 1


def test_signed_maps_have_no_divergence_and_no_shape():
    a, b = maps(signed=True), maps(grid=12, signed=True)
    assert set(compare(a, b).measures) == {"spearman", "top_overlap"}
    assert compare_shapes(a, b) == []


def test_shape_statistics_do_not_depend_on_the_number_of_cells():
    """The same picture of attention, cut into 6 x 6 and 24 x 24: entropies differ, K-free numbers hardly."""
    coarse, fine = maps(grid=12, noise=0), maps(grid=36, noise=0)
    rows = {row.name: row for row in compare_shapes(coarse, fine)}
    for row in rows.values():
        assert row.a.estimate == pytest.approx(row.b.estimate, rel=0.06)
    assert set(rows) == {"entropy_normalised", "top10_lift", "hoyer"}
    sharp = maps(grid=12, noise=0)
    sharp.values[:] = sharp.values**3 / (sharp.values**3).sum((1, 2), keepdims=True)
    verdicts = {row.name: row.higher for row in compare_shapes(sharp, fine)}
    assert verdicts == {"entropy_normalised": "b", "top10_lift": "a", "hoyer": "a"}


def test_text_csv_and_json_hold_the_same_numbers():
    a, b = maps(grid=6), maps(grid=14, crop=True)
    result = compare(a, b)
    words = " ".join(to_text(result, compare_shapes(a, b)).split())
    assert "readout, last of those kept, mean of heads" in words
    assert f"n = {N} images" in words
    assert "Mass lost outside: A" in words
    assert "beyond chance" in words
    data = json.loads(json.dumps(to_dict(result, compare_shapes(a, b))))
    table = list(csv.DictReader(io.StringIO(to_csv(result, [f"i{k}" for k in range(N)]))))
    assert len(table) == N
    mean = np.mean([float(line["spearman"]) for line in table])
    assert mean == pytest.approx(data["measures"]["spearman"]["own"]["estimate"])


def test_different_numbers_of_images_are_refused():
    with pytest.raises(UsageError, match="same images"):
        compare(maps(), maps(n=3))
