"""What demonstrations share: steps that are what the verbs do, each printed as the command that does it again."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from foveate.errors import MissingDependencyError

if TYPE_CHECKING:
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource, CapturePlan
    from foveate.study.compare import ComparisonReport
    from foveate.study.faithfulness import FaithfulnessReport

PHOTOS = (
    "astronaut",
    "camera",
    "chelsea",
    "coffee",
    "rocket",
    "hubble_deep_field",
    "retina",
    "immunohistochemistry",
)
"""Photographs inside scikit-image's wheel (no download)."""

Say = Callable[[str], None]
T = TypeVar("T")


@dataclass
class StoryReport:
    """Where everything is and what it shows."""

    folder: Path
    model: str = ""
    captured: int = 0
    accuracy: float | None = None
    precision: float | None = None
    """AP50 of a detector."""
    photos: int = 0
    leaderboard: FaithfulnessReport | None = None
    comparisons: dict[str, ComparisonReport] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_text(self) -> str:
        """The leaderboard, the comparisons, and where to look next."""
        lines = [""]
        if self.leaderboard is not None:
            lines += [self.leaderboard.to_text()]
        for title, comparison in self.comparisons.items():
            lines += [title, comparison.to_text()]
        if self.accuracy is not None:
            lines += [f"{self.accuracy:.1%} of {self.captured} held-out pictures answered correctly."]
        if self.precision is not None:
            lines += [f"AP50 {self.precision:.3f} on {self.captured} held-out pictures."]
        lines += [f"{len(self.files)} files in {self.folder}:", *(f"  {path}" for path in self.files)]
        lines += [f"{sum(self.seconds.values()):.0f} s in all. Next: foveate look {self.model} PHOTO.jpg"]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        return {
            "folder": str(self.folder),
            "model": self.model,
            "captured": self.captured,
            "accuracy": self.accuracy,
            "precision": self.precision,
            "photos": self.photos,
            "leaderboard": None if self.leaderboard is None else self.leaderboard.to_dict(),
            "comparisons": {title: report.to_dict() for title, report in self.comparisons.items()},
            "files": [str(path) for path in self.files],
            "seconds": self.seconds,
        }


class Story(ABC):
    """One demonstration in one folder; the same call continues one that was cut off."""

    def __init__(self, folder: Path, *, model: str, say: Say) -> None:
        self.folder = folder
        self.model = model
        self.say = say
        self.report = StoryReport(folder, model)

    def run(self) -> StoryReport:
        """Tell the whole story."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tell()
        return self.report

    @abstractmethod
    def tell(self) -> None:
        """All steps in order."""

    # ------------------------------------------------------------------------------ shared steps

    def photographs(self) -> Path | None:
        """The photographs as files, or None with the reason said."""
        try:
            return write_photos(self.folder / "photos")
        except MissingDependencyError as error:
            self.say(f"photographs skipped: {error}")
            return None

    def capture(
        self,
        source: AttentionSource,
        inputs: Path,
        name: str,
        *,
        reference: str,
        plan: CapturePlan | None = None,
        options: dict[str, Any] | None = None,
        flags: str = "",
        **settings: Any,
    ) -> Run:
        """Capture ``inputs`` into the run ``name``; ``settings`` go to ``run_capture``."""
        from foveate.data.run import Run
        from foveate.study.capture import run_capture

        out = self.folder / name
        common = {"plan": plan, "batch_size": 16, "reference": reference, "options": options, **settings}
        done = run_capture(source, inputs, out, **common)
        self.command(f"foveate capture {reference} {inputs} -o {out}{flags}")
        self.say(f"  {done.captured} of {done.samples} captured, {self._certified(done.certificate)}")
        return Run.open(out)

    def measure(self, run: Run, *, wide: bool = True) -> None:
        """Every metric into the run; the StreetCLIP study's eight columns and the well-defined table as CSV."""
        from foveate.data.export import study_table, wide_table, write_table
        from foveate.data.export_rows import select
        from foveate.study.measure import load_metrics, measure_run

        measured = measure_run(run)
        selection = select(run)
        legacy, table = self.folder / "attention_statistics.csv", self.folder / "metrics.csv"
        self.command(f"foveate metrics {run.path} --csv {legacy} --wide {table}")
        self.say(f"  {len(measured.written)} metrics for each picture, layer and head, in the run")
        self.made(legacy, write_table(run, study_table(run, selection), legacy))
        if wide:
            self.made(table, write_table(run, wide_table(run, selection, load_metrics(None)[0]), table))

    def attribute(self, run: Run, source: AttentionSource, methods: Sequence[str], **settings: Any) -> None:
        """Explanations of the model's answers, stored in the run."""
        from foveate.study.attribute import Settings, attribute_run

        attribute_run(run, methods, source=source, settings=Settings(**settings))
        self.command(f"foveate attribute {run.path} " + " ".join(f"-m {name}" for name in methods))

    def compare(self, title: str, a: Run, b: Run, *, method: str = "readout") -> None:
        """Two runs on the same pictures."""
        from foveate.study.compare import compare_runs

        out = self.folder / f"compare-{method}"
        report = compare_runs(a, b, method=method, out=out)
        self.report.comparisons[title] = report
        self.command(f"foveate compare {a.path} {b.path} --method {method} -o {out}")
        self.made(*report.files)

    def draw(self, run: Run, kind: str, name: str, **options: Any) -> None:
        """One figure; it says its scale, K and its layer and head rule itself."""
        from foveate.plugins.manager import plugin_manager

        figures = self.folder / "figures"
        figures.mkdir(exist_ok=True)
        self.made(plugin_manager().spec("renderer", kind).create().render(run, out=figures / name, **options))

    # ---------------------------------------------------------------------------------- helpers

    def step(self, name: str, work: Callable[[], T]) -> T:
        """Do ``work`` and note how long it took."""
        start = time.perf_counter()
        result = work()
        self.report.seconds[name] = round(time.perf_counter() - start, 1)
        return result

    def command(self, words: str) -> None:
        """Say which command does the step that was just done."""
        self.say(f"$ {words}")

    def made(self, *paths: Path) -> None:
        """Note and say which files were written."""
        self.report.files += paths
        for path in paths:
            self.say(f"  wrote {path}")

    @staticmethod
    def _certified(certificate: Any) -> str:
        error = certificate.get("value_error") if certificate else None
        return "as before" if error is None else f"certified: P V equals the model's output within {error:.1e}"


def write_photos(folder: Path, names: Sequence[str] = PHOTOS) -> Path:
    """Save scikit-image's photographs as PNG files. Raises MissingDependencyError where it is absent."""
    try:
        import skimage.data
        from PIL import Image
    except ImportError:
        raise MissingDependencyError(
            "the photographs come with scikit-image, which is not installed", remedy='pip install "foveate[demo]"'
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        out = folder / f"{name}.png"
        if not out.is_file():
            Image.fromarray(getattr(skimage.data, name)()).save(out)
    return folder
