"""What a reader must know before believing a first look: sentences made from measured facts, by fixed rules.

Each rule is a function of :class:`Facts` that returns a sentence or nothing; thresholds are constants here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foveate.geometry import Geometry
from foveate.interfaces import ModelCard, Prediction
from foveate.study.quick_check import Check

UNSURE = 0.5  # best score below which the answer is called unsure
CLOSE = 0.1  # distance of the two best answers
HIDDEN = 0.01  # share of the picture outside the model's input
SQUEEZED = 1.05  # ratio of the two scales
ENLARGED = 1.5  # input pixels a picture pixel
NEARLY_UNIFORM = 0.97  # entropy over ln K
ELSEWHERE = 0.3  # share of the row on tokens without a place
SINK_SHARE = 0.2  # share of all received attention on sinks


@dataclass(frozen=True)
class Facts:
    """What the rules look at. ``evenness`` values are entropies over ln of their number of entries."""

    card: ModelCard
    geometry: Geometry
    predictions: tuple[Prediction, ...]
    evenness: float
    outside: float
    rollout_evenness: float
    sinks: int
    sink_share: float
    check: Check


def caveats(facts: Facts) -> tuple[str, ...]:
    """All sentences that apply, the most serious first."""
    return tuple(sentence for rule in RULES if (sentence := rule(facts)))


def _random_weights(facts: Facts) -> str:
    if not facts.card.weights_sha256.startswith("random"):
        return ""
    return "the weights are random: neither the answer nor the map means anything"


def _not_cause(facts: Facts) -> str:
    check, start = facts.check, "attention shows where this row reads, not what decides the answer; "
    if check.skipped:
        return f"{start}deletion, which tests that, was not run ({check.skipped})"
    found = "lower" if check.row < check.low else "higher" if check.row > check.high else "inside that range"
    return (
        f"{start}deletion of cells in its order: area {check.row:.2f}, random orders {check.random:.2f} "
        f"({check.low:.2f} to {check.high:.2f}, {check.orders} of them): {found}; one picture proves nothing, "
        "foveate faithfulness tests many"
    )


def _answer(facts: Facts) -> str:
    best = facts.predictions[:2]
    if not best:
        return (
            "the model gives no answer here, so the map explains none (models that compare with text need prompts)"
        )
    if len(facts.predictions) == 1 and best[0].score > 1 - 1e-6:
        return f"only one answer was possible ({best[0].label}): give more prompts"
    if best[0].score < UNSURE:
        return f"the model is unsure: {best[0].label} at {best[0].score:.2f}"
    if len(best) > 1 and best[0].object is None and best[0].score - best[1].score < CLOSE:
        return f"a close call between {best[0].label} and {best[1].label}"
    return ""


def _crop(facts: Facts) -> str:
    geometry = facts.geometry
    top, left, bottom, right = geometry.visible
    hidden = 1 - (bottom - top) * (right - left) / (geometry.original_height * geometry.original_width)
    return f"the model did not see {hidden:.0%} of the picture (outside the frame)" if hidden > HIDDEN else ""


def _resized(facts: Facts) -> str:
    y, x = facts.geometry.scale_y, facts.geometry.scale_x
    notes = []
    if max(y, x) / min(y, x) > SQUEEZED:
        wider = "height" if x > y else "width"
        notes.append(f"squeezed in {wider} by {max(y, x) / min(y, x):.2f}")
    if min(y, x) > ENLARGED:
        notes.append(f"enlarged {min(y, x):.1f} times")
    return f"the model saw the picture {' and '.join(notes)}" if notes else ""


def _even(facts: Facts) -> str:
    if not facts.evenness > NEARLY_UNIFORM:
        return ""
    return f"the row is nearly uniform (H / ln K = {facts.evenness:.3f}): its differences are small"


def _elsewhere(facts: Facts) -> str:
    if not facts.outside > ELSEWHERE:
        return ""
    return f"{facts.outside:.0%} of the row lies on tokens without a place (CLS, registers), not on the picture"


def _sinks(facts: Facts) -> str:
    if not (facts.sinks and facts.sink_share > SINK_SHARE):
        return ""
    tokens = "1 token receives" if facts.sinks == 1 else f"{facts.sinks} tokens receive"
    return (
        f"{tokens} {facts.sink_share:.0%} of all attention in this layer: evidence or sinks, which one picture "
        "cannot tell (foveate metrics: sink_mass)"
    )


def _collapsed(facts: Facts) -> str:
    if not facts.rollout_evenness > NEARLY_UNIFORM:
        return ""
    return f"rollout has nearly collapsed (H / ln K = {facts.rollout_evenness:.3f}): it tells cells hardly apart"


RULES: tuple[Callable[[Facts], str], ...] = (
    _random_weights,
    _not_cause,
    _answer,
    _crop,
    _resized,
    _elsewhere,
    _even,
    _sinks,
    _collapsed,
)
