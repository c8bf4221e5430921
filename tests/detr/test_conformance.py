"""Every family passes the same battery that a stranger's plugin has to."""

from __future__ import annotations

from typing import Any

from detr_models import CASES, tiny
from foveate.interfaces import Target
from foveate.testing.conformance import PluginConformance, SourceConformance


class TestPlugin(PluginConformance):
    entry_point = "detr"


TOLERANCES = {"Mask2Former": 2e-3, "OneFormer": 2e-3}
"""Rounding differs with the batch, and a mask logit within rounding of 0 opens or blocks one key more."""


def kit(case: str) -> type[SourceConformance]:
    """One battery for one tiny model."""

    class Battery(SourceConformance):
        target = Target(object=2, scale="logit")
        tolerance = TOLERANCES.get(case, 1e-4)

        def open(self) -> Any:
            return tiny(case)

    Battery.__name__ = Battery.__qualname__ = "Test" + "".join(c for c in case.title() if c.isalnum())
    return Battery


for _case in CASES:
    _battery = kit(_case)
    globals()[_battery.__name__] = _battery
