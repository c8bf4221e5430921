"""The whole job on a small trained model that ships with foveate: pictures in, verdict out, offline.

Held-out synthetic pictures have masks that say where the evidence lies; photographs show the geometry. The
results are printed whichever way they fall.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import UsageError
from foveate.study.attribute_plan import DEFAULT_METHODS
from foveate.study.story import Say, Story, StoryReport

if TYPE_CHECKING:
    from foveate.data.run import Run
    from foveate.interfaces import AttentionSource

MODEL = "foveate/rim-vit"
UNTRAINED = "foveate/rim-vit-untrained"
SHUFFLED = "foveate/rim-vit-shuffled"
HELD_OUT_SEED = 20_261_121
"""Seed of the demo's pictures; training and its validation use other seeds (training/rim_vit.py)."""
TWIN_METHODS = ("readout", "saliency_abs")


class Demo(Story):
    """Discs with known evidence: does each explanation point at what decides the answer?"""

    def __init__(self, folder: Path, *, images: int, steps: int, say: Say) -> None:
        super().__init__(folder, model=MODEL, say=say)
        self.images = images
        self.steps = steps

    def tell(self) -> None:
        """Pictures, capture, metrics, attribution, faithfulness, comparison, figures, on one thread."""
        with one_thread():
            self._tell()

    def _tell(self) -> None:
        from foveate.plugins.opening import open_source

        model = open_source(MODEL)
        pictures = self.step("pictures", self.make_pictures)
        run = self.step("capture", lambda: self.capture_discs(model, pictures))
        photos = self.step("photos", lambda: self.capture_photos(model))
        self.step("metrics", lambda: self.measure(run))
        self.step("attribute", lambda: self.attribute(run, model, DEFAULT_METHODS, batch_size=32))
        self.step("faithfulness", lambda: self.score(run, model))
        self.step("compare", lambda: self.compare_twin(run, pictures))
        self.step("figures", lambda: self.draw_all(run, photos))

    def make_pictures(self) -> Path:
        """Held-out pictures with labels and masks, and a manifest of them."""
        from foveate.testing.synthetic import write_dataset

        manifest = write_dataset(self.folder / "pictures", self.images, seed=HELD_OUT_SEED)
        self.say(f"{self.images} held-out pictures with masks: {manifest}")
        self.say("  three discs each; the answer is the hue of the one with the light rim, the mask is that disc")
        return manifest

    def capture_discs(self, model: AttentionSource, manifest: Path, reference: str = MODEL) -> Run:
        """Full attention of every layer and head."""
        from foveate.interfaces import CapturePlan, SitePlan

        plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in model.sites))
        name = f"{reference.rpartition('/')[2]}.zarr"
        run = self.capture(model, manifest, name, reference=reference, plan=plan, flags=" --rows all")
        if reference == MODEL:
            correct = run.predictions["correct"].values[run.ok] == 1
            self.report.captured, self.report.accuracy = len(run.ok), float(correct.mean())
            self.say(f"  {correct.mean():.1%} answered correctly")
        return run

    def capture_photos(self, model: AttentionSource) -> Run | None:
        """Photographs of any size: the maps lie exactly on them, the answers mean nothing."""
        folder = self.photographs()
        if folder is None:
            return None
        run = self.capture(model, folder, "photos.zarr", reference=MODEL)
        self.report.photos = len(run.ok)
        self.say("  photographs lie outside its training data: its answers there mean nothing")
        return run

    def score(self, run: Run, model: AttentionSource) -> None:
        """Deletion and insertion beside every control, and the leaderboard."""
        from foveate.faithfulness.curves import Protocol
        from foveate.faithfulness.scoring import Scoring
        from foveate.plugins.manager import plugin_manager
        from foveate.plugins.opening import open_source
        from foveate.study.faithfulness import run_faithfulness
        from foveate.study.faithfulness_job import Settings

        twins = [plugin_manager().spec("attribution", name).create() for name in TWIN_METHODS]
        settings = Settings(Scoring(Protocol(steps=self.steps)), batch_size=32)
        out = self.folder / "leaderboard"
        scored = run_faithfulness(
            run, source=model, settings=settings, twin=open_source(UNTRAINED), twin_methods=twins, out=out
        )
        self.report.leaderboard = scored
        self.command(f"foveate faithfulness {run.path} --steps {self.steps} --untrained {UNTRAINED} -o {out}")
        self.made(*scored.files)

    def compare_twin(self, run: Run, manifest: Path) -> None:
        """The trained model beside its twin that learned from permuted labels, on the same pictures."""
        from foveate.plugins.opening import open_source

        twin = self.capture_discs(open_source(SHUFFLED), manifest, SHUFFLED)
        self.compare(
            f"The trained model (A) beside its twin trained on permuted labels (B), {SHUFFLED}:", run, twin
        )

    def draw_all(self, run: Run, photos: Run | None) -> None:
        """Every kind of figure."""
        self.draw(run, "grid", "discs-grid.png")
        self.draw(run, "triptych", "disc-triptych.png")
        self.draw(run, "matrix", "disc-layers-heads.png")
        self.draw(run, "methods", "disc-methods.png")
        self.draw(run, "distributions", "distributions.png")
        if photos is not None:
            self.draw(photos, "grid", "photos-grid.png", count=8)
            self.draw(photos, "triptych", "photo-triptych.png")


@contextmanager
def one_thread() -> Iterator[None]:
    """A model of 0.3 M parameters gains nothing from a second thread and loses much on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_demo(folder: Path | str = "demo", *, images: int = 100, steps: int = 8, say: Say = print) -> StoryReport:
    """Run the demonstration into ``folder``, or continue one that was cut off.

    ``images`` held-out pictures are captured (at least 2), deletion and insertion take ``steps`` steps.
    Raises UsageError; about two minutes on two cores.
    """
    if images < 2:
        raise UsageError(f"images: {images}; statistics over pictures need at least 2")
    return Demo(Path(folder), images=images, steps=steps, say=say).run()
