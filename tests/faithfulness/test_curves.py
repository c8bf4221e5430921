"""Deletion and insertion against a literal loop over pictures, and the properties the protocol promises."""

import numpy as np
import pytest
import torch

from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol, area_under, forward_count, perturbation_curves
from foveate.faithfulness.orders import cell_order, random_maps, to_cells
from foveate.geometry import CellGrid
from foveate.interfaces import Target
from foveate.testing.tiny import TinySource, tiny_samples

PROTOCOL = Protocol(steps=5)


def build(count=3, *, rows=None, seed=0):
    source = TinySource(seed=1)
    batch = source.encode(tiny_samples(count, seed=seed))
    bound = source.bind(source.forward(batch), batch, Target())
    return Objective(source, batch, bound, rows=rows)


def orders_of(objective, maps=2, seed=0):
    values = np.random.default_rng(seed).normal(size=(maps, len(objective), 16))
    return cell_order(values, objective.batch.ids, seed=0)


def cells_of(objective):
    return objective.source.cells(objective.batch)


def slow_curve(objective, order, target, mode, baseline, scale):
    """One picture at a time, patch by patch, scores straight from the module."""
    x, base = objective.inputs[target], make_baseline(baseline, objective)[target]
    label = objective.bound.rows[target].class_index
    scores = []
    for k in (0, 3, 6, 10, 13, 16):  # 16 cells in 5 steps: 3.2, 6.4, then the mirror image
        picture = x.clone() if mode == "deletion" else base.clone()
        for cell in order[:k]:
            y, c = divmod(int(cell), 4)
            window = (slice(None), slice(8 * y, 8 * y + 8), slice(8 * c, 8 * c + 8))
            picture[window] = base[window] if mode == "deletion" else x[window]
        with torch.no_grad():
            logits = objective.source.module(picture[None])[0]
        scores.append(float((logits.softmax(-1) if scale == "probability" else logits)[label]))
    return np.array(scores)


@pytest.mark.parametrize("b", [0, 1])
@pytest.mark.parametrize("m", [0, 1])
def test_curves_are_those_of_a_literal_loop(b, m):
    objective = build()
    orders = orders_of(objective)
    curves = perturbation_curves(objective, orders, cells_of(objective), PROTOCOL)
    for index in np.ndindex(2, 3, 2):
        row, target, s = index
        slow = slow_curve(
            objective,
            orders[row, target],
            target,
            ("deletion", "insertion")[m],
            PROTOCOL.baselines[b],
            PROTOCOL.scales[s],
        )
        np.testing.assert_allclose(curves.values[row, target, m, b, s], slow, atol=2e-5)
    assert np.ptp(curves.values[:, :, m, b, 0], axis=-1).max() > 0.01, "the model must react for this to be a test"


def test_ends_are_the_image_and_the_baseline_for_every_order():
    objective = build()
    curves = perturbation_curves(objective, orders_of(objective, 4), cells_of(objective), PROTOCOL).values
    np.testing.assert_array_equal(curves[:, :, 0, ..., 0], curves[:, :, 1, ..., -1])
    np.testing.assert_array_equal(curves[:, :, 0, ..., -1], curves[:, :, 1, ..., 0])
    assert np.all(curves[..., 0] == curves[:1, ..., 0])


def test_insertion_is_deletion_along_the_reversed_order_read_backwards():
    objective = build()
    orders = orders_of(objective)
    both = perturbation_curves(
        objective, np.concatenate([orders, orders[..., ::-1]]), cells_of(objective), PROTOCOL
    ).values
    np.testing.assert_array_equal(both[:2, :, 1], both[2:, :, 0][..., ::-1])


def test_blocks_batches_and_the_order_of_images_do_not_matter():
    objective = build(4)
    orders = orders_of(objective)
    whole = perturbation_curves(objective, orders, cells_of(objective), PROTOCOL).values
    narrow = perturbation_curves(build(4, rows=1), orders, cells_of(objective), PROTOCOL).values
    np.testing.assert_allclose(whole, narrow, atol=2e-6)
    for target in range(4):
        single = objective.take([target])
        alone = perturbation_curves(single, orders[:, [target]], cells_of(objective), PROTOCOL).values
        np.testing.assert_allclose(whole[:, target], alone[:, 0], atol=2e-6)
    mixed = [2, 0, 3, 1]
    permuted = perturbation_curves(objective.take(mixed), orders[:, mixed], cells_of(objective), PROTOCOL)
    np.testing.assert_allclose(permuted.values, whole[:, mixed], atol=2e-6)


def test_the_target_stays_bound_when_the_answer_changes():
    objective = build()
    answers = objective.source.forward(objective.batch).argmax(-1).tolist()
    changed = objective.source.module(make_baseline("mean", objective)).argmax(-1).tolist()
    curves = perturbation_curves(objective, orders_of(objective), cells_of(objective), PROTOCOL).values
    with torch.no_grad():
        probability = objective.source.module(make_baseline("mean", objective)).softmax(-1)
    np.testing.assert_allclose(
        curves[0, :, 0, 0, 0, -1], probability[range(3), answers].numpy(), atol=1e-6
    )  # of the first answer, whatever the model now says
    assert answers != changed


def test_a_uniform_map_scores_like_random_not_like_a_pattern():
    objective = build(24)
    cells = cells_of(objective)
    uniform = to_cells(np.full((24, 4, 4), 1 / 16, np.float32), cells, cells)
    spatial = np.tile(np.arange(16), (1, 24, 1))
    orders = np.concatenate([cell_order(uniform[None], objective.batch.ids, seed=s) for s in range(6)])
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0, 0], orders[0, 1]), "images must not share one pattern"
    random = np.stack([random_maps(i, 16, orders=20, seed=0) for i in objective.batch.ids], 1)
    random_orders = cell_order(random, objective.batch.ids, seed=0)
    areas = perturbation_curves(objective, np.concatenate([orders, random_orders, spatial]), cells, PROTOCOL).areas
    difference = (areas[:6].mean(0) - areas[6:26].mean(0))[:, :, 0, 0]
    error = difference.std(0, ddof=1) / np.sqrt(24)
    assert np.all(np.abs(difference.mean(0)) < 3.5 * error)


def test_planted_evidence_is_found_early_by_the_right_order_and_late_by_the_reverse():
    objective = build(12)
    effect = []
    with torch.no_grad():  # single-cell effect measured by hand
        intact = objective(objective.inputs)
        base = make_baseline("mean", objective)
        for cell in range(16):
            y, c = divmod(cell, 4)
            x = objective.inputs.clone()
            x[..., 8 * y : 8 * y + 8, 8 * c : 8 * c + 8] = base[..., 8 * y : 8 * y + 8, 8 * c : 8 * c + 8]
            effect.append((intact - objective(x)).numpy())
    effect = np.stack(effect, -1)
    orders = cell_order(np.stack([effect, -effect]), objective.batch.ids, seed=0)
    deletion = perturbation_curves(objective, orders, cells_of(objective), PROTOCOL).areas[:, :, 0, 0, 0]
    assert deletion[0].mean() < deletion[1].mean() - 0.05


def test_only_distinct_pictures_are_shown_and_the_estimate_is_an_upper_bound():
    objective = build(2)
    cells = cells_of(objective)
    values = np.random.default_rng(0).normal(size=(3, 2, 16))
    random = np.stack([random_maps(i, 16, orders=20, seed=0) for i in objective.batch.ids], 1)
    orders = cell_order(np.concatenate([values, random]), objective.batch.ids, seed=0)
    curves = perturbation_curves(objective, orders, cells, PROTOCOL)
    assert curves.forwards <= 2 * forward_count(3, 20, 16, PROTOCOL)
    assert curves.forwards > 0.9 * 2 * forward_count(3, 20, 16, PROTOCOL)


@pytest.mark.parametrize(("steps", "cells"), [(1, 9), (2, 5), (5, 16), (10, 64), (10, 7), (7, 576), (20, 16)])
def test_steps_run_from_nothing_to_everything_symmetrically(steps, cells):
    counts = Protocol(steps=steps).counts(cells)
    assert counts[0] == 0
    assert counts[-1] == cells
    assert np.all(np.diff(counts) > 0)
    np.testing.assert_array_equal(counts, cells - counts[::-1])
    if steps <= cells:
        assert len(counts) == steps + 1 + (steps % 2 == 0 and cells % 2)
        nearest = np.abs(counts[:, None] - np.arange(steps + 1) * cells / steps).min(axis=1)
        assert nearest.max() <= 0.5


def test_area_is_the_trapezoid_over_true_fractions():
    fractions = np.array([0, 3, 10, 16]) / 16
    assert area_under(1 - fractions, fractions) == pytest.approx(0.5)
    assert area_under(np.array([1.0, 0, 0, 0]), fractions) == pytest.approx(0.5 * 3 / 16)


def test_maps_of_other_resolutions_are_pooled_by_area_and_unknown_cells_come_last():
    cells = CellGrid.regular(4, 4, height=32, width=32)
    fine = np.random.default_rng(0).random((1, 32, 32))
    pooled = to_cells(fine, CellGrid.regular(32, 32, height=32, width=32), cells)
    np.testing.assert_allclose(pooled[0], fine[0].reshape(4, 8, 4, 8).mean((1, 3)).ravel())
    half = to_cells(np.ones((1, 2, 2)), CellGrid.regular(2, 2, height=16, width=32), cells)
    assert set(cell_order(half, ["a"], seed=0)[0, 8:]) == set(range(8, 16))
    assert np.isnan(to_cells(np.full((1, 4, 4), np.inf), cells, cells)).all()


def test_wrong_shapes_and_protocols_are_refused():
    objective = build()
    with pytest.raises(UsageError, match="expected orders"):
        perturbation_curves(objective, np.zeros((1, 3, 15), int), cells_of(objective), PROTOCOL)
    with pytest.raises(UsageError, match="steps"):
        Protocol(steps=0)
    with pytest.raises(UsageError, match="even number"):
        random_maps("a", 16, orders=3, seed=0)
