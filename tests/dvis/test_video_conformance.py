"""Video transformers pass the same battery that a stranger's plugin has to."""

from __future__ import annotations

from typing import Any

from foveate.interfaces import Sample
from foveate.testing.conformance import PluginConformance, SourceConformance
from video_models import CASES, clips, open_tiny


class TestPlugin(PluginConformance):
    entry_point = "dvis"


def kit(case: str) -> type[SourceConformance]:
    """One battery for one tiny model."""

    class Battery(SourceConformance):
        def open(self) -> Any:
            return open_tiny(case)

        def samples(self) -> list[Sample]:
            return clips()

    Battery.__name__ = Battery.__qualname__ = "Test" + "".join(c for c in case.title() if c.isalnum())
    return Battery


for _case in CASES:
    _battery = kit(_case)
    globals()[_battery.__name__] = _battery
