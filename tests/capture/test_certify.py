"""The census is independent of the tap: it finds what a source forgot to declare."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.capture import certify as certify_module
from foveate.capture.certify import certify
from foveate.errors import CaptureError
from foveate.testing.tiny import SITE, TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import TinyDetector


@pytest.mark.parametrize("style", ["sdpa", "manual", "mha", "mha_weights"])
def test_honest_sources_pass(style):
    source = TinySource(TinyConfig(style=style))
    result = certify(source, source.encode(tiny_samples(2)))
    assert result.passed, result.failures
    assert result.identical
    assert result.fast_path_error < 1e-6
    assert {row.claim for row in result.census} == {SITE}
    assert sum(row.count for row in result.census) == len(result.certificate.checks) == 2
    result.require()


def test_a_detector_passes():
    source = TinyDetector()
    result = certify(source, source.encode(tiny_samples(2)))
    assert result.passed, result.failures
    assert sum(row.count for row in result.census) == 6


class Extra(nn.Module):
    """A head with a softmax of its own."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x).softmax(-1)


def test_an_undeclared_softmax_is_found_until_it_is_explained():
    source = TinySource()
    source.module.head = Extra(source.module.head)
    batch = source.encode(tiny_samples(1))
    result = certify(source, batch)
    assert [(row.owner, row.kernel) for row in result.unclaimed] == [("head", "_softmax")]
    with pytest.raises(CaptureError, match="head: 1 x _softmax is neither a site nor ignored"):
        result.require()
    source.ignored = {"head": "class probabilities"}
    result = certify(source, batch)
    assert result.passed
    assert "ignored: class probabilities" in {row.claim for row in result.census}


def test_attention_the_tap_cannot_see_is_miscounted():
    class Hidden(nn.Module):
        """Softmax through an operator that no function mode handler names."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            torch.ops.aten._softmax(x @ x.transpose(-1, -2), -1, False)
            return self.inner(x)

    source = TinySource()
    source.module.blocks[0].attention = Hidden(source.module.blocks[0].attention)
    result = certify(source, source.encode(tiny_samples(1)))
    assert result.miscounted == {SITE: (3, 2)}
    assert not result.passed


def test_outputs_that_change_under_capture_are_reported(monkeypatch):
    source = TinySource()
    honest = certify_module.trace

    def meddling(*arguments, **options):
        found = honest(*arguments, **options)
        return replace(found, outputs=found.outputs + 1e-6)

    monkeypatch.setattr(certify_module, "trace", meddling)
    result = certify(source, source.encode(tiny_samples(1)))
    assert not result.identical
    assert "outputs differ with and without capture" in result.failures


def test_settings_are_restored():
    source = TinySource(TinyConfig(style="mha"))
    batch = source.encode(tiny_samples(1))
    assert torch.backends.mha.get_fastpath_enabled()
    certify(source, batch)
    assert torch.backends.mha.get_fastpath_enabled()
    source.module.head = nn.Identity()
    source.forward = lambda batch, grad=False: F.softmax("not a tensor", -1)
    with pytest.raises((TypeError, AttributeError)):
        certify(source, batch)
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.overrides._get_current_function_mode_stack() == []
