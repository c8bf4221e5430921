"""foveate's own models pass the kit that it asks of others."""

from __future__ import annotations

import pytest

from foveate.plugins.specs import is_installed
from foveate.testing.conformance import SourceConformance

pytestmark = pytest.mark.skipif(not is_installed("transformers"), reason="needs transformers: foveate[vit]")


class TestRimViT(SourceConformance):
    reference = "foveate/rim-vit"


class TestUntrainedTwin(SourceConformance):
    reference = "foveate/rim-vit-untrained"


class TestShuffledTwin(SourceConformance):
    reference = "foveate/rim-vit-shuffled"
