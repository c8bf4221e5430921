"""The kit passes honest sources and plugins, and each of its checks fails on a source that breaks one promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fake_packages import Install
from foveate.errors import FoveateError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    Batch,
    CallKey,
    CallLabels,
    Metric,
    MetricInfo,
    Prediction,
    Readout,
    Sample,
    Site,
    TokenAxis,
)
from foveate.testing.conformance import PluginConformance, SourceConformance
from foveate.testing.conformance_plugin import check_metric
from foveate.testing.kit import Kit
from foveate.testing.tiny import SITE, TinyConfig, TinyCropSource, TinySource

STYLES = ("sdpa", "mha", "mha_weights", "manual")


class TestTiny(SourceConformance):
    def open(self) -> TinySource:
        return TinySource()


class TestTinyCrop(SourceConformance):
    def open(self) -> TinySource:
        return TinyCropSource(TinyConfig(style="mha"))


# ------------------------------------------------------------------- one broken promise each


class Training(TinySource):
    """Opened by the test in training mode."""


class WrongPath(TinySource):
    @property
    def sites(self) -> tuple[Site, ...]:
        return (replace(super().sites[0], modules={"blocks.7.attention": 0}),)


class WrongOwner(TinySource):
    @property
    def sites(self) -> tuple[Site, ...]:
        return (replace(super().sites[0], modules={f"blocks.{i}.mlp": i for i in range(2)}),)


class WrongHeads(TinySource):
    @property
    def sites(self) -> tuple[Site, ...]:
        return (replace(super().sites[0], heads=4),)


class WrongGrid(TinySource):
    def cells(self, batch: Batch) -> CellGrid:
        return CellGrid.regular(3, 3, height=32, width=32)


class WrongTokens(TinySource):
    """Patches in an order that is not the model's."""

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        axis = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(2, 8, height=32, width=32))
        return CallLabels((("sample", len(batch)),), axis, axis)


class TooFewTokens(TinySource):
    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        axis = TokenAxis.patches(4, 4, height=32, width=32)
        return CallLabels((("sample", len(batch)),), axis, axis)


class NoCrop(TinyCropSource):
    """Crops, but says that the whole picture was squeezed in."""

    def prepare(self, pixels: Any) -> Any:
        made, geometry = super().prepare(pixels)
        height, width = geometry.original_height, geometry.original_width
        return made, Geometry(height, width, 32, 32, 32 / height, 32 / width)


class Mirrored(TinySource):
    def prepare(self, pixels: Any) -> Any:
        made, geometry = super().prepare(pixels)
        return np.ascontiguousarray(made[:, :, ::-1]), geometry


class Noisy(TinySource):
    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        return super().forward(batch, grad=grad) + torch.randn(1) * 1e-6


class Unsorted(TinySource):
    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        return [answer[::-1] for answer in super().predictions(outputs, batch)]


class NoGradient(TinySource):
    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        return super().forward(replace(batch, inputs=batch.inputs.detach()), grad=grad) + 0 * batch.inputs.sum()


class BatchNorm(TinySource):
    """Centres its inputs over the batch."""

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        centred = batch.inputs - batch.inputs.mean(0, keepdim=True)
        return super().forward(replace(batch, inputs=centred), grad=grad)


class WrongReadout(TinySource):
    def readout(self, batch: Batch, outputs: Any, bound: Any = None) -> Mapping[str, Readout]:
        return {SITE: Readout(torch.full((len(batch), 17), 0.5), "everything")}


class WrongStream(TinySource):
    @property
    def sites(self) -> tuple[Site, ...]:
        return (replace(super().sites[0], query="other.tokens"),)


class Detects(TinySource):
    """Behaves differently when somebody is looking."""

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        from torch.overrides import _get_current_function_mode_stack

        watched = len(_get_current_function_mode_stack()) > 0
        return super().forward(batch, grad=grad) + (1e-7 if watched else 0.0)


class LeavesHooks(TinySource):
    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        handle = self.module.register_forward_hook(lambda *given: None)
        outputs = super().forward(batch, grad=grad)
        handle.remove()
        return outputs


class NanInput(TinySource):
    def encode(self, samples: Any) -> Batch:
        batch = super().encode(samples)
        return replace(batch, inputs=batch.inputs / 0.0)


class HalfTheInput(TinySource):
    def cells(self, batch: Batch) -> CellGrid:
        return CellGrid.regular(4, 4, height=16, width=32)


class NoTargets(TinySource):
    targets = ()


class DoubleScores(TinySource):
    def score(self, outputs: Any, batch: Batch, bound: Any) -> Any:
        return super().score(outputs, batch, bound).double()


class ForgetsASample(TinySource):
    def bind(self, outputs: Any, batch: Batch, target: Any) -> Any:
        bound = super().bind(outputs, batch, target)
        return replace(bound, rows=bound.rows[:-1])


class NamesOtherFrames(TinySource):
    media = "clip"

    def encode(self, samples: Any) -> Batch:
        """Frames 0 and 1, said to be 1 and 2."""
        parts = [
            super(NamesOtherFrames, self).encode([replace(s, pixels=s.pixels[t]) for s in samples]) for t in (0, 1)
        ]
        named = torch.tensor([[1, 2]] * len(samples))
        inputs = torch.stack([part.inputs for part in parts], 1)
        return replace(parts[0], inputs=inputs, per_sample={"frame_index": named})


BROKEN = [
    (Training, "test_is_in_eval_mode", "in training mode"),
    (NoTargets, "test_says_which_model_it_is", "`targets` is empty"),
    (WrongPath, "test_sites_are_in_the_model", "no such module"),
    (WrongOwner, "test_captured_rows_are_attention", "blocks.0.mlp"),
    (WrongHeads, "test_captured_rows_are_attention", "4 heads|, 4, 17"),
    (TooFewTokens, "test_captured_rows_are_attention", "16"),
    (WrongGrid, "test_tokens_lie_on_the_cells", "form a .4, 4. grid, but cells.. is .3, 3."),
    (WrongTokens, "test_tokens_lie_on_the_cells", "form a .2, 8. grid"),
    (HalfTheInput, "test_cells_tile_the_input", "the input is 32 x 32"),
    (NoCrop, "test_a_bright_square_lights_its_own_cell", "but geometry says"),
    (Mirrored, "test_a_bright_square_lights_its_own_cell", "lights cell"),
    (Noisy, "test_repeats_itself", "two equal forwards differ"),
    (Unsorted, "test_predicts_for_every_sample", "not best first"),
    (DoubleScores, "test_scores_every_row_of_a_target", "float64"),
    (ForgetsASample, "test_scores_every_row_of_a_target", "a sample has no row"),
    (NoGradient, "test_gradients_reach_the_input_of_their_own_sample", "no gradient reaches the input"),
    (BatchNorm, "test_gradients_reach_the_input_of_their_own_sample", "reach other samples"),
    (BatchNorm, "test_a_batch_equals_its_singles", "becomes"),
    (WrongReadout, "test_readout_is_a_mean_over_queries", "readout weights sum to"),
    (WrongStream, "test_flow_follows_declared_sites", "streams differ in flow"),
    (Detects, "test_capture_changes_nothing", "outputs change under capture"),
    (LeavesHooks, "test_an_exception_midway_leaves_no_trace", "changed by a broken capture"),
    (NanInput, "test_encodes_in_order", "NaN or infinity"),
    (NamesOtherFrames, "test_frames_are_those_that_it_names", "a frame that it does not name"),
]


@pytest.mark.parametrize(
    ("broken", "check", "said"), BROKEN, ids=[f"{broken.__name__}-{check}" for broken, check, _ in BROKEN]
)
def test_a_broken_promise_is_found(broken: type[TinySource], check: str, said: str) -> None:
    class Case(SourceConformance):
        def open(self) -> TinySource:
            source = broken()
            if broken is Training:
                source.module.train()
            return source

    Case.setup_class()
    with pytest.raises((AssertionError, FoveateError), match=said):
        getattr(Case(), check)()


def test_every_check_of_sources_is_shown_to_fail() -> None:
    checks = {name for name in dir(SourceConformance) if name.startswith("test_")}
    assert checks - {check for _, check, _ in BROKEN} == {"test_facts_meet_the_registry"}, "that one: test_opening"


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_of_attention_passes(style: Any) -> None:
    class Case(SourceConformance):
        def open(self) -> TinySource:
            return TinySource(TinyConfig(style=style))

    Case.setup_class()
    Case().test_captured_rows_are_attention()
    Case().test_an_exception_midway_leaves_no_trace()


class FusedPath(TinySource):
    """Outside a capture torch may take a fused kernel for ``nn.MultiheadAttention``, with other last bits."""

    def __init__(self) -> None:
        super().__init__(TinyConfig(style="mha"))
        self.module.requires_grad_(False)

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        with torch.set_grad_enabled(grad):
            outputs = super().forward(batch, grad=grad)
        fused = (
            torch.backends.mha.get_fastpath_enabled() and not torch.overrides._get_current_function_mode_stack()
        )
        return outputs + 1e-6 if fused else outputs


def test_the_fused_kernel_of_torch_is_no_change_by_capture() -> None:
    class Case(SourceConformance):
        def open(self) -> TinySource:
            return FusedPath()

    Case.setup_class()
    Case().test_capture_changes_nothing()
    assert torch.backends.mha.get_fastpath_enabled()


# ------------------------------------------------------------------- counting


def test_a_kit_that_skips_everything_fails(capsys: pytest.CaptureFixture[str]) -> None:
    import unittest

    class Case(Kit):
        def test_one(self) -> None:
            self.skip("no weights")

    Case.setup_class()
    case = Case()
    case.setup_method(case.test_one)
    with pytest.raises(unittest.SkipTest):
        case.test_one()
    with pytest.raises(AssertionError, match="no conformance check ran"):
        Case.teardown_class()
    case.setup_method(case.test_one)
    Case.teardown_class()
    assert "1 checks ran, 1 skipped (no weights)" in capsys.readouterr().out


# ------------------------------------------------------------------- plugins and metrics


class TestOwnMetrics(PluginConformance):
    entry_point = "metrics"
    distribution = "foveate"


class TestOwnAttribution(PluginConformance):
    entry_point = "attribution"
    distribution = "foveate"


class TestOwnRenderers(PluginConformance):
    entry_point = "render"
    distribution = "foveate"


class TestOwnModels(PluginConformance):
    entry_point = "vit"
    distribution = "foveate"


PLUGIN = """
import colorsys
FOVEATE_API = (1, 0)

@hookimpl
def foveate_metrics():
    return [MetricSpec("gone", "plugin_mine:Nothing", "")]
"""


def test_a_plugin_that_lies_is_found(install: Install) -> None:
    class Case(PluginConformance):
        entry_point = "mine"

    install("mine", PLUGIN)
    case = Case()
    case.test_registers()
    with pytest.raises(Exception, match="cannot import plugin_mine:Nothing"):
        case.test_every_target_loads()


def test_a_plugin_that_is_not_there_says_so(install: Install) -> None:
    class Case(PluginConformance):
        entry_point = "nobody-has-this"

    with pytest.raises(AssertionError, match="pip install -e"):
        Case().test_registers()


class Fair(Metric):
    info = MetricInfo("fair", "largest weight", "1", "test", bounds=(0.0, 1.0))

    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        rows = np.nan_to_num(rows) if isinstance(rows, np.ndarray) else rows.nan_to_num()
        return rows.max(-1) if isinstance(rows, np.ndarray) else rows.amax(-1)


class CountsNan(Fair):
    """As an author writes it who has never seen a row with a CLS token left out: the whole row becomes NaN."""

    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        return rows.max(-1) if isinstance(rows, np.ndarray) else rows.amax(-1)


class CountsTooMany(Fair):
    """NaN is left out of the sum, but K still counts it."""

    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        return super().kernel(rows) / rows.shape[-1]


class OutOfBounds(Fair):
    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        return 1 + super().kernel(rows)


class WrongDims(Fair):
    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        return rows


class TwoMinds(Fair):
    def kernel(self, rows: Any, *, query: Any = None, key: Any = None) -> Any:
        return super().kernel(rows) * (1.0 if isinstance(rows, np.ndarray) else 0.9)


def test_metrics_that_lie_are_found() -> None:
    check_metric(Fair())
    cases = (
        (OutOfBounds, "above its bound"),
        (WrongDims, "expected 3 dims"),
        (TwoMinds, "differ"),
        (CountsNan, "a key that is NaN does not count"),
        (CountsTooMany, "a key that is NaN does not count"),
    )
    for broken, said in cases:
        with pytest.raises(AssertionError, match=said):
            check_metric(broken())


def test_samples_are_of_every_shape() -> None:
    shapes = {sample.pixels.shape for sample in TestTiny().samples()}
    assert len(shapes) == 3
    assert all(isinstance(sample, Sample) for sample in TestTiny().samples())
