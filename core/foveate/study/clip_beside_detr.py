"""CLIP beside a detector: do they look at the same place for the same thing?

For every picture one label is chosen (that of the detector's surest object, or the one asked for). CLIP explains
its score of the prompt "a photo of a {label}", the detector explains its objects of that label together, and the
two maps meet on the pixels of the picture (:mod:`foveate.compare`). Where the targets differ there is no score
but a reason: the detector found no such object, CLIP has no such prompt, or the method explains no target at all
(CLIP's attention row is the same whatever the prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.compare.agreement import Result, compare
from foveate.compare.maps import MapRule, MapSet
from foveate.compare.report import to_dict, to_text
from foveate.errors import UsageError
from foveate.interfaces import Target

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.geometry import CellGrid, Geometry
    from foveate.interfaces import AttentionSource, Attribution, Sample

TEMPLATE = "a photo of a {}"
BLIND = ("readout", "rollout", "uniform", "random", "centre", "edge", "saturation")
"""Methods whose map does not depend on what is explained."""


@dataclass(frozen=True)
class Pair:
    """One picture: the label, how many objects of it, CLIP's score of the prompt, and why there is no score."""

    sample: str
    label: str
    objects: int = 0
    clip_score: float = float("nan")
    reason: str = ""


@dataclass(frozen=True, eq=False)
class BesideReport:
    """Every picture's pair, and the comparison of those whose targets are the same (None where none are)."""

    method: str
    pairs: tuple[Pair, ...]
    result: Result | None
    maps: tuple[MapSet, MapSet] | None = None

    def to_text(self) -> str:
        """For a terminal."""
        compared = [pair for pair in self.pairs if not pair.reason]
        lines = [
            f"{len(compared)} of {len(self.pairs)} pictures with the same target on both sides ({self.method})"
        ]
        lines += [f"  {pair.sample}: no score, {pair.reason}" for pair in self.pairs if pair.reason]
        return "\n".join(lines) + "\n" + (to_text(self.result) if self.result is not None else "")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.method,
            "pairs": [vars(pair) for pair in self.pairs],
            "result": None if self.result is None else to_dict(self.result),
        }

    def draw(self, samples: Sequence[Sample], out: Path) -> Path:
        """Side by side, the picture of median agreement. Raises UsageError where nothing was compared."""
        return _draw(self, {sample.id: sample for sample in samples}, out)


@dataclass(frozen=True, eq=False)
class _Explained:
    """One model's map of one target: values (row, column) with grid and geometry, and the score explained."""

    values: NDArray[np.float64]
    grid: CellGrid
    geometry: Geometry
    rows: int
    score: float


def prompts_for(labels: Sequence[str], template: str = TEMPLATE) -> tuple[str, ...]:
    """The prompts with which CLIP has to be opened, one a label of the detector."""
    return tuple(template.format(label) for label in labels)


def clip_beside_detr(
    clip: AttentionSource,
    detector: AttentionSource,
    samples: Sequence[Sample],
    *,
    method: str = "chefer_iccv21",
    label: str | None = None,
    template: str = TEMPLATE,
    seed: int = 0,
) -> BesideReport:
    """Compare CLIP's prompt of a label with the detector's objects of that label, picture by picture.

    ``clip`` must have been opened with :func:`prompts_for` the labels; ``label`` None takes the label of each
    picture's surest object. Raises UsageError for a method that is not installed, or samples that are none.
    """
    from foveate.plugins.manager import plugin_manager

    if not samples:
        raise UsageError("CLIP beside the detector: no picture was given")
    explain = plugin_manager().spec("attribution", method).create()
    pairs, found = [], []
    for sample in samples:
        pair, maps = _one(clip, detector, sample, explain, label, template)
        pairs.append(pair)
        found += [(pair, maps)] if maps is not None else []
    if not found:
        return BesideReport(method, tuple(pairs), None)
    sides = tuple(
        _map_set(source, explain, [(pair, maps[i]) for pair, maps in found])
        for i, source in enumerate((clip, detector))
    )
    result = compare(sides[0], sides[1], seed=seed)
    return BesideReport(method, tuple(pairs), result, (sides[0], sides[1]))


def _one(
    clip: AttentionSource,
    detector: AttentionSource,
    sample: Sample,
    explain: Attribution,
    label: str | None,
    template: str,
) -> tuple[Pair, tuple[_Explained, _Explained] | None]:
    """One picture's pair and its two maps; None where the targets differ."""
    name = label if label is not None else surest(detector, sample)
    if name is None:
        return Pair(sample.id, "", reason="the detector found no object"), None
    if explain.name in BLIND:
        return Pair(sample.id, name, reason=f"{explain.name} does not depend on the target"), None
    seen = _explain(detector, sample, explain, name)
    if seen is None:
        return Pair(sample.id, name, reason=f"the detector found no {name!r}"), None
    prompt = template.format(name)
    try:
        said = _explain(clip, sample, explain, prompt)
    except UsageError as error:
        said, reason = None, str(error)
    else:
        reason = "" if said is not None else f"CLIP gives no answer for {prompt!r}"
    if said is None:
        return Pair(sample.id, name, seen.rows, reason=reason), None
    return Pair(sample.id, name, seen.rows, said.score), (said, seen)


def surest(detector: AttentionSource, sample: Sample) -> str | None:
    """The label of the surest object above the detector's threshold, None where there is none."""
    batch = detector.encode([sample])
    with torch.no_grad():
        bound = detector.bind(detector.forward(batch), batch, Target())
    return bound.rows[0].label if bound.rows else None


def _explain(source: AttentionSource, sample: Sample, explain: Attribution, label: str) -> _Explained | None:
    """The map of one label: all its objects together, each with the same mass. None where there is no target."""
    batch = source.encode([sample])
    with torch.no_grad():
        outputs = source.forward(batch)
        bound = source.bind(outputs, batch, Target(label=label))
        if not len(bound):
            return None
        score = float(source.score(outputs, batch, bound).mean())
    made = explain.attribute(source, batch, bound.at("logit"))
    values = np.asarray(made.values, np.float64)
    mass = np.nansum(np.abs(values), axis=(1, 2), keepdims=True)
    together = np.mean(values / np.where(mass > 0, mass, 1.0), axis=0)
    return _Explained(together, made.grid, batch.geometry[0], len(bound), score)


def _map_set(source: AttentionSource, explain: Attribution, rows: Sequence[tuple[Pair, _Explained]]) -> MapSet:
    """One model's maps of all compared pictures; the target of both sides is the label."""
    grids = [one.grid for _, one in rows]
    if any(grid != grids[0] for grid in grids):
        raise UsageError(
            f"{source.card.id}: its cells differ from picture to picture", remedy="open it with image_size=..."
        )
    return MapSet(
        model=source.card.id,
        rule=MapRule(explain.name, target="label", scale="logit"),
        values=np.stack([one.values for _, one in rows]),
        grid=grids[0],
        geometry=tuple(one.geometry for _, one in rows),
        labels=tuple(pair.label for pair, _ in rows),
        unplaced=np.full(len(rows), np.nan),
    )


def _draw(report: BesideReport, samples: dict[str, Sample], out: Path) -> Path:
    from foveate.render.comparison import side_by_side
    from foveate.render.panel import Panel, Rule

    if report.result is None or report.maps is None or not report.result.measures:
        raise UsageError("CLIP beside the detector: nothing was compared", remedy="see the reasons in the report")
    spearman = report.result.measures["spearman"].per_image.own
    row = int(np.argsort(spearman)[(np.isfinite(spearman).sum() - 1) // 2])
    at = report.result.kept[row]
    pair = [pair for pair in report.pairs if not pair.reason][at]
    image = samples[pair.sample].pixels
    panels, rules = [], []
    for maps, name in zip(report.maps, (TEMPLATE.format(pair.label), f"objects: {pair.label}"), strict=True):
        values = maps.values[at]
        panels.append(Panel.of_map(image, maps.geometry[at], values, maps.grid, f"{maps.model}: {name}"))
        rules.append(Rule(maps.model, f"{report.method} of {name!r}", values.size))
    note = f"{pair.sample}: the picture of median agreement (Spearman {spearman[row]:.2f})"
    title = f"CLIP beside the detector: {pair.label}"
    return side_by_side(panels[0], panels[1], (rules[0], rules[1]), title=title, note=note).save(out)
