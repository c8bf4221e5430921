"""What this plugin offers. Imports nothing heavy: the classes are named, not loaded."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import SourceSpec

FOVEATE_API = (1, 0)


@hookimpl
def foveate_sources() -> list[SourceSpec]:
    """Video models."""
    return []
