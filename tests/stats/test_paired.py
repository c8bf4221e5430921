"""Paired tests against literal definitions; verdicts on differences that are planted."""

import numpy as np
import pytest
from scipy.stats import wilcoxon

from foveate.stats.paired import compare_family, holm, rank_biserial, superiority, wilcoxon_p


def slow_holm(p):
    """Step by step as Holm 1979 writes it."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, running = [0.0] * len(p), 0.0
    for step, i in enumerate(order):
        running = max(running, (len(p) - step) * p[i])
        adjusted[i] = min(1.0, running)
    return adjusted


def test_holm_is_the_step_down_procedure():
    p = np.random.default_rng(0).random(7) ** 3
    np.testing.assert_allclose(holm(p), slow_holm(list(p)))
    np.testing.assert_allclose(holm([0.01, np.nan, 0.04]), [0.02, np.nan, 0.04])


def test_effect_sizes_by_counting():
    d = np.array([-3.0, -1.0, 2.0, 0.0])
    assert superiority(d, lower_is_better=True) == pytest.approx((2 + 0.5) / 4)
    assert rank_biserial(d, lower_is_better=True) == pytest.approx((3 + 1 - 2) / 6)
    assert rank_biserial(d, lower_is_better=False) == pytest.approx(-2 / 6)
    assert rank_biserial([0.0, 0.0], lower_is_better=True) == 0.0


def test_wilcoxon_is_scipys_and_survives_degenerate_input():
    d = np.random.default_rng(1).normal(0.3, 1, 30)
    assert wilcoxon_p(d) == pytest.approx(wilcoxon(d).pvalue)
    assert wilcoxon_p(np.zeros(9)) == 1.0
    assert np.isnan(wilcoxon_p([0.5]))


def family(**kwargs):
    rng = np.random.default_rng(2)
    return compare_family(
        {"low": rng.normal(-0.3, 0.2, 40), "high": rng.normal(0.3, 0.2, 40), "none": rng.normal(0, 0.2, 40)},
        **kwargs,
    )


def test_planted_differences_get_their_verdict():
    assert {k: v.verdict for k, v in family(lower_is_better=True).items()} == {
        "low": "better",
        "high": "worse",
        "none": "inconclusive",
    }
    assert family(lower_is_better=False)["low"].verdict == "worse"


def test_false_verdicts_are_rare_when_nothing_is_there():
    rng = np.random.default_rng(3)
    wrong = sum(
        one.verdict != "inconclusive"
        for i in range(60)
        for one in compare_family({"a": rng.normal(size=25)}, lower_is_better=True, resamples=500, seed=i).values()
    )
    assert wrong <= 8  # 5 % of 60 is 3; 8 has probability below 1 %


def test_correction_over_the_family_can_take_a_verdict_back():
    rng = np.random.default_rng(2)
    weak = rng.normal(-0.45, 1, 30)
    assert wilcoxon_p(weak) < 0.05
    alone = compare_family({"weak": weak}, lower_is_better=True)["weak"]
    crowd = compare_family(
        {"weak": weak} | {f"n{i}": rng.normal(size=30) for i in range(30)}, lower_is_better=True
    )["weak"]
    assert alone.verdict == "better"
    assert crowd.verdict == "inconclusive"


def test_order_of_images_does_not_matter_for_tests_and_effects():
    rng = np.random.default_rng(6)
    d = rng.normal(0.2, 1, 20)
    a = compare_family({"x": d}, lower_is_better=True)["x"]
    b = compare_family({"x": rng.permutation(d)}, lower_is_better=True)["x"]
    assert (a.p, a.superiority, a.rank_biserial) == pytest.approx((b.p, b.superiority, b.rank_biserial))


def test_one_image_has_no_verdict():
    assert compare_family({"x": [-0.5]}, lower_is_better=True)["x"].verdict == "no interval"
