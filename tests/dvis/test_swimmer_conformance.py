"""The shipped segmenter of clips passes the kit that foveate asks of others."""

from __future__ import annotations

from typing import ClassVar

from foveate.testing.conformance import SourceConformance


class TestUntrainedSwimmer(SourceConformance):
    reference = "foveate/swim-vis-untrained"
    options: ClassVar = {"threshold": 0.0}
