"""foveate's own detectors pass the kit that it asks of others."""

from __future__ import annotations

from typing import ClassVar

import pytest

from foveate.plugins.specs import is_installed
from foveate.testing.conformance import SourceConformance

pytestmark = pytest.mark.skipif(not is_installed("transformers"), reason="needs transformers: foveate[detr]")


class TestShapesDetector(SourceConformance):
    reference = "foveate/shapes-cdetr"
    options: ClassVar = {"threshold": 0.0}  # the kit's pictures show no shapes: every query counts


class TestUntrainedTwin(SourceConformance):
    reference = "foveate/shapes-cdetr-untrained"
    options: ClassVar = {"threshold": 0.0}
