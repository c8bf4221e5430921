"""Agreement beyond chance: the fast null against all pairs one by one, and planted relations."""

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from foveate.stats.agreement import JS_DIVERGENCE, SPEARMAN, TOP_OVERLAP, agreement, js_divergence

MEASURES = (SPEARMAN, TOP_OVERLAP, JS_DIVERGENCE)


def maps(n=7, cells=30, seed=0):
    rng = np.random.default_rng(seed)
    habit = rng.random(cells)  # what all images share
    return rng.random((n, cells)) + 2 * habit, rng.random((n, cells)) + 2 * habit


def slow_null(a, b, measure):
    n = len(a)
    return np.array(
        [
            np.mean(
                [
                    (float(measure.score(a[i], b[j])) + float(measure.score(a[j], b[i]))) / 2
                    for j in range(n)
                    if j != i
                ]
            )
            for i in range(n)
        ]
    )


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_null_is_the_mean_over_all_other_images(measure):
    a, b = maps()
    result = agreement(a, b, measure)
    np.testing.assert_allclose(result.null, slow_null(a, b, measure), atol=1e-12)
    np.testing.assert_allclose(result.own, [measure.score(x, y) for x, y in zip(a, b, strict=True)])


@pytest.mark.parametrize("measure", [SPEARMAN, TOP_OVERLAP], ids=lambda m: m.name)
def test_null_with_unknown_cells_and_ties(measure):
    a, b = (np.round(m, 1) for m in maps())
    b[:, 3] = np.nan  # nobody knows this cell: still the fast way
    np.testing.assert_allclose(agreement(a, b, measure).null, slow_null(a, b, measure), atol=1e-12)
    a[2, :9] = np.nan  # images differ: pair by pair
    np.testing.assert_allclose(agreement(a, b, measure).null, slow_null(a, b, measure), atol=1e-12)


def test_what_all_images_share_is_no_agreement_but_what_is_theirs_is():
    a, b = maps(60, 64)
    habit = agreement(a, b, SPEARMAN)
    assert habit.own.mean() > 0.5
    assert abs(habit.excess.mean()) < 0.05
    same = agreement(a, a, SPEARMAN)
    np.testing.assert_allclose(same.own, 1.0)
    assert same.excess.mean() > 0.15


@pytest.mark.parametrize("measure", MEASURES, ids=lambda m: m.name)
def test_excess_is_positive_for_identical_maps_on_every_measure(measure):
    a, _ = maps(20)
    assert np.all(agreement(a, a, measure).excess > 0)


def test_many_images_use_seeded_partners_close_to_all_pairs():
    a, b = maps(60)
    sampled = agreement(a, b, JS_DIVERGENCE, seed=1)
    assert np.array_equal(sampled.null, agreement(a, b, JS_DIVERGENCE, seed=1).null)
    assert sampled.null.mean() == pytest.approx(slow_null(a, b, JS_DIVERGENCE).mean(), rel=0.02)


def test_the_order_of_images_does_not_matter():
    a, b = maps(12)
    mixed = np.random.default_rng(9).permutation(12)
    for measure in MEASURES:
        np.testing.assert_allclose(
            agreement(a[mixed], b[mixed], measure).excess, agreement(a, b, measure).excess[mixed], atol=1e-12
        )


def test_js_is_scipys_squared_and_refuses_what_is_no_distribution():
    a, b = maps()
    np.testing.assert_allclose(js_divergence(a, b), jensenshannon(a, b, base=2, axis=1) ** 2)
    assert js_divergence([1.0, 0.0], [0.0, 3.0]) == pytest.approx(1.0)
    assert np.isnan(js_divergence([1.0, -0.1], [0.5, 0.5]))
    assert np.isnan(js_divergence([0.0, 0.0], [0.5, 0.5]))
    assert js_divergence([np.nan, 1.0, 2.0], [5.0, 1.0, 2.0]) == pytest.approx(0.0)


def test_one_image_has_no_null():
    a, b = maps(1)
    result = agreement(a, b, SPEARMAN)
    assert np.isfinite(result.own).all()
    assert np.isnan(result.null).all()


def test_shapes_must_match():
    with pytest.raises(ValueError, match="two arrays"):
        agreement(np.zeros((2, 3)), np.zeros((2, 4)), SPEARMAN)


@pytest.mark.parametrize("measure", [SPEARMAN, TOP_OVERLAP, JS_DIVERGENCE], ids=lambda m: m.name)
def test_the_null_leaves_out_images_of_the_same_group(measure):
    random = np.random.default_rng(5)
    a, b = random.random((2, 6, 12))
    groups = ["x", "y", "x", "z", "y", "y"]
    got = agreement(a, b, measure, groups=groups)
    for i in range(6):
        others = [j for j in range(6) if groups[j] != groups[i]]
        pairs = [(float(measure.score(a[i], b[j])) + float(measure.score(a[j], b[i]))) / 2 for j in others]
        assert got.null[i] == pytest.approx(np.mean(pairs), abs=1e-9)
    np.testing.assert_array_equal(got.own, agreement(a, b, measure).own)
    own_groups = agreement(a, b, measure, groups=list(range(6))).null
    np.testing.assert_array_equal(own_groups, agreement(a, b, measure).null)


def test_one_group_has_no_null():
    a, b = np.random.default_rng(6).random((2, 4, 9))
    for measure in (SPEARMAN, JS_DIVERGENCE):
        assert np.isnan(agreement(a, b, measure, groups=["same"] * 4).null).all()
    with pytest.raises(ValueError, match="3 groups for 4 images"):
        agreement(a, b, SPEARMAN, groups=["a", "b", "c"])
