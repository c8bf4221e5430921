"""Is the verdict "appearance, motion or both" right? ``python -m benchmarks.motion WEIGHTS [-o FILE]``.

WEIGHTS is the folder that ``python training/motion_tasks.py train --out WEIGHTS`` wrote: many seeds of four tasks
whose answer is known by construction. Every network is tested as ``foveate motion`` tests it, on clips of its own
draw that it was not trained on, and judged on the first 20, 50, 100 and 200 of them; so is an untrained network of
each task. The unit is the network. Rates come with Wilson's and with Clopper and Pearson's interval.

A network counts where it solves its task: held-out accuracy of at least 0.95, for ``redundant`` also with either
cue alone; those that do not are listed and not judged.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from foveate.study.motion import MotionReport, summarise
from foveate.study.motion_scoring import VideoScores, score_clip
from foveate.study.motion_subject import Settings
from foveate.temporal.verdict import Rule
from foveate.testing.motion_tasks import LABELS, TASKS, motion_clips
from foveate.testing.space_time import SpaceTimeSource, SpaceTimeTransformer

SIZES = (20, 50, 100, 200)
WITH_EDGES = 40  # clips of each network on which attention is weighed and edges are cut
SOLVED = 0.95
UNTRAINED = 5  # networks of each task
CLIP_SEED = 2_000_000


@dataclass(frozen=True, eq=False)
class Network:
    """One trained network; ``accuracy`` as the training measured it."""

    task: str
    seed: int
    source: SpaceTimeSource
    accuracy: dict[str, float]

    @property
    def solved(self) -> bool:
        needed = ("both", "grey", "still") if self.task == "redundant" else ("both",)
        return all(self.accuracy[name] >= SOLVED for name in needed)


def networks(folder: Path, task: str) -> Iterator[Network]:
    """All seeds of a task, in order."""
    for record in sorted(folder.glob(f"{task}-*.json"), key=lambda path: int(path.stem.split("-")[1])):
        told = json.loads(record.read_text())
        stacked = load_file(record.with_suffix(".safetensors"))
        for i, seed in enumerate(told["seeds"]):
            module = SpaceTimeTransformer()
            module.load_state_dict({name: value[i].float() for name, value in stacked.items()})
            accuracy = {name: values[i] for name, values in told["accuracy"].items()}
            yield Network(task, seed, SpaceTimeSource(module, LABELS[task], f"{task}-{seed}"), accuracy)


def untrained(task: str, seed: int) -> SpaceTimeSource:
    """The weights that a network starts from."""
    return SpaceTimeSource(SpaceTimeTransformer(seed=seed), LABELS[task])


def scores_of(source: SpaceTimeSource, task: str, seed: int) -> list[VideoScores]:
    """Every clip scored; attention is cut on the first of them only."""
    plain = Settings(batch_size=64, edges=False)
    scored: list[VideoScores] = []
    for i, sample in enumerate(motion_clips(task, max(SIZES), CLIP_SEED + seed, alone=False).samples()):
        scored += score_clip(source, sample, replace(plain, edges=i < WITH_EDGES), i)
    return scored


def judged(source: SpaceTimeSource, task: str, seed: int) -> dict[str, Any]:
    """What the test says of one network."""
    scored = scores_of(source, task, seed)
    settings = Settings()
    reports = {n: summarise(source.card.id, scored[:n], {}, settings, Rule()) for n in SIZES}
    verdicts = {str(n): report.verdict.answer for n, report in reports.items()}
    return {"verdicts": verdicts, **_facts(reports[max(SIZES)])}


def _facts(report: MotionReport) -> dict[str, Any]:
    """Numbers of the largest sample."""
    head = report.scales[0]
    rounded = {name: _numbers(interval) for name, interval in report.verdict.intervals.items()}
    return {
        "detail": report.verdict.detail,
        "by_scale": {one.scale: one.verdict.answer for one in report.scales},
        "raw": head.raw.answer,
        "effects": rounded,
        "coalitions": {name: _numbers(interval) for name, interval in head.corrected.items()},
        "like_none": dict(head.like_none),
        "sham_cost": {name: round(interval.estimate, 4) for name, interval in head.sham_cost.items()},
        "reversed": round(head.reversed.estimate, 4),
        "cuts": {name: round(interval.estimate, 4) for name, interval in head.cuts.items()},
        "mass": round(report.mass.estimate, 4),
        "mass_rule": report.mass_rule,
    }


def _numbers(interval: Any) -> list[float]:
    return [round(float(value), 4) for value in interval[:3]]


def rates(rows: list[dict[str, Any]], truth: str) -> dict[str, Any]:
    """Right, inconclusive and false verdicts over networks, by number of clips, with intervals for the false."""
    found = {}
    for n in map(str, SIZES):
        answers = Counter(row["verdicts"][n] for row in rows)
        false = sum(count for answer, count in answers.items() if answer not in (truth, "inconclusive"))
        said = {"right": answers[truth], "inconclusive": answers["inconclusive"], "false": false}
        found[n] = said | share(false, len(rows))
    return found


def share(count: int, of: int) -> dict[str, Any]:
    """A share with both intervals, 95 %."""
    test = binomtest(count, of)
    wilson, exact = test.proportion_ci(method="wilson"), test.proportion_ci(method="exact")
    return {
        "rate": round(count / of, 4),
        "wilson": [round(float(wilson.low), 4), round(float(wilson.high), 4)],
        "clopper_pearson": [round(float(exact.low), 4), round(float(exact.high), 4)],
    }


def prove(folder: Path) -> dict[str, Any]:
    """Everything: rows by network, and what they come to."""
    tasks: dict[str, Any] = {}
    for task, truth in TASKS.items():
        rows, unsolved = [], []
        for network in networks(folder, task):
            if not network.solved:
                unsolved.append({"seed": network.seed, "accuracy": network.accuracy})
                continue
            found = judged(network.source, task, network.seed)
            rows.append({"seed": network.seed, "accuracy": network.accuracy, **found})
            print(task, network.seed, found["verdicts"], flush=True)
        blank = [judged(untrained(task, seed), task, seed) for seed in range(UNTRAINED)]
        tasks[task] = {
            "truth": truth,
            "networks": len(rows),
            "unsolved": unsolved,
            "rates": rates(rows, truth),
            "summary": _summary(rows),
            "untrained": Counter(row["verdicts"][str(max(SIZES))] for row in blank),
            "rows": rows,
        }
    counted = [(row, TASKS[task]) for task, told in tasks.items() for row in told["rows"]]
    n = str(max(SIZES))
    false = sum(row["verdicts"][n] not in (truth, "inconclusive") for row, truth in counted)
    mass_right = sum(row["mass_rule"] == truth for row, truth in counted)
    return {
        "all": {"networks": len(counted), "false": false, **share(false, len(counted))},
        "mass_rule": {"right": mass_right, **share(mass_right, len(counted))},
        "tasks": tasks,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over networks and ranges."""

    def spread(values: list[float]) -> list[float]:
        return [round(float(np.mean(values)), 3), round(min(values), 3), round(max(values), 3)]

    effects = ("appearance", "motion", "interaction", "total")
    return {
        "effects": {name: spread([row["effects"][name][0] for row in rows]) for name in effects},
        "mass": spread([row["mass"] for row in rows]),
        "cuts": {name: spread([row["cuts"][name] for row in rows]) for name in rows[0]["cuts"]},
        "sham_cost": {name: spread([row["sham_cost"][name] for row in rows]) for name in rows[0]["sham_cost"]},
        "reversed": spread([row["reversed"] for row in rows]),
        "like_none": {name: sum(row["like_none"][name] for row in rows) for name in ("appearance", "motion")},
        "detail": Counter(row["detail"] for row in rows),
        "by_scale": {scale: Counter(row["by_scale"][scale] for row in rows) for scale in rows[0]["by_scale"]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("benchmarks/results/motion.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = prove(given.weights)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    for task, told in found["tasks"].items():
        print(f"{task}: {told['networks']} networks, {told['rates'][str(max(SIZES))]}")
    print(found["all"], found["mass_rule"])


if __name__ == "__main__":
    main()
