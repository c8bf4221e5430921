"""The core's own pictures, declared as a stranger's package would declare its own. Imports nothing heavy."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import RendererSpec

FOVEATE_API = (1, 0)

_RENDERERS = (
    ("triptych", "renderers:Triptych", "one sample: picture, map, overlay"),
    ("grid", "renderers:Samples", "a page of samples: diverse, or the extremes of a metric"),
    ("matrix", "renderers:Matrix", "one sample: every layer and head"),
    ("distributions", "renderers:Distributions", "histograms of metrics over images"),
    ("methods", "renderers:Methods", "one sample: every stored attribution map"),
    ("objects", "detection_renderers:Objects", "one sample of a detector: each object's box and cross-attention"),
    ("film-strip", "detection_renderers:Layers", "one sample of a detector: every decoder layer"),
    ("cross-objects", "detection_renderers:CrossObjects", "one sample of a detector: attention in whose box"),
    ("points", "detection_renderers:Points", "one sample of a deformable detector: where a query sampled"),
    ("splat", "detection_renderers:Splat", "one sample of a deformable detector: the row of its stored points"),
    ("strip", "clip_renderers:Strip", "one clip: its frames with a track's map and outline"),
    ("ribbon", "clip_renderers:Ribbon", "one clip: how much of a row lies on each frame, layer by layer"),
    ("frames", "clip_renderers:Frames", "all clips: attention from each frame to each frame"),
)


@hookimpl
def foveate_renderers() -> list[RendererSpec]:
    """Pictures that need matplotlib and a run."""
    return [RendererSpec(name, f"foveate.render.{target}", summary) for name, target, summary in _RENDERERS]
