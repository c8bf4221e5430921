"""The rule that turns effects into a verdict: appearance, motion, both, redundant, or inconclusive.

Let T be the mean total effect v(both) - v(none), and d = ``margin`` T (a tenth by default). By bootstrap intervals
over videos (BCa, two-sided ``confidence``):

- a main effect is *there* where the interval of phi - d lies above 0, and *absent* where phi is equivalent to 0:
  phi - d lies below 0 and phi + d above (two one-sided tests, Schuirmann 1987);
- the interaction is *positive*, *negative* or *absent* by the same rule with 2 d, since half of it goes to each
  cue.

==================  ============  ============  ===========
verdict             appearance    motion        interaction
==================  ============  ============  ===========
appearance          there         absent        absent
motion              absent        there         absent
both (additive)     there         there         absent
both (interaction)  there         there         positive
redundant           there         there         negative
inconclusive        anything else, or T itself not above ``floor``
==================  ============  ============  ===========

The floor keeps effects that are real but negligible from a verdict: an untrained network's answer, too, changes a
little with its input, and its tiny T would then be shared out with great confidence.

``detail`` says more of an interaction: "only together" where each cue alone is equivalent to none; "either is
enough" where each is equivalent to nothing once the other is there.

A verdict needs all its conditions at once, which is an intersection-union test: each may be tested at full level
(Berger 1982, Technometrics 24). Where several verdicts are read together (classes, models), ``family`` is their
number, and intervals are widened for it (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from foveate.errors import UsageError
from foveate.stats.intervals import RESAMPLES, Interval, bootstrap_mean
from foveate.temporal.shapley import Effects, effects

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Answer = Literal["appearance", "motion", "both (additive)", "both (interaction)", "redundant", "inconclusive"]
ANSWERS: tuple[Answer, ...] = (
    "appearance",
    "motion",
    "both (additive)",
    "both (interaction)",
    "redundant",
    "inconclusive",
)
State = Literal["there", "absent", "negative", "open"]
FEWEST = 8
"""Videos below which there is no verdict, because bootstrap intervals over so few are too narrow.

Measured on normal and two-point scores whose effect is exactly at the margin: a one-sided test at 2.5 % errs in up
to 18 % of draws of 5 videos, 8 % of 8, 6 % of 10, 5 % of 20 and 3 % of 50.
"""


@dataclass(frozen=True)
class Rule:
    """What fixes a verdict besides the scores."""

    margin: float = 0.1
    confidence: float = 0.95
    family: int = 1
    resamples: int = RESAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.margin < 0.5:
            raise UsageError(f"Rule: margin={self.margin}", remedy="a share of the total effect between 0 and 0.5")
        if not 0.0 < self.confidence < 1.0 or self.family < 1:
            raise UsageError(f"Rule: confidence={self.confidence}, family={self.family}")

    @property
    def level(self) -> float:
        """Confidence of one interval, widened for the family."""
        return 1.0 - (1.0 - self.confidence) / self.family

    def interval(self, values: ArrayLike) -> Interval:
        """BCa interval of the mean over videos; equal seeds resample the same videos."""
        return bootstrap_mean(values, confidence=self.level, resamples=self.resamples, seed=self.seed)


@dataclass(frozen=True)
class Verdict:
    """What the rule says, and of which numbers.

    ``intervals`` holds every effect of :class:`~foveate.temporal.shapley.Effects` by name, ``states`` what was
    found of the two main effects and the interaction, ``why`` the reason in a sentence.
    """

    answer: Answer
    detail: str
    why: str
    n: int
    intervals: Mapping[str, Interval]
    states: Mapping[str, State]

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "verdict": self.answer,
            "detail": self.detail,
            "why": self.why,
            "n": self.n,
            "states": dict(self.states),
            "effects": {name: interval._asdict() for name, interval in self.intervals.items()},
        }


def judge(scores: Mapping[str, ArrayLike], rule: Rule = Rule(), *, floor: float = 0.0) -> Verdict:
    """The verdict on scores ``(video,)`` of the coalitions ``none``, ``appearance``, ``motion``, ``both``.

    ``floor`` is the total effect, in units of the score, below which nothing is said. Videos with a score that is
    not finite do not count. Raises UsageError as :func:`foveate.temporal.shapley.effects` does.
    """
    found = effects(scores)
    kept = np.isfinite(found.interaction)
    found = Effects(**{name: values[kept] for name, values in found.named().items()})
    n = int(kept.sum())
    intervals = {name: rule.interval(values) for name, values in found.named().items()}
    if n < FEWEST:
        return Verdict("inconclusive", "", f"{n} videos; at least {FEWEST} are needed", n, intervals, {})
    if not intervals["total"].low > floor:
        why = "the score is hardly lower without both cues: it does not depend on them, or they were not removed"
        return Verdict("inconclusive", "", why, n, intervals, {})
    states = {
        "appearance": state(found.appearance, found.total, rule.margin, rule),
        "motion": state(found.motion, found.total, rule.margin, rule),
        "interaction": state(found.interaction, found.total, 2.0 * rule.margin, rule),
    }
    answer = _answer(states["appearance"], states["motion"], states["interaction"])
    return Verdict(answer, _detail(answer, found, rule), _why(answer, states), n, intervals, states)


def state(effect: NDArray[np.float64], total: NDArray[np.float64], share: float, rule: Rule) -> State:
    """What an effect ``(video,)`` is beside ``share`` of the total: "there", "negative", "absent" or "open"."""
    above, below = rule.interval(effect - share * total), rule.interval(effect + share * total)
    if above.low > 0.0:
        return "there"
    if below.high < 0.0:
        return "negative"
    return "absent" if above.high < 0.0 < below.low else "open"


def _answer(appearance: State, motion: State, interaction: State) -> Answer:
    if (appearance, motion, interaction) == ("there", "absent", "absent"):
        return "appearance"
    if (appearance, motion, interaction) == ("absent", "there", "absent"):
        return "motion"
    if (appearance, motion) == ("there", "there"):
        both: dict[State, Answer] = {
            "absent": "both (additive)",
            "there": "both (interaction)",
            "negative": "redundant",
        }
        return both.get(interaction, "inconclusive")
    return "inconclusive"


def _detail(answer: Answer, found: Effects, rule: Rule) -> str:
    pairs = {
        "both (interaction)": ("only together", found.appearance_alone, found.motion_alone),
        "redundant": ("either is enough", found.appearance_given_motion, found.motion_given_appearance),
    }
    if answer not in pairs:
        return ""
    words, *parts = pairs[answer]
    nothing = all(state(part, found.total, 2.0 * rule.margin, rule) == "absent" for part in parts)
    return words if nothing else ""


def _why(answer: Answer, states: Mapping[str, State]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in states.items())
    if answer != "inconclusive":
        return said
    undecided = [name for name, value in states.items() if value == "open"]
    return (
        f"{said}: {', '.join(undecided)} undecided at this number of videos" if undecided else f"{said}: no rule"
    )
