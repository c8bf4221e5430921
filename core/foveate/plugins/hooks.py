"""The five hooks, and the version of this interface.

Every hook takes no argument and returns declarations, so that a plugin can neither slow foveate down nor
see its state; work happens in the classes that the declarations name. ``docs/plugins.md`` shows each in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from foveate.plugins.specs import AttributionSpec, CheckSpec, MetricSpec, RendererSpec, SourceSpec

PROJECT = "foveate"
API_VERSION = (1, 0)
"""(major, minor) of hooks, specs and interfaces. A plugin states what it was written for as ``FOVEATE_API``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def foveate_sources() -> Iterable[SourceSpec]:  # type: ignore[empty-body]
    """Adapters that open models (:class:`foveate.interfaces.AttentionSource`)."""


@hookspec
def foveate_attributions() -> Iterable[AttributionSpec]:  # type: ignore[empty-body]
    """Ways of explaining (:class:`foveate.interfaces.Attribution`)."""


@hookspec
def foveate_metrics() -> Iterable[MetricSpec]:  # type: ignore[empty-body]
    """Numbers about attention rows (:class:`foveate.interfaces.Metric`)."""


@hookspec
def foveate_renderers() -> Iterable[RendererSpec]:  # type: ignore[empty-body]
    """Kinds of picture (:class:`foveate.interfaces.Renderer`)."""


@hookspec
def foveate_checks() -> Iterable[CheckSpec]:  # type: ignore[empty-body]
    """Health checks for ``foveate doctor``."""


HOOKS: dict[str, str] = {
    "foveate_sources": "source",
    "foveate_attributions": "attribution",
    "foveate_metrics": "metric",
    "foveate_renderers": "renderer",
    "foveate_checks": "check",
}
"""Hook -> the kind of spec it returns."""
