"""A real model on real photographs: what it attends to, measured, drawn, and beside its untrained self.

For models that give no answer (DINOv2's backbone) there is nothing to explain, so no map is ranked here; the
comparison says how much of the pattern is there before any training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from foveate.errors import MissingDependencyError
from foveate.study.story import Say, Story, StoryReport

if TYPE_CHECKING:
    from foveate.data.run import Run


class PhotoStory(Story):
    """Photographs through any model that opens."""

    def tell(self) -> None:
        """Capture trained and untrained, measure, compare, draw."""
        photos = self.step("photos", self.photographs)
        if photos is None:
            raise MissingDependencyError("no photographs", remedy='pip install "foveate[demo]"')
        run = self.step("capture", lambda: self._capture(photos, trained=True))
        self.report.photos = len(run.ok)
        twin = self.step("untrained", lambda: self._capture(photos, trained=False))
        self.step("metrics", lambda: self.measure(run))
        title = f"{self.model} (A) beside the same architecture with random weights (B):"
        self.step("compare", lambda: self.compare(title, run, twin))
        self.step("figures", lambda: self._draw(run))

    def _capture(self, photos: Path, *, trained: bool) -> Run:
        from foveate.plugins.opening import open_source

        source = open_source(self.model, weights=None if trained else "random")
        return self.capture(
            source,
            photos,
            "photos.zarr" if trained else "photos-untrained.zarr",
            reference=self.model,
            options={} if trained else {"weights": "random"},
            flags="" if trained else " --weights random",
        )

    def _draw(self, run: Run) -> None:
        self.draw(run, "grid", "photos-grid.png", count=8)
        self.draw(run, "triptych", "photo-triptych.png")
        self.draw(run, "matrix", "photo-layers-heads.png")
        self.draw(run, "distributions", "distributions.png")


def run_photo_demo(model: str, folder: Path | str = "demo-real", *, say: Say = print) -> StoryReport:
    """Run ``model`` (registry id, hub id or folder) on photographs into ``folder``. Raises ModelError."""
    return PhotoStory(Path(folder), model=model, say=say).run()
