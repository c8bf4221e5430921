"""Appearance, motion or both: the job behind ``foveate motion``.

Every clip is shown intact, without its motion, without its appearance and without either, each beside a sham that
changes as much and no cue; the score of the target is held against the intact answer. Shapley values over videos
and a rule written down beforehand give the verdict, which may be "inconclusive" (:mod:`foveate.temporal.verdict`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import SampleError, UsageError
from foveate.stats.intervals import Interval
from foveate.study.motion_caveats import caveats
from foveate.study.motion_edges import CUTS, MASS_RULE
from foveate.study.motion_scoring import REVERSED, VideoScores, score_clip
from foveate.study.motion_subject import ANSWER, Settings
from foveate.temporal.coalitions import CHANGED, COALITIONS
from foveate.temporal.shapley import sham_corrected
from foveate.temporal.verdict import FEWEST, Rule, Verdict, judge

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.data.manifest import Manifest
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, Sample

    Clips = Run | Manifest | Iterable[Sample]
    Load = tuple[str, Callable[[], Sample]]

Progress = Callable[[int, int], None]
Intervals = dict[str, Interval]
_SETTINGS, _RULE = Settings(), Rule()

FLOORS: Mapping[str, float] = {"probability": 0.05, ANSWER: 0.05, "logit": 0.2}
"""Scale -> least total effect of which anything is said: a probability of 0.5 moves by 0.05 where its logit moves
by 0.2. A "value" has no natural size, so none is asked of it."""


@dataclass(frozen=True, eq=False)
class ScaleReport:
    """All that was found on one scale of the score.

    ``coalitions`` are mean scores as measured, ``corrected`` after the sham correction. ``verdict`` is of the
    corrected scores, ``raw`` of the measured ones. ``sham_cost`` is v(both) - v(sham); ``reversed`` is what
    showing the clip backwards changes, v(reversed) - v(both). ``like_none`` says for each cue alone whether its
    corrected mean lies inside the interval of ``none``. ``cuts`` is v(both) - v(cut) for the knockouts of edges;
    ``cut_excess`` is what edges between frames cost beyond as many others (within frames, or anywhere where those
    are too few).
    """

    scale: str
    coalitions: Intervals
    corrected: Intervals
    verdict: Verdict
    raw: Verdict
    sham_cost: Intervals
    like_none: Mapping[str, bool]
    reversed: Interval
    cuts: Intervals
    cut_excess: Interval | None

    def record(self) -> dict[str, Any]:
        """As plain data."""
        intervals = {"coalitions": self.coalitions, "corrected": self.corrected, "sham_cost": self.sham_cost}
        return {
            "scale": self.scale,
            **self.verdict.record(),
            "raw": self.raw.record(),
            **{name: _plain(values) for name, values in intervals.items()},
            "like_none": dict(self.like_none),
            "reversed": self.reversed._asdict(),
            "cuts": _plain(self.cuts),
            "cut_excess": None if self.cut_excess is None else self.cut_excess._asdict(),
        }


@dataclass(frozen=True, eq=False)
class MotionReport:
    """The test's outcome. ``scales`` holds the headline scale first; ``by_label`` its verdict for each class.

    ``card`` is the model's (:class:`foveate.interfaces.ModelCard`), as plain data.
    """

    model: str
    settings: Settings
    rule: Rule
    clips: tuple[VideoScores, ...]
    failed: Mapping[str, str]
    scales: tuple[ScaleReport, ...]
    by_label: Mapping[str, Verdict]
    lost: Intervals
    mass: Interval
    uniform: float
    caveats: tuple[str, ...] = ()
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> Verdict:
        """On the headline scale, sham-corrected."""
        return self.scales[0].verdict

    @property
    def mass_rule(self) -> str:
        """What the rule of thumb "much attention on other frames means motion" says; "" without such attention."""
        if not np.isfinite(self.mass.estimate):
            return ""
        return "motion" if self.mass.estimate > MASS_RULE else "appearance"

    def to_sizes(self) -> dict[str, dict[str, float]]:
        """Condition -> mean share of pixels changed, and root mean square change in grey levels."""
        return _sizes(self.clips)

    def to_dict(self) -> dict[str, Any]:
        """As plain data: all that fixes the result, the result, and every clip's scores."""
        return {
            "model": self.model,
            "card": dict(self.card),
            "verdict": self.verdict.answer,
            "detail": self.verdict.detail,
            "why": self.verdict.why,
            "n": self.verdict.n,
            "clips": len({one.id for one in self.clips}),
            "failed": dict(self.failed),
            "removal": self.settings.removal.record(),
            "rule": {**asdict(self.rule), "floors": dict(FLOORS)},
            "target": {**asdict(self.settings.target), "truth": self.settings.truth},
            "scales": [one.record() for one in self.scales],
            "by_label": {label: one.record() for label, one in self.by_label.items()},
            "identity_lost": _plain(self.lost),
            "sizes": self.to_sizes(),
            "masks": dict(Counter(one.masks for one in self.clips)),
            "attention_mass": {**self.mass._asdict(), "uniform": self.uniform, "rule_says": self.mass_rule},
            "cut_edges": dict(self.clips[0].cut_edges),
            "not_cut": dict(self.clips[0].not_cut),
            "caveats": list(self.caveats),
            "videos": [_row(one) for one in self.clips],
        }


def run_motion(
    source: AttentionSource,
    clips: Clips,
    settings: Settings = _SETTINGS,
    rule: Rule = _RULE,
    *,
    at_most: int | None = None,
    progress: Progress | None = None,
) -> MotionReport:
    """Test what ``source`` decides by on ``clips``, one at a time; what cannot be used is named in ``failed``.

    The unit is the video: clips of one video (the manifest's column ``video``) are averaged first. Raises
    UsageError for a model of images and where no clip can be used.
    """
    if source.media != "clip":
        raise UsageError(
            f"{source.card.id} reads images, which have no motion", remedy="foveate models shows models of clips"
        )
    scored: list[VideoScores] = []
    failed: dict[str, str] = {}
    loads = loads_of(clips)[:at_most]
    for number, (name, load) in enumerate(loads):
        try:
            scored += score_clip(source, load(), settings, number)
        except SampleError as error:
            failed[name] = error.message
        if progress is not None:
            progress(number + 1, len(loads))
    if not scored:
        reasons = "; ".join(dict.fromkeys(failed.values()))
        raise UsageError(f"no clip could be used: {reasons or 'none given'}")
    report = summarise(source.card.id, scored, failed, settings, rule)
    return replace(report, card=asdict(source.card))


def summarise(
    model: str, scored: Sequence[VideoScores], failed: Mapping[str, str], settings: Settings, rule: Rule
) -> MotionReport:
    """The report on clips that were scored."""
    videos = _by_video(scored)
    names = list(scored[0].scores)
    scales = tuple(_scale_report(name, _columns(videos, name), rule) for name in names)
    groups = _labels(scored)
    family = replace(rule, family=rule.family * max(1, len(groups)))
    labelled = {
        label: judge(sham_corrected(_columns(some, names[0])), family, floor=_floor(names[0]))
        for label, some in groups.items()
    }
    lost = {n: rule.interval([_mean(c.lost.get(n, np.nan) for c in v) for v in videos]) for n in scored[0].lost}
    mass = rule.interval([_mean(clip.mass for clip in video) for video in videos])
    uniform = _mean(clip.uniform for clip in scored)
    report = MotionReport(
        model, settings, rule, tuple(scored), dict(failed), scales, labelled, lost, mass, uniform
    )
    return replace(report, caveats=caveats(report))


def loads_of(clips: Clips) -> list[Load]:
    """(id, how to load it) of every clip; nothing is decoded yet where a run or a manifest is given."""
    from foveate.data.manifest import Manifest
    from foveate.data.run import Run

    if isinstance(clips, Run):
        ids = clips.samples["id"].values
        return [(str(ids[i]), partial(clips.load_sample, i)) for i in map(int, clips.ok)]
    if isinstance(clips, Manifest):
        return [(name, partial(clips.load, i)) for i, name in enumerate(clips.ids)]
    return [(sample.id, partial(_itself, sample)) for sample in clips]


def _itself(sample: Sample) -> Sample:
    return sample


# ------------------------------------------------------------------------------------------ numbers


def _by_video(scored: Sequence[VideoScores]) -> list[list[VideoScores]]:
    """What belongs to one video: windows, and objects, of one recording are no independent witnesses."""
    groups: dict[str, list[VideoScores]] = {}
    for one in scored:
        groups.setdefault(one.video, []).append(one)
    return list(groups.values())


def _columns(videos: Sequence[Sequence[VideoScores]], scale: str) -> dict[str, NDArray[np.float64]]:
    """Condition -> (video,); NaN where a video lacks it."""
    names = dict.fromkeys(n for video in videos for clip in video for n in clip.scores.get(scale, ()))
    missing: dict[str, float] = {}
    return {
        name: np.array([_mean(clip.scores.get(scale, missing).get(name, np.nan) for clip in v) for v in videos])
        for name in names
    }


def _scale_report(scale: str, columns: Mapping[str, NDArray[np.float64]], rule: Rule) -> ScaleReport:
    corrected = sham_corrected(columns)
    means: Intervals = {name: rule.interval(corrected[name]) for name in COALITIONS}
    nothing = means["none"]
    both = columns["both"]
    cuts = {name: rule.interval(both - columns[name]) for name in CUTS if name in columns}
    control = "anywhere" if "anywhere" in columns else "within"
    excess = rule.interval(columns[control] - columns["between"]) if control in columns and cuts else None
    return ScaleReport(
        scale,
        {name: rule.interval(columns[name]) for name in COALITIONS},
        means,
        judge(corrected, rule, floor=_floor(scale)),
        judge({name: columns[name] for name in COALITIONS}, rule, floor=_floor(scale)),
        {name: rule.interval(both - columns[f"sham {name}"]) for name in CHANGED},
        {name: nothing.low <= means[name].estimate <= nothing.high for name in ("appearance", "motion")},
        rule.interval(columns[REVERSED] - both),
        cuts,
        excess,
    )


def _floor(scale: str) -> float:
    return FLOORS.get(scale, 0.0)


def _labels(scored: Sequence[VideoScores]) -> dict[str, list[list[VideoScores]]]:
    """Videos by class, classes with too few videos left out; nothing where there is one class."""
    labels = sorted({one.label for one in scored})
    groups = {label: _by_video([one for one in scored if one.label == label]) for label in labels}
    return {label: some for label, some in groups.items() if len(some) >= FEWEST} if len(groups) > 1 else {}


def _sizes(scored: Sequence[VideoScores]) -> dict[str, dict[str, float]]:
    """Condition -> mean share of pixels changed and root mean square change in grey levels."""
    return {
        name: {
            "pixels": _mean(one.sizes[name][0] for one in scored),
            "grey_levels": _mean(one.sizes[name][1] for one in scored),
        }
        for name in scored[0].sizes
    }


def _row(one: VideoScores) -> dict[str, Any]:
    return {
        "id": one.id,
        "sha256": one.sha256,
        "video": one.video,
        "label": one.label,
        "rows": one.rows,
        "scores": {scale: dict(values) for scale, values in one.scores.items()},
        "identity_lost": dict(one.lost),
        "masks": one.masks,
        "attention_mass": one.mass,
    }


def _plain(intervals: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: interval._asdict() for name, interval in intervals.items()}


def _mean(values: Iterable[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
