"""The job behind ``foveate video``: choose, compose and write one clip of a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import UsageError
from foveate.render import clip_run
from foveate.render import selection as pick
from foveate.render.clip_overlay import Overlay, compose, shown_size
from foveate.render.video_file import constant_rate, write_video

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from foveate.data.run import Run


NO_MAP = "tracks alone: the run keeps no attention rows over patches (--rows all, or an attribution with --method)"


@dataclass(frozen=True)
class VideoPlan:
    """What is drawn: the options of ``foveate video``."""

    sample: str | int | None = None
    track: str | None = None
    site: str | None = None
    layer: int = -1
    head: str = "mean"
    method: str | None = None
    with_map: bool = True
    least: float = 0.0
    scale: str = "lift"
    fps: float | None = None
    size: int = 640


@dataclass(frozen=True)
class DrawnVideo:
    """What was written, or would be: ``tracks`` by name, ``frames`` at ``fps``, the caption and what to know."""

    path: Path
    sample: str
    frames: int
    fps: float
    size: tuple[int, int]
    tracks: tuple[str, ...]
    caption: str
    note: str
    written: bool

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**vars(self), "path": str(self.path)}

    def to_text(self) -> str:
        """For a terminal."""
        tracks = ", ".join(self.tracks) or "no track"
        said = f"{self.sample}: {self.frames} frames at {self.fps:.3g} a second; {tracks}; {self.caption}"
        return "\n".join([said, *([self.note] if self.note else [])])


def draw_video(run: Run, plan: VideoPlan, out: Path | None = None, *, dry_run: bool = False) -> DrawnVideo:
    """Write the video of one clip, one frame in memory at a time.

    Raises UsageError for a run of images, a clip, track, site or method that is not there, and what
    :func:`foveate.render.video_file.write_video` raises.
    """
    if run.media != "clip":
        raise UsageError(f"{run.path}: a run of images has no frames", remedy="foveate plot draws images")
    run.check_captured()
    position = pick.position_of(run, int(run.ok[0]) if plan.sample is None else plan.sample)
    overlay = _overlay(run, position, plan)
    name = str(run.samples["id"].values[position])
    path = out or Path(f"{Path(name).stem}.mp4")
    rate, index, note = constant_rate(run.times(position), plan.fps)
    note = "\n".join(said for said in (note, NO_MAP if _mapless(run, plan) else "") if said)
    if dry_run:
        geometry = run.geometry(position)
        size = shown_size(geometry.original_height, geometry.original_width, plan.size)
        return _drawn(path, name, index.size, rate, size, overlay, note, written=False)
    labels = clip_run.frame_labels(run, position)
    frames = _repeated(run, position, overlay, labels, index.tolist())
    done = write_video(frames, path, fps=rate, title=f"{run.model_id}: {name}")
    return _drawn(done.path, name, done.frames, rate, done.size, overlay, note, written=True)


def _drawn(
    path: Path,
    name: str,
    frames: int,
    fps: float,
    size: tuple[int, int],
    overlay: Overlay,
    note: str,
    *,
    written: bool,
) -> DrawnVideo:
    tracks = tuple(track.name for track in overlay.tracks)
    return DrawnVideo(path, name, frames, fps, size, tracks, overlay.caption, note, written)


def _overlay(run: Run, position: int, plan: VideoPlan) -> Overlay:
    tracks = clip_run.tracks_of(run, position, plan.track, least=plan.least)
    chosen = None
    if plan.with_map and plan.method is not None:
        chosen = clip_run.attribution_over_time(run, position, plan.method, track=plan.track)
    elif plan.with_map and not _mapless(run, plan):
        chosen = clip_run.attention_over_time(
            run, position, site=plan.site, layer=plan.layer, head=_head(plan.head), track=plan.track
        )
    return clip_run.overlay_of(run, position, chosen, tracks, scale=plan.scale, size=plan.size)


def _mapless(run: Run, plan: VideoPlan) -> bool:
    """No map was asked for by name and the run keeps none, as of trackers that read object queries."""
    named = plan.site is not None or plan.method is not None
    return plan.with_map and not named and not clip_run.sites_over_patches(run) and "track" in run.predictions


def _head(head: str) -> Any:
    if head != "mean" and not head.isdigit():
        raise UsageError(f"--head {head}: expected a number or mean")
    return "mean" if head == "mean" else int(head)


def _repeated(run: Run, position: int, overlay: Overlay, labels: list[str], index: list[int]) -> Any:
    """Composed frames in the order of ``index`` (ascending), each composed once however often it is shown."""
    wanted = iter(index)
    due = next(wanted, None)
    frame: NDArray[np.uint8]
    for number, frame in enumerate(compose(clip_run.shown_frames(run, position), overlay, labels)):
        while due == number:
            yield frame
            due = next(wanted, None)
        if due is None:
            return
