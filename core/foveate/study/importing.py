"""The job behind ``foveate import``: a recording from another environment becomes a run like any other."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from foveate.data.manifest import Manifest
from foveate.errors import UsageError
from foveate.interfaces import CapturePlan
from foveate.plugins.opening import open_source
from foveate.study.capture import CaptureReport, run_capture
from foveate.study.plan import Dtype, Heads, build_plan

if TYPE_CHECKING:
    from collections.abc import Iterable

    from foveate.interfaces import AttentionSource

SOURCE = "recording"
FRAMES = ".frames"
"""What the folder of the recorded pictures is called: ``clip.zarr`` has ``clip.frames`` beside it."""


@runtime_checkable
class Recorded(Protocol):
    """A source that plays recordings: it writes the recorded pictures into a folder, and says what to capture."""

    def write_samples(self, folder: Path) -> list[Path]:
        """The recorded pictures as files."""


def import_recording(
    recordings: Path | str | Iterable[Path | str],
    out: Path | str,
    *,
    frames: Path | str | None = None,
    sites: Iterable[str] | None = None,
    rows: str | Literal["auto"] = "auto",
    heads: Heads = "keep",
    dtype: Dtype = "float16",
    top: int = 10,
) -> CaptureReport:
    """Make the run ``out`` of recordings (the exporter's ``.npz``) of one model, or continue it.

    ``frames``: the clips or images that were recorded, as a file or folder; None writes the recorded pictures
    beside ``out`` and takes those. ``rows`` "auto": all rows, but of deformable attention those that the answer is
    read from. ``top``: answers kept. The run opens the recordings again by their paths: keep the files.

    Raises UsageError, ModelError (a recording), SampleError (other pictures), StoreError.
    """
    given = [recordings] if isinstance(recordings, (str, Path)) else recordings
    place, *others = (Path(one).absolute() for one in given)
    more: dict[str, Any] = {"more": [str(one) for one in others]} if others else {}
    source = open_source(place, source=SOURCE, **more)
    if not isinstance(source, Recorded):
        raise UsageError(f"{place}: source {SOURCE!r} plays no recordings", remedy="foveate doctor")
    plan = _plan(source, None if sites is None else tuple(sites), rows, heads, dtype)
    pictures = [Path(frames)] if frames is not None else source.write_samples(Path(out).with_suffix(FRAMES))
    manifest = Manifest.discover(pictures, source.media)
    if len(manifest) != 1 + len(others):
        raise UsageError(
            f"{len(manifest)} {source.media}s for {1 + len(others)} recordings", remedy="name the recorded ones"
        )
    return run_capture(
        source,
        manifest,
        out,
        plan=plan,
        batch_size=1,
        block=0,
        reference=str(place),
        options={"source": SOURCE, **more},
        top=top,
    )


def _plan(
    source: AttentionSource, sites: tuple[str, ...] | None, rows: str, heads: Heads, dtype: Dtype
) -> CapturePlan:
    plan = build_plan(source, sites=sites, rows="all" if rows == "auto" else rows, heads=heads, dtype=dtype)
    if rows != "auto":
        return plan
    sampled = [site.id for site in source.sites if site.form == "deformable" and plan.site(site.id)]
    if not sampled:
        return plan
    few = build_plan(source, sites=sampled, heads=heads, dtype=dtype)
    return CapturePlan(tuple(few.site(part.site) or part for part in plan.sites), dtype)
