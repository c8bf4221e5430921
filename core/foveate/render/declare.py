"""The core's own pictures, declared as a stranger's package would declare its own. Imports nothing heavy."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import RendererSpec

FOVEATE_API = (1, 0)

_RENDERERS = (
    ("triptych", "Triptych", "one sample: picture, map, overlay"),
    ("grid", "Samples", "a page of samples: diverse, or the extremes of a metric"),
    ("matrix", "Matrix", "one sample: every layer and head"),
    ("distributions", "Distributions", "histograms of metrics over images"),
    ("methods", "Methods", "one sample: every stored attribution map"),
)


@hookimpl
def foveate_renderers() -> list[RendererSpec]:
    """Pictures that need matplotlib and a run."""
    return [
        RendererSpec(name, f"foveate.render.renderers:{target}", summary) for name, target, summary in _RENDERERS
    ]
