"""Masses, bands, cuts, approximations and curves against slow definitions."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from foveate.detection import approximation, boundary, importance, redundancy, scale, segmentation
from foveate.detection.approximation_structure import axial_share, window_share
from foveate.detection.levels import level_mass
from foveate.detection.matching import match_objects
from foveate.detection.objects_mass import group_mass, object_exchange
from foveate.detection.precision import ImageDetections
from foveate.detection.readouts import layer_stability
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import TokenAxis

Array = NDArray[np.float64]


def peaked(rng: np.random.Generator, *shape: int) -> Array:
    scores = 4 * rng.standard_normal(shape)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray(weights / weights.sum(-1, keepdims=True))


def grid(rng: np.random.Generator, rows: int, columns: int) -> CellGrid:
    return CellGrid(np.cumsum(rng.uniform(2, 6, rows + 1)), np.cumsum(rng.uniform(2, 6, columns + 1)))


# ------------------------------------------------------------------------------- masses


def test_group_mass_against_loops() -> None:
    rng = np.random.default_rng(0)
    rows = peaked(rng, 2, 5, 7)
    rows[..., 6] = np.nan  # padding
    of_query, of_key = rng.random((3, 5)), rng.random((2, 7))
    of_query[2] = 0
    mass, share = group_mass(rows, of_query, of_key)
    for head, g, h in itertools.product(range(2), range(2), range(2)):
        total = weight = 0.0
        for i in range(5):
            seen = sum(rows[head, i, j] for j in range(6))
            total += of_query[g, i] * sum(rows[head, i, j] * of_key[h, j] for j in range(6)) / seen
            weight += of_query[g, i]
        assert mass[head, g, h] == pytest.approx(total / weight)
    assert np.isnan(mass[:, 2]).all()
    assert share == pytest.approx(of_key[:, :6].mean(1))
    with pytest.raises(UsageError, match="does not fit"):
        group_mass(rows, of_key, of_query)


def test_uniform_attention_gives_each_group_its_share() -> None:
    rng = np.random.default_rng(1)
    mass, share = group_mass(np.full((4, 6), 1 / 6), rng.random((2, 4)), rng.random((3, 6)))
    assert mass == pytest.approx(np.broadcast_to(share, (2, 3)))


def test_exchange_of_objects_against_loops() -> None:
    rows = peaked(np.random.default_rng(2), 3, 6, 6)
    found = [4, 1]
    mass, share = object_exchange(rows, found)
    for head in range(3):
        own = np.mean([rows[head, i, i] for i in found])
        others = np.mean([sum(rows[head, i, j] for j in found if j != i) for i in found])
        assert mass[head] == pytest.approx([own, others, 1 - own - others])
    assert share == pytest.approx([1 / 6, 1 / 6, 4 / 6])
    assert np.isnan(object_exchange(rows, [])[0]).all()
    assert object_exchange(rows, [3])[0][:, 1] == pytest.approx(0)
    with pytest.raises(UsageError, match="self-attention"):
        object_exchange(rows[:, :2], [0])


def test_levels_keep_their_numbers() -> None:
    key = TokenAxis.concat(
        TokenAxis.patches(2, 2, height=8, width=8, level=3), TokenAxis.patches(1, 1, height=8, width=8, level=1)
    )
    query = TokenAxis.concat(TokenAxis.of_kind("object", 2), key)
    rows = peaked(np.random.default_rng(3), 7, 5)
    found = level_mass(rows, query, key)
    assert (found.query_levels, found.key_levels, found.equal) == ((-1, 1, 3), (1, 3), 0.5)
    assert found.share == pytest.approx([0.2, 0.8])
    assert found.mass[0] == pytest.approx([rows[:2, 4].mean(), rows[:2, :4].sum(-1).mean()])
    assert found.mass[2] == pytest.approx([rows[2:6, 4].mean(), rows[2:6, :4].sum(-1).mean()])


# ------------------------------------------------------------------------------- borders


def test_band_of_a_box_against_fine_points() -> None:
    rng = np.random.default_rng(4)
    cells = CellGrid.regular(5, 6, height=40, width=48)
    box = rng.uniform(5, 15, 2).tolist() + rng.uniform(22, 38, 2).tolist()
    band = boundary.box_band(cells, box, 5.0)
    n = 40  # points a cell and axis
    y, x = (np.arange(k * n) + 0.5 for k in (5, 6))
    y, x = y * 40 / y.size, x * 48 / x.size

    def inside(grow: float) -> NDArray[np.bool_]:
        rows = (y > box[0] - grow) & (y < box[2] + grow)
        return rows[:, None] & ((x > box[1] - grow) & (x < box[3] + grow))[None]

    points = (inside(2.5) & ~inside(-2.5)).reshape(5, n, 6, n).mean((1, 3))
    assert band == pytest.approx(points, abs=0.04)
    thin = boundary.box_band(cells, [10, 10, 11, 11], 4.0)
    assert (thin * cells.areas).sum() == pytest.approx(25)
    with pytest.raises(UsageError, match="positive"):
        boundary.box_band(cells, box, 0)


def test_band_of_a_mask_against_all_pairs() -> None:
    rng = np.random.default_rng(5)
    mask = np.zeros((12, 15), np.bool_)
    mask[3:9, 4:11] = True
    mask[rng.random(mask.shape) < 0.05] ^= True
    cells = CellGrid.regular(3, 5, height=12, width=15)
    near = np.zeros(mask.shape)
    for i, j in np.ndindex(*mask.shape):
        other = np.argwhere(mask != mask[i, j])
        near[i, j] = np.sqrt(((other - [i, j]) ** 2).sum(1)).min() - 0.5 <= 1.5
    assert boundary.mask_band(cells, mask, 3.0) == pytest.approx(near.reshape(3, 4, 5, 3).mean((1, 3)))
    assert not boundary.mask_band(cells, np.ones((12, 15), np.bool_), 3.0).any()


def test_enrichment_of_uniform_density_is_one_wherever_the_band_lies() -> None:
    rng = np.random.default_rng(6)
    cells = grid(rng, 6, 7)
    band = rng.random((6, 7))
    uniform = cells.areas.copy()
    assert boundary.enrichment(uniform, band, cells.areas) == pytest.approx(1)
    uniform[2] = np.nan
    assert boundary.enrichment(uniform, band, cells.areas) == pytest.approx(1)
    assert math.isnan(boundary.enrichment(np.zeros((6, 7)), band, cells.areas))
    assert math.isnan(boundary.enrichment(cells.areas, 0 * band, cells.areas))


def test_attention_on_a_border_beats_the_same_box_elsewhere() -> None:
    cells = CellGrid.regular(24, 24, height=96, width=96)
    box = [20.0, 30.0, 60.0, 70.0]
    own, null = boundary.box_enrichment(boundary.box_band(cells, box, 8.0), cells, box, width=8.0, size=(96, 96))
    assert own > 2 * null
    moved = boundary.shifted_boxes(box, (96, 96), count=200)
    assert moved[:, :2].min() >= 0
    assert moved[:, 2:].max() <= 96
    assert moved[:, 2:] - moved[:, :2] == pytest.approx(np.full((200, 2), 40))
    assert moved[:, 0].mean() == pytest.approx(28, abs=4)
    too_high = boundary.shifted_boxes([-5, 0, 200, 10], (96, 96), count=3)
    assert (too_high[:, 0] == -5).all()


# ------------------------------------------------------------------------------- scale


def test_divergence_against_the_definition() -> None:
    rng = np.random.default_rng(7)
    p, q = peaked(rng, 12), peaked(rng, 12)
    m = (p + q) / 2
    expected = sum(a * math.log2(a / c) + b * math.log2(b / c) for a, b, c in zip(p, q, m, strict=True)) / 2
    assert scale.divergence(3 * p, q) == pytest.approx(expected)
    assert scale.divergence([1, 0, np.nan], [0, 1, 5]) == pytest.approx(1)
    assert math.isnan(scale.divergence([0, 0], [1, 1]))


def test_a_map_on_finer_cells_is_the_same_map() -> None:
    rng = np.random.default_rng(8)
    coarse = CellGrid.regular(4, 5, height=40, width=60)
    fine = CellGrid.regular(8, 10, height=40, width=60)
    values = rng.random((4, 5))
    spread = np.repeat(np.repeat(values, 2, 0), 2, 1) / 4
    assert scale.scale_divergence(values, coarse, spread, fine) == pytest.approx(0, abs=1e-12)
    assert scale.scale_divergence(spread, fine, rng.random((4, 5)) ** 4, coarse) > 0.05


# ------------------------------------------------------------------------------- masks


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(0.05, 0.95))
def test_mass_mask_is_the_smallest_set(values: list[float], share: float) -> None:
    taken = segmentation.mass_mask(values, share)
    if sum(values) == 0:
        assert not taken.any()
        return
    enough = [
        k
        for k in range(1, len(values) + 1)
        for chosen in itertools.combinations(values, k)
        if sum(chosen) >= share * sum(values) * (1 - 1e-9)
    ]
    assert int(taken.sum()) == min(enough)
    assert np.array(values)[taken].sum() >= share * sum(values) * (1 - 1e-9)


def test_otsu_finds_the_largest_variance_between_classes() -> None:
    rng = np.random.default_rng(9)
    values = np.concatenate([rng.normal(0.2, 0.03, 60), rng.normal(0.8, 0.05, 20)]).reshape(8, 10)
    cuts = np.sort(values.ravel())[:-1]
    between = [
        (values <= c).mean() * (values > c).mean() * (values[values <= c].mean() - values[values > c].mean()) ** 2
        for c in cuts
    ]
    best = values > cuts[int(np.argmax(between))]
    assert np.array_equal(segmentation.otsu_mask(values), best)
    assert np.array_equal(segmentation.otsu_mask(1e-3 * values), best)
    assert not segmentation.otsu_mask(np.ones((3, 3))).any()


def test_jaccard_table_and_chance() -> None:
    rng = np.random.default_rng(10)
    a, b = rng.random((3, 4, 5)) < 0.4, rng.random((2, 4, 5)) < 0.4
    table = segmentation.jaccard_table(a, b)
    for i, j in np.ndindex(3, 2):
        assert table[i, j] == pytest.approx(segmentation.jaccard(a[i], b[j]))
    mask = np.array([True, True, False, False])
    every = [np.isin(np.arange(4), chosen) for chosen in itertools.combinations(range(4), 2)]
    expected = np.mean([segmentation.jaccard(one, mask) for one in every])
    assert segmentation.chance_jaccard(2, mask, draws=4000) == pytest.approx(expected, abs=0.02)
    assert math.isnan(segmentation.jaccard(0 * mask == 1, 0 * mask == 1))


def test_mask_precision_falls_with_the_threshold() -> None:
    image = ImageDetections(np.ones(1), np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([[0.52]]))
    assert segmentation.mask_precision([image]) == pytest.approx(7 / 16)  # 0.2 to 0.5
    assert (len(segmentation.THRESHOLDS), segmentation.THRESHOLDS[-1]) == (16, 0.95)


# ------------------------------------------------------------------------------- heads


def test_importance_takes_absolute_values_before_the_mean() -> None:
    rng = np.random.default_rng(11)
    a, g = peaked(rng, 2, 3, 4, 5), rng.standard_normal((2, 3, 4, 5))
    gates = importance.gate_gradient(a, g)
    assert gates[1, 2] == pytest.approx(sum(a[1, 2, i, j] * g[1, 2, i, j] for i in range(4) for j in range(5)))
    found = importance.importance(np.array([[[3.0, 1.0], [0, 0]], [[-3.0, np.nan], [0, 0]]]))
    assert found[0] == pytest.approx(np.array([3, 1]) / math.sqrt(10))
    assert found[1] == pytest.approx([0, 0])


# ------------------------------------------------------------------------------- readouts, redundancy


def boxes_at(rng: np.random.Generator, *shape: int) -> Array:
    start = rng.uniform(0, 60, (*shape, 2))
    return np.concatenate([start, start + rng.uniform(10, 30, (*shape, 2))], -1)


def test_stability_against_a_matching_by_trial() -> None:
    rng = np.random.default_rng(12)
    p, b = rng.dirichlet(np.full(3, 0.3), (3, 4)), boxes_at(rng, 3, 4)
    classes, objects = [0, 2], boxes_at(rng, 2)
    found = layer_stability(p, b, classes, objects, size=(96, 96))

    def best(layer: int) -> tuple[int, ...]:
        cost = match_objects(p[layer], b[layer], classes, objects, size=(96, 96)).cost
        return min(itertools.permutations(range(4), 2), key=lambda q: sum(cost[i, j] for j, i in enumerate(q)))

    last = best(2)
    for layer in range(3):
        assert found.same_query[layer] == np.mean([a == z for a, z in zip(best(layer), last, strict=True)])
        same = [p[layer, q].argmax() == p[2, q].argmax() for q in last]
        assert found.same_class[layer] == np.mean(same)
        assert found.score[layer] == pytest.approx(
            np.mean([p[layer, q, c] for q, c in zip(last, classes, strict=True)])
        )
    assert (found.same_query[-1], found.overlap[-1], found.same_class[-1]) == (1, pytest.approx(1), 1)
    assert np.isnan(layer_stability(p, b, [], np.zeros((0, 4)), size=(96, 96)).same_query).all()
    with pytest.raises(UsageError, match="do not fit"):
        layer_stability(p[0], b, classes, objects, size=(96, 96))


def test_duplicates_are_the_less_sure_ones() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [50, 50, 60, 60]]
    scores, classes = [0.6, 0.9, 0.8, 0.7], [1, 1, 2, 1]
    assert redundancy.duplicates(scores, classes, boxes).tolist() == [True, False, False, False]
    curve = redundancy.duplicate_curve(scores, classes, boxes, thresholds=(0.5, 0.65, 0.95))
    assert curve == pytest.approx([0.25, 0, np.nan], nan_ok=True)
    assert redundancy.duplicates([], [], np.zeros((0, 4))).size == 0


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**15 - 1))
def test_drop_curve_is_the_mean_over_all_subsets(queries: int, objects: int, bits: int) -> None:
    finds = np.array([bits >> i & 1 for i in range(queries * objects)], np.bool_).reshape(queries, objects)
    keep = range(queries + 1)
    expected = [
        np.mean([finds[list(chosen)].any(0).mean() for chosen in itertools.combinations(range(queries), k)])
        for k in keep
    ]
    assert redundancy.drop_curve(finds, list(keep)) == pytest.approx(expected, abs=1e-9)


def test_found_needs_class_and_place() -> None:
    found = redundancy.found_by([1, 2, 1], [[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 12, 12]], [1], [[0, 0, 4, 5]])
    assert found[:, 0].tolist() == [True, False, False]
    assert np.isnan(redundancy.drop_curve(np.zeros((3, 0), np.bool_), [1])).all()


# ------------------------------------------------------------------------------- approximations


def test_sparse_keeps_the_largest_and_the_sum() -> None:
    a = peaked(np.random.default_rng(13), 2, 4, 6)
    kept = approximation.sparse(a, 2)
    for index in np.ndindex(2, 4):
        top = np.sort(a[index])[-2:]
        assert (kept[index] > 0).sum() == 2
        assert kept[index].sum() == pytest.approx(1)
        assert kept[index].max() == pytest.approx(top[1] / top.sum())
    assert approximation.sparse(a, 6) == pytest.approx(a)


def test_low_rank_is_best_by_its_discarded_spectrum() -> None:
    a = peaked(np.random.default_rng(14), 8, 8)
    eigenvalues = np.sort(np.linalg.eigvalsh(a.T @ a))[::-1].clip(0)
    for rank in (1, 3, 8):
        made = approximation.low_rank(a, rank)
        assert np.linalg.norm(a - made) == pytest.approx(math.sqrt(eigenvalues[rank:].sum()), abs=1e-6)
    p = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    assert approximation.effective_rank(a) == pytest.approx(
        math.exp(-sum(v * math.log(v) for v in p if v > 0)), rel=1e-5
    )
    assert approximation.effective_rank(np.stack([np.full((4, 4), 0.25), np.eye(4)])) == pytest.approx([1, 4])
    assert math.isnan(approximation.effective_rank(np.zeros((2, 2))))


def test_random_features_converge_to_softmax() -> None:
    rng = np.random.default_rng(15)
    q, k = 0.8 * rng.standard_normal((2, 5, 4)), 0.8 * rng.standard_normal((2, 6, 4))
    scores = q @ np.swapaxes(k, -1, -2) / 2
    exact = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    rough, fine = (np.abs(approximation.linear(q, k, n, seed=1) - exact).max() for n in (4, 20000))
    assert fine < 0.04 < 0.1 < rough
    assert approximation.linear(30 * q, k, 16).sum(-1) == pytest.approx(np.ones((2, 5)))  # nothing overflows


def test_errors_at_one_budget() -> None:
    rng = np.random.default_rng(16)
    q, k, v = rng.standard_normal((3, 10, 4)), rng.standard_normal((3, 8, 4)), rng.standard_normal((3, 8, 5))
    scores = 2 * q @ np.swapaxes(k, -1, -2)
    a = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    found = approximation.errors_at(a, v, 4, q=q, k=k, scale=2.0)
    assert tuple(found) == approximation.METHODS
    uniform = np.broadcast_to(v.mean(1, keepdims=True), (3, 10, 5))
    by_hand = [np.linalg.norm(a[i] @ v[i] - uniform[i]) / np.linalg.norm(a[i] @ v[i]) for i in range(3)]
    assert found["uniform"] == pytest.approx(by_hand)
    assert (found["sparse"] < found["uniform"]).all()
    assert "linear" not in approximation.errors_at(a, v, 4)
    assert (approximation.rank_at(4, 10, 8), approximation.rank_at(1, 10, 8)) == (2, 1)
    with pytest.raises(UsageError, match="budget"):
        approximation.errors_at(a, v, 0)


def test_window_and_axial_shares_against_loops() -> None:
    even = TokenAxis.patches(4, 5, height=32, width=50)
    y, x = (np.unique(values, return_inverse=True)[1] for values in (even.y, even.x))
    uneven = {"y": np.float32([2, 6, 15, 30])[y], "x": np.float32([1, 9, 20, 25, 40])[x]}  # cells of many sizes
    tokens = replace(even, **uneven)
    rows = peaked(np.random.default_rng(17), 2, 20, 20)
    window, axial = window_share(rows, tokens, tokens, 1), axial_share(rows, tokens, tokens)
    for head in range(2):
        near = line = 0.0
        for i, j in itertools.product(range(20), repeat=2):
            (a, b), (c, d) = divmod(i, 5), divmod(j, 5)
            near += rows[head, i, j] * (abs(a - c) <= 1 and abs(b - d) <= 1) / 20
            line += rows[head, i, j] * (a == c or b == d) / 20
        assert (window.mass[head], axial.mass[head]) == (pytest.approx(near), pytest.approx(line))
    assert axial.uniform == pytest.approx(8 / 20)
    with pytest.raises(UsageError, match="without a place"):
        axial_share(rows, TokenAxis.of_kind("object", 20), tokens)
