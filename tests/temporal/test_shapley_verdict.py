"""The rule: scores with known effects get the verdict that is true of them, or none; a false one hardly ever."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from foveate.errors import UsageError
from foveate.temporal.verdict import ANSWERS, FEWEST, Rule, judge, state

MEANS = {
    "appearance": (0.5, 1.0, 0.5, 1.0),
    "motion": (0.5, 0.5, 1.0, 1.0),
    "both (additive)": (0.0, 0.5, 0.5, 1.0),
    "both (interaction)": (0.5, 0.5, 0.5, 1.0),
    "redundant": (0.5, 1.0, 1.0, 1.0),
}
"""True means of none, appearance, motion, both."""


def drawn(means: tuple[float, ...], videos: int, spread: float, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    names = ("none", "appearance", "motion", "both")
    return {name: mean + spread * rng.normal(size=videos) for name, mean in zip(names, means, strict=True)}


@pytest.mark.parametrize("answer", MEANS)
def test_clear_effects_get_their_verdict(answer: str) -> None:
    verdict = judge(drawn(MEANS[answer], 400, 0.15, 0))
    assert verdict.answer == answer
    assert verdict.n == 400
    assert verdict.why


def test_only_together_and_either_is_enough() -> None:
    assert judge(drawn(MEANS["both (interaction)"], 400, 0.1, 1)).detail == "only together"
    assert judge(drawn(MEANS["redundant"], 400, 0.1, 1)).detail == "either is enough"
    partly = judge(drawn((0.0, 0.3, 0.3, 1.0), 400, 0.1, 1))
    assert (partly.answer, partly.detail) == ("both (interaction)", "")


@pytest.mark.parametrize("answer", MEANS)
def test_noise_gives_inconclusive_not_something_else(answer: str) -> None:
    """With hopelessly few and noisy videos false verdicts stay rare."""
    false = sum(
        judge(drawn(MEANS[answer], 12, 0.4, seed), Rule(resamples=400)).answer not in (answer, "inconclusive")
        for seed in range(60)
    )
    assert binomtest(false, 60, 0.05, alternative="greater").pvalue > 0.01


def test_no_total_effect_is_inconclusive() -> None:
    verdict = judge(drawn((0.5, 0.5, 0.5, 0.5), 200, 0.2, 2))
    assert verdict.answer == "inconclusive"
    assert "does not depend" in verdict.why


def test_a_negligible_total_effect_is_inconclusive() -> None:
    scores = drawn((0.0, 0.01, 0.0, 0.01), 300, 0.001, 2)
    assert judge(scores).answer == "appearance"
    assert judge(scores, floor=0.05).answer == "inconclusive"
    assert judge(scores, floor=0.005).answer == "appearance"


def test_effects_at_the_margin_are_left_open() -> None:
    """Motion adds exactly a tenth: neither there nor absent, whatever the number of videos."""
    verdict = judge(drawn((0.0, 0.9, 0.1, 1.0), 2000, 0.1, 3))
    assert verdict.answer == "inconclusive"
    assert verdict.states["motion"] == "open"
    assert "motion undecided" in verdict.why


def test_opposed_effects_get_no_verdict() -> None:
    """Motion that hurts is none of the answers."""
    verdict = judge(drawn((0.5, 1.2, 0.2, 0.9), 400, 0.05, 4))
    assert verdict.states["motion"] == "negative"
    assert verdict.answer == "inconclusive"


def test_few_videos_get_no_verdict() -> None:
    verdict = judge(drawn(MEANS["appearance"], FEWEST - 1, 0.0, 5))
    assert verdict.answer == "inconclusive"
    assert str(FEWEST) in verdict.why
    assert judge(drawn(MEANS["appearance"], FEWEST, 0.001, 5)).answer == "appearance"


def test_videos_without_a_score_do_not_count() -> None:
    scores = drawn(MEANS["motion"], 100, 0.1, 6)
    holed = {name: np.concatenate([values, [5.0, np.nan]]) for name, values in scores.items()}
    holed["none"][-2] = np.nan
    assert judge(holed) == judge(scores)


def test_scores_may_be_on_any_scale() -> None:
    """The margin is a share of the total effect: units and origin do not matter."""
    scores = drawn(MEANS["redundant"], 150, 0.1, 7)
    assert judge({name: 40.0 * values - 7.0 for name, values in scores.items()}).answer == judge(scores).answer


def test_order_of_videos_does_not_matter_to_estimates() -> None:
    scores = drawn(MEANS["both (additive)"], 80, 0.2, 8)
    order = np.random.default_rng(0).permutation(80)
    one, other = judge(scores), judge({name: values[order] for name, values in scores.items()})
    assert one.answer == other.answer
    for name, interval in one.intervals.items():
        assert interval.estimate == pytest.approx(other.intervals[name].estimate, abs=1e-12)


def test_a_family_widens_every_interval() -> None:
    scores = drawn(MEANS["appearance"], 60, 0.2, 9)
    alone, among = judge(scores, Rule()).intervals, judge(scores, Rule(family=10)).intervals
    for name in alone:
        assert among[name].low <= alone[name].low
        assert among[name].high >= alone[name].high
    assert Rule(confidence=0.95, family=10).level == pytest.approx(0.995)


def test_states_are_exclusive() -> None:
    rng = np.random.default_rng(10)
    total = np.full(50, 1.0)
    for centre in np.linspace(-0.4, 0.4, 17):
        effect = centre + 0.05 * rng.normal(size=50)
        found = state(effect, total, 0.1, Rule())
        mean = effect.mean()
        if found == "there":
            assert mean > 0.1
        elif found == "negative":
            assert mean < -0.1
        elif found == "absent":
            assert abs(mean) < 0.1
        else:
            assert min(abs(mean - 0.1), abs(mean + 0.1)) < 0.03


def test_at_the_margin_each_side_errs_about_as_often_as_stated() -> None:
    """An effect exactly at the margin, 20 videos: one-sided tests at 2.5 % may err in 5 %, not in many more."""
    found = []
    for seed in range(200):
        effect = 0.1 + 0.05 * np.random.default_rng(seed).normal(size=20)
        found.append(state(effect, np.ones(20), 0.1, Rule(resamples=400)))
    for wrong in ("there", "absent"):
        assert binomtest(found.count(wrong), 200, 0.05, alternative="greater").pvalue > 0.01
    assert found.count("open") > 160


def test_records_are_plain_and_complete() -> None:
    record = judge(drawn(MEANS["motion"], 50, 0.1, 11)).record()
    assert record["verdict"] in ANSWERS
    assert set(record["effects"]["interaction"]) == {"estimate", "low", "high", "n"}
    assert set(record["states"]) == {"appearance", "motion", "interaction"}


@pytest.mark.parametrize("wrong", [{"margin": 0.0}, {"margin": 0.6}, {"confidence": 1.0}, {"family": 0}])
def test_impossible_rules_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Rule(**wrong)  # type: ignore[arg-type]
