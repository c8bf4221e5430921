"""The whole job on a small trained detector that ships with foveate, object by object, offline.

Held-out pictures show coloured shapes among grey ones. What has to be beaten is not only a random order but
the object's own predicted box, filled evenly: a method explains what it shows beyond the box. The results are
printed whichever way they fall.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import UsageError
from foveate.study.story import Say, Story, StoryReport

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foveate.data.run import Run
    from foveate.detection.precision import ImageDetections
    from foveate.interfaces import AttentionSource

MODEL = "foveate/shapes-cdetr"
UNTRAINED = "foveate/shapes-cdetr-untrained"
HELD_OUT_SEED = 20_261_122
"""Seed of the demo's pictures; training and its validation use other seeds (training/shapes_cdetr.py)."""
METHODS = (
    "readout",
    "rollout",
    "grad_attention",
    "chefer_iccv21",
    "legrad",
    "gradcam",
    "odam",
    "saliency_abs",
    "inputxgrad_abs",
    "ig_abs",
    "ablation",
)
"""D-RISE shows the model thousands of pictures an object: ``foveate attribute RUN -m drise`` adds it."""
TWIN_METHODS = ("readout", "saliency_abs")
CROSS = "decoder.cross"
TOP = 10
"""Answers kept: one a query of the shipped detector."""


class DetectorDemo(Story):
    """Coloured shapes among grey ones: why did the detector see this object here?"""

    def __init__(self, folder: Path, *, images: int, steps: int, say: Say) -> None:
        super().__init__(folder, model=MODEL, say=say)
        self.images = images
        self.steps = steps

    def tell(self) -> None:
        """Pictures, capture, metrics, attribution, faithfulness, figures."""
        from foveate.plugins.opening import open_source

        model = open_source(MODEL)
        pictures = self.step("pictures", self.make_pictures)
        run = self.step("capture", lambda: self.capture_shapes(model, pictures))
        photos = self.step("photos", lambda: self.capture_photos(model))
        self.step("metrics", lambda: self.measure_queries(run))
        self.step("attribute", lambda: self.attribute(run, model, METHODS, batch_size=32))
        self.step("faithfulness", lambda: self.score(run, model))
        self.step("figures", lambda: self.draw_all(run, photos))

    def make_pictures(self) -> Path:
        """Held-out pictures with the masks, boxes and labels of their objects."""
        from foveate.testing.shapes import write_dataset

        manifest = write_dataset(self.folder / "pictures", self.images, seed=HELD_OUT_SEED)
        self.say(f"{self.images} held-out pictures of one to three coloured shapes: {manifest}")
        self.say(f"  their boxes, masks and labels: {manifest.with_name('objects.json')}")
        return manifest

    def capture_shapes(self, model: AttentionSource, manifest: Path) -> Run:
        """Full attention of every layer and head, and how precise the answers are."""
        from foveate.interfaces import CapturePlan, SitePlan

        plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in model.sites))
        name = f"{MODEL.rpartition('/')[2]}.zarr"
        flags = f" --rows all --top {TOP}"
        run = self.capture(model, manifest, name, reference=MODEL, plan=plan, flags=flags, top=TOP)
        self.report.captured = len(run.ok)
        self.report.precision = precision(run, manifest.with_name("objects.json"))
        self.say(f"  AP50 {self.report.precision:.3f} on these pictures (share of precision at IoU 0.5, as COCO)")
        return run

    def capture_photos(self, model: AttentionSource) -> Run | None:
        """Photographs of any size: what it finds there means nothing."""
        folder = self.photographs()
        if folder is None:
            return None
        run = self.capture(model, folder, "photos.zarr", reference=MODEL, flags=f" --top {TOP}", top=TOP)
        self.report.photos = len(run.ok)
        self.say("  photographs lie outside its training data: objects found there mean nothing")
        return run

    def measure_queries(self, run: Run) -> None:
        """Every metric of the object queries' attention over the picture, in the run."""
        from foveate.study.measure import measure_run

        measured = measure_run(run, sites=[CROSS])
        self.command(f"foveate metrics {run.path} --site {CROSS}")
        self.say(f"  {len(measured.written)} metrics for each picture, layer, head and object query")

    def score(self, run: Run, model: AttentionSource) -> None:
        """Deletion and insertion of every object beside every control, its own box among them."""
        from foveate.faithfulness.curves import Protocol
        from foveate.faithfulness.scoring import Scoring
        from foveate.plugins.manager import plugin_manager
        from foveate.plugins.opening import open_source
        from foveate.study.faithfulness import run_faithfulness
        from foveate.study.faithfulness_job import Settings

        twins = [plugin_manager().spec("attribution", name).create() for name in TWIN_METHODS]
        settings = Settings(Scoring(Protocol(steps=self.steps)), batch_size=8)
        out = self.folder / "leaderboard"
        scored = run_faithfulness(
            run, source=model, settings=settings, twin=open_source(UNTRAINED), twin_methods=twins, out=out
        )
        self.report.leaderboard = scored
        self.command(f"foveate faithfulness {run.path} --steps {self.steps} --untrained {UNTRAINED} -o {out}")
        self.made(*scored.files)

    def draw_all(self, run: Run, photos: Run | None) -> None:
        """The figures of detectors, on the first picture with most objects."""
        sample = most_objects(run)
        for kind, name in (
            ("objects", "objects.png"),
            ("film-strip", "decoder-layers.png"),
            ("cross-objects", "who-looks-at-whom.png"),
            ("methods", "object-methods.png"),
        ):
            self.draw(run, kind, name, sample=sample)
        self.draw(run, "distributions", "distributions.png")
        if photos is not None:
            self.draw(photos, "triptych", "photo-triptych.png")


def precision(run: Run, truth: Path) -> float:
    """AP50 of a run's stored answers against the objects that :func:`foveate.testing.shapes.write_dataset` wrote.

    Classes are those that occur. NaN where no captured picture has an object.
    """
    import json

    from foveate.detection.precision import mean_average_precision

    known = json.loads(truth.read_text(encoding="utf-8"))
    classes = {name: index for index, name in enumerate(known["classes"])}
    images = [_detections(run, int(i), known["images"], classes) for i in run.ok]
    return mean_average_precision(images)


def most_objects(run: Run) -> int:
    """Position of the first captured sample with the most objects above the threshold."""
    import numpy as np

    from foveate.render.detection_run import threshold_of

    counts = (run.predictions["score"].values[run.ok] > threshold_of(run)).sum(1)
    return int(run.ok[int(np.argmax(counts))])


def _detections(
    run: Run, position: int, images: Mapping[str, list[dict[str, Any]]], classes: Mapping[str, int]
) -> ImageDetections:
    """Stored answers and true objects of one picture."""
    import numpy as np
    import torch

    from foveate.detection.boxes import iou
    from foveate.detection.precision import ImageDetections
    from foveate.render.detection_run import answers_of

    objects = images[str(run.samples["id"].values[position])]
    answers = answers_of(run, position)
    found = np.array([one.box for one in answers], np.float64).reshape(-1, 4)
    true = np.array([one["box"] for one in objects], np.float64).reshape(-1, 4)
    overlap = iou(torch.from_numpy(found)[:, None], torch.from_numpy(true)).numpy()
    labels = np.array([classes.get(one.label, -1) for one in answers])
    truth = np.array([classes[str(one["label"])] for one in objects])
    return ImageDetections(np.array([one.score for one in answers]), labels, truth, overlap)


def run_detector_demo(
    folder: Path | str = "demo-detr", *, images: int = 30, steps: int = 18, say: Say = print
) -> StoryReport:
    """Run the detection demonstration into ``folder``, or continue one that was cut off.

    ``images`` held-out pictures are captured (at least 2), deletion and insertion take ``steps`` steps: an object
    covers a twentieth of a picture, so that steps must be small to tell methods apart. Raises UsageError; about
    two minutes on two cores.
    """
    if images < 2:
        raise UsageError(f"images: {images}; statistics over pictures need at least 2")
    return DetectorDemo(Path(folder), images=images, steps=steps, say=say).run()
