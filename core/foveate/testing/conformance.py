"""By which a plugin proves itself: subclass in a test file, name what is tested, run pytest.

::

    from foveate.testing.conformance import PluginConformance, SourceConformance

    class TestPlugin(PluginConformance):
        entry_point = "example"

    class TestModel(SourceConformance):
        reference = "example/block-vit"

foveate's own plugins are tested by the same two classes.
"""

from __future__ import annotations

from foveate.testing.conformance_plugin import PluginConformance
from foveate.testing.conformance_source import SourceConformance

__all__ = ["PluginConformance", "SourceConformance"]
