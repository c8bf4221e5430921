"""foveate: what vision and video transformers attend to, and whether that explains their answer.

    import foveate
    source = foveate.open("foveate/rim-vit")        # or a hub id, or a folder with a config.json
    seen = foveate.look(source, "photo.jpg")        # prediction, figure, caveats

The names below are resolved on first use, so that ``import foveate`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveate.capture.intervening import intervene
    from foveate.capture.wrap import wrap
    from foveate.errors import FoveateError
    from foveate.geometry import CellGrid, Geometry
    from foveate.interfaces import (
        AttentionSource,
        Attribution,
        AttributionMap,
        Batch,
        Metric,
        MetricInfo,
        Renderer,
        Sample,
        Site,
        Target,
        TokenAxis,
    )
    from foveate.plugins.hooks import API_VERSION, hookimpl
    from foveate.plugins.opening import open_source as open
    from foveate.plugins.specs import AttributionSpec, CheckSpec, MetricSpec, RendererSpec, SourceSpec
    from foveate.study.look import look

    __version__: str

_HOMES = {
    "API_VERSION": "foveate.plugins.hooks:API_VERSION",
    "AttentionSource": "foveate.interfaces:AttentionSource",
    "Attribution": "foveate.interfaces:Attribution",
    "AttributionMap": "foveate.interfaces:AttributionMap",
    "AttributionSpec": "foveate.plugins.specs:AttributionSpec",
    "Batch": "foveate.interfaces:Batch",
    "CellGrid": "foveate.geometry:CellGrid",
    "CheckSpec": "foveate.plugins.specs:CheckSpec",
    "FoveateError": "foveate.errors:FoveateError",
    "Geometry": "foveate.geometry:Geometry",
    "Metric": "foveate.interfaces:Metric",
    "MetricInfo": "foveate.interfaces:MetricInfo",
    "MetricSpec": "foveate.plugins.specs:MetricSpec",
    "Renderer": "foveate.interfaces:Renderer",
    "RendererSpec": "foveate.plugins.specs:RendererSpec",
    "Sample": "foveate.interfaces:Sample",
    "Site": "foveate.interfaces:Site",
    "SourceSpec": "foveate.plugins.specs:SourceSpec",
    "Target": "foveate.interfaces:Target",
    "TokenAxis": "foveate.interfaces:TokenAxis",
    "hookimpl": "foveate.plugins.hooks:hookimpl",
    "look": "foveate.study.look:look",
    "open": "foveate.plugins.opening:open_source",
    "intervene": "foveate.capture.intervening:intervene",
    "wrap": "foveate.capture.wrap:wrap",
}

__all__ = [
    "API_VERSION",
    "AttentionSource",
    "Attribution",
    "AttributionMap",
    "AttributionSpec",
    "Batch",
    "CellGrid",
    "CheckSpec",
    "FoveateError",
    "Geometry",
    "Metric",
    "MetricInfo",
    "MetricSpec",
    "Renderer",
    "RendererSpec",
    "Sample",
    "Site",
    "SourceSpec",
    "Target",
    "TokenAxis",
    "__version__",
    "hookimpl",
    "intervene",
    "look",
    "open",
    "wrap",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    from importlib import import_module, metadata

    if name == "__version__":
        return metadata.version("foveate")
    if name not in _HOMES:
        raise AttributeError(f"module 'foveate' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    globals()[name] = value = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
