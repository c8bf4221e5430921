"""Shapley values against the definition for any number of players; the sham correction against its sentence."""

from __future__ import annotations

from itertools import combinations, permutations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.coalitions import CHANGED, COALITIONS
from foveate.temporal.shapley import effects, sham_corrected

PLAYERS = ("appearance", "motion")
NAMES = {
    frozenset(): "none",
    frozenset({"appearance"}): "appearance",
    frozenset({"motion"}): "motion",
    frozenset(PLAYERS): "both",
}


def random_scores(seed: int, videos: int = 17) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=videos) for name in COALITIONS}


def shapley_by_orders(scores: dict[str, np.ndarray], player: str) -> np.ndarray:
    """Shapley 1953: the mean, over all orders in which players arrive, of what a player adds on arrival."""
    added = []
    for order in permutations(PLAYERS):
        before = frozenset(order[: order.index(player)])
        added.append(scores[NAMES[before | {player}]] - scores[NAMES[before]])
    return np.mean(added, axis=0)


def interaction_by_moebius(scores: dict[str, np.ndarray]) -> np.ndarray:
    """The Moebius coefficient of the pair: the alternating sum over all subsets (Grabisch and Roubens 1999)."""
    total = np.zeros_like(scores["both"])
    for size in range(len(PLAYERS) + 1):
        for subset in combinations(PLAYERS, size):
            total = total + (-1.0) ** (len(PLAYERS) - size) * scores[NAMES[frozenset(subset)]]
    return total


@pytest.mark.parametrize("seed", range(5))
def test_values_are_those_of_the_definition(seed: int) -> None:
    scores = random_scores(seed)
    found = effects(scores)
    np.testing.assert_allclose(found.appearance, shapley_by_orders(scores, "appearance"), atol=1e-12)
    np.testing.assert_allclose(found.motion, shapley_by_orders(scores, "motion"), atol=1e-12)
    np.testing.assert_allclose(found.interaction, interaction_by_moebius(scores), atol=1e-12)


def test_values_add_up_and_each_gets_half_of_the_interaction() -> None:
    found = effects(random_scores(9))
    np.testing.assert_allclose(found.appearance + found.motion, found.total, atol=1e-12)
    np.testing.assert_allclose(found.appearance, found.appearance_alone + found.interaction / 2, atol=1e-12)
    np.testing.assert_allclose(found.motion, found.motion_given_appearance - found.interaction / 2, atol=1e-12)


def test_the_cues_are_treated_alike() -> None:
    scores = random_scores(3)
    swapped = {**scores, "appearance": scores["motion"], "motion": scores["appearance"]}
    one, other = effects(scores), effects(swapped)
    np.testing.assert_allclose(one.appearance, other.motion, atol=1e-12)
    np.testing.assert_allclose(one.interaction, other.interaction, atol=1e-12)


def test_a_cue_that_never_adds_anything_gets_nothing() -> None:
    scores = random_scores(4)
    scores["motion"], scores["both"] = scores["none"].copy(), scores["appearance"].copy()
    found = effects(scores)
    assert not found.motion.any()
    assert not found.interaction.any()


def test_a_sham_that_does_what_the_removal_does_leaves_no_effect() -> None:
    scores = random_scores(5)
    scores |= {f"sham {name}": scores[name] for name in CHANGED}
    corrected = sham_corrected(scores)
    for name in COALITIONS:
        np.testing.assert_allclose(corrected[name], scores["both"])


def test_a_sham_that_does_nothing_corrects_nothing() -> None:
    scores = random_scores(6)
    corrected = sham_corrected(scores | {f"sham {name}": scores["both"] for name in CHANGED})
    for name in COALITIONS:
        np.testing.assert_allclose(corrected[name], scores[name], atol=1e-12)


def test_correction_is_by_coalition() -> None:
    scores = random_scores(7)
    shams = {f"sham {name}": scores["both"] - cost for name, cost in zip(CHANGED, (0.1, 0.2, 0.3), strict=True)}
    corrected = sham_corrected(scores | shams)
    for name, cost in zip(CHANGED, (0.1, 0.2, 0.3), strict=True):
        np.testing.assert_allclose(corrected[name] - scores[name], cost)


def test_missing_and_uneven_scores_are_refused() -> None:
    scores = random_scores(8)
    with pytest.raises(UsageError, match="no scores of motion"):
        effects({name: scores[name] for name in COALITIONS if name != "motion"})
    with pytest.raises(UsageError, match="shapes"):
        effects(scores | {"motion": scores["motion"][:-1]})
    with pytest.raises(UsageError, match="sham none"):
        sham_corrected(scores)
