"""The shipped segmenter of clips and its untrained twin pass the kit that foveate asks of others."""

from __future__ import annotations

from typing import ClassVar

from foveate.testing.conformance import SourceConformance


class TestSwimmer(SourceConformance):
    reference = "foveate/swim-vis"
    options: ClassVar = {"threshold": 0.0}  # the kit's clips show no shapes: every query counts


class TestUntrainedSwimmer(SourceConformance):
    reference = "foveate/swim-vis-untrained"
    options: ClassVar = {"threshold": 0.0}
