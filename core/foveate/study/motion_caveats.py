"""What a reader must know before believing a verdict on appearance and motion: sentences made by fixed rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.temporal.coalitions import CHANGED

if TYPE_CHECKING:
    from collections.abc import Callable

    from foveate.study.motion import MotionReport

FEW = 20
"""Videos below which the sentence about their number appears."""
LOST = 0.2
"""Share of frames without the object's track above which its score is doubted."""
SMALLER = 0.8
"""A sham whose L2 is below this share of the real change is no fair control."""

WORDS = {
    "none": "without both cues",
    "appearance": "without motion",
    "motion": "without appearance",
}


def caveats(report: MotionReport) -> tuple[str, ...]:
    """All sentences that apply."""
    return tuple(sentence for rule in RULES for sentence in rule(report))


def _few(report: MotionReport) -> list[str]:
    n = report.verdict.n
    if n >= FEW:
        return []
    return [f"{n} videos: only large effects can be told, and bootstrap intervals over so few are too narrow"]


def _unit(report: MotionReport) -> list[str]:
    count = len({one.id for one in report.clips})
    if count == report.verdict.n:
        return []
    return [f"{count} clips of {report.verdict.n} videos: clips of one video were averaged first"]


def _failed(report: MotionReport) -> list[str]:
    if not report.failed:
        return []
    return [f"{len(report.failed)} clips could not be used, and are missing from every number"]


def _masks(report: MotionReport) -> list[str]:
    removal = report.settings.removal
    if removal.appearance == "scrambled":
        return [
            "no masks were used: colour and fine texture were scrambled everywhere, coarse shape and size remain"
        ]
    if removal.appearance == "advected":
        return ["no masks were used: noise was moved by the optical flow, whose errors count as lost motion"]
    said = ["silhouette, size and place of the object remain when its appearance is removed, and count as motion"]
    if any("pixels that move" in one.masks for one in report.clips):
        said.append("masks were guessed from pixels that move, which holds only where the camera stands still")
    return said


def _found_by_look(report: MotionReport) -> list[str]:
    if report.verdict.answer != "both (interaction)":
        return []
    return [
        "a model that finds its object by its look cannot see a grey one move: appearance is needed to use "
        "motion, which gives the same verdict as where the two are compared"
    ]


def _sham(report: MotionReport) -> list[str]:
    head = report.scales[0]
    said = []
    for name in CHANGED:
        cost = head.sham_cost[name]
        if cost.low > report.rule.margin * abs(head.verdict.intervals["total"].estimate):
            said.append(
                f"a sham as large as the change {WORDS[name]} alone costs {cost.estimate:.3g}: the score falls "
                "for clips that merely look unusual, and the correction for it is large"
            )
    if head.raw.answer != head.verdict.answer:
        said.append(f"without the sham correction the verdict would be {head.raw.answer!r}")
    return said


def _sham_size(report: MotionReport) -> list[str]:
    sizes = report.to_sizes()
    short = [
        name for name in CHANGED if sizes[f"sham {name}"]["grey_levels"] < SMALLER * sizes[name]["grey_levels"]
    ]
    said = []
    if short:
        which = ", ".join(WORDS[name] for name in short)
        said.append(f"the sham is smaller than the real change ({which}): there was not room for as much")
    if not all(one.apart for one in report.clips):
        said.append("in some clips the masks cover everything, so the sham lies on the object too")
    return said


def _scales(report: MotionReport) -> list[str]:
    answers = {one.scale: one.verdict.answer for one in report.scales}
    if len(set(answers.values())) < 2:
        return []
    said = ", ".join(f"{scale}: {answer}" for scale, answer in answers.items())
    return [f"the verdict depends on the scale of the score ({said}); what adds on one need not add on another"]


def _lost(report: MotionReport) -> list[str]:
    return [
        f"{WORDS[name]} the tracker loses the object in {lost.estimate:.0%} of its frames: the score is then of "
        "something else"
        for name, lost in report.lost.items()
        if name in WORDS and lost.estimate > LOST
    ]


def _classes(report: MotionReport) -> list[str]:
    if not report.by_label:
        return []
    count = len(report.by_label)
    return [
        f"verdicts by class: intervals are widened for {count} of them (Bonferroni); the class that the model "
        "answers to a clip without cues shows no effect, since nothing can be lost"
    ]


def _mass(report: MotionReport) -> list[str]:
    if not report.mass_rule:
        return []
    return [
        f"attention on other frames is {report.mass.estimate:.2f} (uniform attention gives {report.uniform:.2f}); "
        "it does not tell what is used"
    ]


def _cut(report: MotionReport) -> list[str]:
    counts = report.clips[0].cut_edges
    if not counts:
        return []
    return ["cut edges between frames: tokens without a frame can still carry something from one to another"]


RULES: tuple[Callable[[MotionReport], list[str]], ...] = (
    _few,
    _unit,
    _failed,
    _masks,
    _found_by_look,
    _sham,
    _sham_size,
    _scales,
    _lost,
    _classes,
    _mass,
    _cut,
)
