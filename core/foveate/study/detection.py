"""The job behind ``foveate analyse``: the analyses of detectors over a run, each with its baseline.

An analysis turns a run into findings: one number an image (or one for all images, where that is what it is),
beside the number that no preference would give for the same image. Here findings become lines: mean over images,
95 % bootstrap interval, and whether the paired difference to the baseline excludes zero. Lines of one call are not
corrected for their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from foveate.errors import FoveateError, UsageError
from foveate.stats.intervals import bootstrap_mean
from foveate.study.detection_products import store as store_findings
from foveate.study.detection_products import store_layers
from foveate.temporal.verdict import FEWEST

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from foveate.study.detection_subject import Subject

ALPHA = 0.05
TINY = 1e-9
"""Bounds nearer to 0 than this are 0: sums of floats that cancel."""
ROUNDING = 1e-3
"""Relative differences that float16 storage alone can make."""

Needs = Literal["rows", "answers", "model"]


@dataclass(frozen=True, eq=False)
class Finding:
    """``values (image,)`` of one quantity, NaN where an image has none, and ``baseline`` alike (or one number).

    With ``whole`` there is one value for all images together, and ``p`` of a permutation test where there is one.
    """

    quantity: str
    unit: str
    values: NDArray[np.float64]
    baseline: NDArray[np.float64] | float = float("nan")
    baseline_is: str = ""
    site: str = ""
    layer: int | None = None
    head: int | None = None
    whole: bool = False
    p: float = float("nan")
    n: int = 0
    """Of a whole: how many images it was computed from."""


@dataclass(frozen=True)
class Line:
    """What a finding says: mean over ``n`` images with its interval, the baseline's mean, and their difference.

    ``difference`` is (mean, low, high) of value - baseline over images; NaN bounds where none exist.
    """

    analysis: str
    quantity: str
    unit: str
    site: str
    layer: int | None
    head: int | None
    n: int
    mean: float
    low: float
    high: float
    baseline: float
    baseline_is: str
    difference: tuple[float, float, float]
    p: float

    @property
    def verdict(self) -> str:
        """``above``, ``below`` or ``no`` (not told apart from the baseline); empty without a baseline.

        ``untested`` without a permutation test where there is one value, or where there are fewer than
        :data:`FEWEST` images: bootstrap intervals over so few are too narrow (measured in
        :mod:`foveate.temporal.verdict`). Differences within :data:`ROUNDING` are none.
        """
        mean, low, high = self.difference
        if mean != mean:
            return ""
        told = self.p <= ALPHA if self.p == self.p else low > TINY or high < -TINY
        if self.p != self.p and (low != low or self.n < FEWEST):
            return "untested"
        if not told or abs(mean) <= 1e-6 + ROUNDING * max(abs(self.mean), abs(self.baseline)):
            return "no"
        return "above" if mean > 0 else "below"


@dataclass(frozen=True)
class Analysis:
    """One entry of the list: what it answers, what it needs, and the function ``Subject -> findings``."""

    name: str
    summary: str
    needs: Needs
    target: str

    def load(self) -> Callable[[Subject], Iterable[Finding]]:
        """Import the function."""
        module, name = self.target.split(":")
        function: Callable[[Subject], Iterable[Finding]] = getattr(import_module(f"foveate.study.{module}"), name)
        return function


_LIST: tuple[tuple[str, str, Needs, str], ...] = (
    ("queries", "do object queries specialise in a class or a place", "answers", "detection_answers:queries"),
    (
        "redundancy",
        "objects found twice, and found still when queries are dropped",
        "model",
        "detection_answers:redundancy",
    ),
    (
        "objects",
        "whose box and whose query an object attends to, beside area and count",
        "rows",
        "detection_rows:objects",
    ),
    ("groups", "mass between objects and background in the encoder", "rows", "detection_rows:groups"),
    ("levels", "mass between the levels of a pyramid", "rows", "detection_rows:levels"),
    ("borders", "mass in a band around the box, over shifted boxes", "rows", "detection_rows:borders"),
    (
        "segments",
        "masks cut from attention (60 % of mass, Otsu) against true masks",
        "rows",
        "detection_masks:segments",
    ),
    (
        "patterns",
        "mass in a local window, in the own row and column; effective rank",
        "rows",
        "detection_rows:patterns",
    ),
    ("layers", "attention distance, top-k mass and head diversity by layer", "rows", "detection_rows:layers"),
    (
        "readouts",
        "what each decoder layer would answer, and which queries change objects",
        "model",
        "detection_model:readouts",
    ),
    ("heads", "head importance by gradient and by switching heads off", "model", "detection_model:heads"),
    (
        "approximations",
        "output error of sparse, low-rank and linear attention at equal budget",
        "model",
        "detection_model:approximations",
    ),
    (
        "scale",
        "does attention stay on the same things when the picture is resized",
        "model",
        "detection_model:scale",
    ),
)
ANALYSES: dict[str, Analysis] = {row[0]: Analysis(*row) for row in _LIST}
"""Name -> analysis, in the order in which they run."""


@dataclass(frozen=True)
class Report:
    """``lines`` of all analyses; ``left_out`` name -> why; ``values`` one row an image and quantity.

    ``files`` and ``products`` (of the run) say where they were written.
    """

    path: Path
    lines: list[Line]
    left_out: dict[str, str]
    values: pd.DataFrame
    files: list[Path] = field(default_factory=list)
    products: list[str] = field(default_factory=list)


def analyse_run(
    subject: Subject,
    names: Sequence[str] | None = None,
    *,
    out: Path | None = None,
    seed: int = 0,
    store: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run analyses (default: all that can) on a run of a detector.

    Findings become products of the run, ``analyses/<name>`` (:mod:`foveate.study.detection_products`), unless
    ``store`` is False.

    An analysis that cannot be made is left out with its reason; where it was asked for by name, that is an
    error. ``out``: folder for ``lines.csv``, ``values.csv`` (per image) and ``left_out.csv``. Raises UsageError
    for an unknown name.
    """
    chosen = _chosen(names)
    lines: list[Line] = []
    left_out: dict[str, str] = {}
    rows: list[dict[str, object]] = []
    products: list[str] = []
    for analysis in chosen:
        if progress:
            progress(analysis.name)
        try:
            findings = [finding for finding in analysis.load()(subject) if np.isfinite(finding.values).any()]
            if not findings:
                raise UsageError("no image has an object for it")
        except FoveateError as error:
            if names:
                raise
            left_out[analysis.name] = error.message.splitlines()[0]
            continue
        own = [line_of(analysis.name, finding, seed=seed) for finding in findings]
        lines += own
        if store:
            products.append(store_findings(analysis, findings, own, subject, seed=seed))
            if analysis.name == "readouts":
                products.append(store_layers(subject))
        rows += [row for finding in findings for row in _rows(analysis.name, finding, subject)]
    import pandas as pd

    values = pd.DataFrame(rows)
    report = Report(subject.run.path, lines, left_out, values, products=products)
    return report if out is None else written(report, out)


def line_of(analysis: str, finding: Finding, *, seed: int = 0) -> Line:
    """A finding as one line."""
    base = np.broadcast_to(np.asarray(finding.baseline, np.float64), finding.values.shape)
    nan = float("nan")
    if finding.whole:
        value, null = float(finding.values[0]), float(base[0])
        numbers = (finding.n, value, nan, nan, null)
        difference = (value - null, nan, nan)
    else:
        interval, apart = (bootstrap_mean(v, seed=seed) for v in (finding.values, finding.values - base))
        both = np.isfinite(finding.values) & np.isfinite(base)
        null = float(base[both].mean()) if both.any() else nan
        numbers = (interval.n, interval.estimate, interval.low, interval.high, null)
        difference = (apart.estimate, apart.low, apart.high)
    n, mean, low, high, null = numbers
    return Line(
        analysis=analysis,
        quantity=finding.quantity,
        unit=finding.unit,
        site=finding.site,
        layer=finding.layer,
        head=finding.head,
        n=n,
        mean=mean,
        low=low,
        high=high,
        baseline=null,
        baseline_is=finding.baseline_is,
        difference=difference,
        p=finding.p,
    )


def _chosen(names: Sequence[str] | None) -> list[Analysis]:
    unknown = [name for name in names or () if name not in ANALYSES]
    if unknown:
        raise UsageError(f"no analysis {unknown[0]!r}", remedy=f"one of {', '.join(ANALYSES)}")
    return [ANALYSES[name] for name in dict.fromkeys(names or ANALYSES)]


def _rows(analysis: str, finding: Finding, subject: Subject) -> list[dict[str, object]]:
    base = np.broadcast_to(np.asarray(finding.baseline, np.float64), finding.values.shape)
    ids = ["(all images)"] if finding.whole else subject.ids
    place = {"site": finding.site, "layer": finding.layer, "head": finding.head}
    return [
        {"analysis": analysis, "quantity": finding.quantity, **place, "sample": name, "value": v, "baseline": b}
        for name, v, b in zip(ids, finding.values, base, strict=True)
    ]


def written(report: Report, out: Path) -> Report:
    """The report with its tables in the folder ``out``."""
    import pandas as pd

    out.mkdir(parents=True, exist_ok=True)
    files = [out / name for name in ("lines.csv", "values.csv", "left_out.csv")]
    table = pd.DataFrame([{**asdict(line), "verdict": line.verdict} for line in report.lines])
    if len(table):
        ends = pd.DataFrame(
            table.pop("difference").tolist(), columns=["difference", "difference_low", "difference_high"]
        )
        table = pd.concat([table, ends], axis=1)
    table.to_csv(files[0], index=False)
    report.values.to_csv(files[1], index=False)
    left = [{"analysis": name, "reason": why} for name, why in report.left_out.items()]
    pd.DataFrame(left, columns=["analysis", "reason"]).to_csv(files[2], index=False)
    return replace(report, files=files)
