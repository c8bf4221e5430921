"""Compiled deformable kernels: nothing below their entry is torch's, and yet the record is exact.

The kernels here gather and sum in numpy (or by indexing inside an ``autograd.Function``), without
``grid_sample`` and without any operation that a tap follows, as the CUDA ones do.
"""

from __future__ import annotations

import sys
import types
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.capture.certificate import check_record
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout
from foveate.capture.tap import Tap
from foveate.capture.trace import trace
from foveate.errors import CaptureError
from foveate.testing.oracles import deformable_matrix

B, Q, H, D, P = 2, 5, 2, 4, 3
SIZES = [(4, 6), (3, 5)]
KEYS = sum(h * w for h, w in SIZES)


def by_hand(value: np.ndarray, shapes: Any, points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """One point and one corner at a time (Zhu et al. 2021, eq. 3): ``(batch, query, head * channel)``."""
    batch, _, heads, width = value.shape
    queries, levels, count = weights.shape[1], weights.shape[3], weights.shape[4]
    out = np.zeros((batch, queries, heads, width), value.dtype)
    starts = np.cumsum([0, *(h * w for h, w in shapes)])
    for b, q, h, level, p in np.ndindex(batch, queries, heads, levels, count):
        rows, columns = shapes[level]
        x = points[b, q, h, level, p, 0] * columns - 0.5
        y = points[b, q, h, level, p, 1] * rows - 0.5
        for i in (int(np.floor(y)), int(np.floor(y)) + 1):
            for j in (int(np.floor(x)), int(np.floor(x)) + 1):
                if 0 <= i < rows and 0 <= j < columns:
                    share = (1 - abs(y - i)) * (1 - abs(x - j)) * weights[b, q, h, level, p]
                    out[b, q, h] += share * value[b, starts[level] + i * columns + j, h]
    return out.reshape(batch, queries, heads * width)


def opaque(value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor, step: int) -> Tensor:
    """The signature of ``ms_deform_attn_forward``."""
    sizes = [tuple(int(n) for n in size) for size in shapes]
    arrays = (t.detach().numpy() for t in (locations, weights))
    return torch.from_numpy(by_hand(value.detach().numpy(), sizes, *arrays))


class Opaque(torch.autograd.Function):
    """The same with a gradient, as the authors' ``MSDeformAttnFunction``; only the values' is needed here."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Any, starts: Any, locations: Tensor, weights: Tensor, step: int
    ) -> Tensor:
        sizes = [tuple(int(n) for n in size) for size in shapes]
        ctx.matrix = matrix(locations, weights)
        ctx.heads = value.shape[2]
        return torch.from_numpy(by_hand(value.numpy(), sizes, locations.numpy(), weights.numpy()))

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        by_head = slope.unflatten(-1, (ctx.heads, -1)).double()
        back = torch.einsum("bhqk,bqhd->bkhd", ctx.matrix, by_head)
        return back.to(slope), None, None, None, None, None


def matrix(locations: Tensor, weights: Tensor) -> Tensor:
    """``(sample, head, query, cell)``, float64."""
    return torch.stack(
        [deformable_matrix(p, w, SIZES) for p, w in zip(locations, weights, strict=True)]
    ).transpose(1, 2)


class Sampler(nn.Module):
    """Projections and softmax in torch, the rest in ``self.kernel``, found by name when it is called."""

    def __init__(self, module: types.ModuleType, path: str) -> None:
        super().__init__()
        self.sampling_offsets = nn.Identity()
        self.module, self.path = module, path

    def forward(self, value: Tensor, locations: Tensor, logits: Tensor) -> Tensor:
        self.weights = F.softmax(logits.flatten(-2), -1).view_as(logits)
        kernel: Any = self.module
        for part in self.path.split("."):
            kernel = getattr(kernel, part)
        return kernel(value, torch.tensor(SIZES), torch.tensor([0, 24]), locations, self.weights, 64) * 1.0


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of compiled kernels."""
    made: Any = types.ModuleType("compiled_kernels")
    made.ms_deform_attn, made.MSDeformAttnFunction = opaque, type("MSDeformAttnFunction", (Opaque,), {})
    monkeypatch.setitem(sys.modules, "compiled_kernels", made)
    found: types.ModuleType = made
    return found


def arguments(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    value = torch.randn(B, KEYS, H, D, generator=random)
    locations = (torch.rand(B, Q, H, len(SIZES), P, 2, generator=random) - 0.5) * 1.4 + 0.5
    return value, locations, torch.randn(B, Q, H, len(SIZES), P, generator=random) * 2


ENTRIES = {"function": "ms_deform_attn", "autograd function": "MSDeformAttnFunction.apply"}


@pytest.mark.parametrize("path", ENTRIES.values(), ids=ENTRIES)
def test_a_named_kernel_leaves_an_exact_record(package: types.ModuleType, path: str) -> None:
    value, locations, logits = arguments()
    module = Sampler(package, path)
    plain = module(value, locations, logits)
    with torch.no_grad(), Tap(module, kernels=[f"compiled_kernels:{path}"]) as tap:
        out = module(value, locations, logits)
    assert torch.equal(out, plain)
    (record,) = tap.records
    assert not tap.unlinked
    truth = matrix(locations, module.weights)
    torch.testing.assert_close(record.rows(slice(None)).double(), truth, atol=1e-6, rtol=1e-5)
    assert check_record(record).value_error < 2e-6
    left = torch.rand(B, 2, Q)
    torch.testing.assert_close(record.left(left).double(), left.double() @ truth.mean(1), atol=1e-6, rtol=1e-5)


def test_without_the_name_the_softmax_met_no_values(package: types.ModuleType) -> None:
    module = Sampler(package, "ms_deform_attn")
    with torch.no_grad(), Tap(module) as tap:
        module(*arguments())
    assert not tap.records
    assert len(tap.unlinked) == 1


def test_the_certificate_catches_another_computation(package: Any) -> None:
    package.ms_deform_attn = lambda *given: opaque(*given).roll(1, 1)
    module = Sampler(package, "ms_deform_attn")
    with torch.no_grad(), Tap(module, kernels=["compiled_kernels:ms_deform_attn"]) as tap:
        module(*arguments())
    assert check_record(tap.records[0]).value_error > 1e-2


def test_gradients_at_a_kernel(package: types.ModuleType) -> None:
    value, locations, logits = arguments()
    module = Sampler(package, "MSDeformAttnFunction.apply")
    with Tap(module, kernels=["compiled_kernels:MSDeformAttnFunction.apply"], grad=True) as tap:
        out = module(value.requires_grad_(), locations, logits)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    (record,) = tap.records
    (gradient,) = torch.autograd.grad((out * slope).sum(), record.node)
    dense = matrix(locations, module.weights.detach())
    by_edge = torch.einsum("bqhd,bkhd->bhqk", slope.unflatten(-1, (H, D)).double(), value.detach().double())
    left = torch.rand(B, 1, Q)
    expected = left.double() @ (dense * by_edge).relu().mean(1)
    torch.testing.assert_close(record.grad_left(left, gradient).double(), expected, atol=1e-5, rtol=1e-4)


def test_a_kernel_is_changed_like_plain_torch(package: types.ModuleType) -> None:
    value, locations, logits = arguments()
    module = Sampler(package, "ms_deform_attn")
    region = [1, 2, 3, 8, 9, 25]
    changes = [Knockout("", query="at:0-2", key="at:1-3,8-9,25"), AblateHeads("", heads=1, to="mean")]
    with torch.no_grad():
        module(value, locations, logits)
        truth = matrix(locations, module.weights)
        truth[:, :, :3, region] = 0
        truth[:, 1] = truth[:, 1].mean(-2, keepdim=True)
        with Tap(module, kernels=["compiled_kernels:ms_deform_attn"]) as outer, intervene(module, changes) as done:
            out = module(value, locations, logits)
    expected = torch.einsum("bhqk,bkhd->bqhd", truth, value.double()).flatten(2)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(outer.records[0].rows(slice(None)).double(), truth, atol=1e-6, rtol=1e-5)
    assert [one.calls for one in done.applied] == [1, 1]


def test_entries_are_put_back_after_an_exception_and_when_taps_nest(package: Any) -> None:
    module = Sampler(package, "MSDeformAttnFunction.apply")
    kernels = [f"compiled_kernels:{path}" for path in ENTRIES.values()]
    function, apply = package.ms_deform_attn, vars(package.MSDeformAttnFunction).get("apply")
    with Tap(module, kernels=kernels), Tap(module, kernels=kernels) as inner:
        module(*arguments())
        assert package.ms_deform_attn is not function
        assert len(inner.records) == 1
    assert package.ms_deform_attn is function
    with pytest.raises(AttributeError), Tap(module, kernels=kernels):
        module(None, None, None)
    assert package.ms_deform_attn is function
    assert vars(package.MSDeformAttnFunction).get("apply") is apply is None
    with (
        pytest.raises(CaptureError, match="no kernel"),
        Tap(module, kernels=[kernels[0], "compiled_kernels:none"]),
    ):
        pass
    assert package.ms_deform_attn is function


def test_arguments_that_contradict_each_other_are_named(package: Any) -> None:
    package.ms_deform_attn = lambda value, shapes, starts, locations, weights, step: value.flatten(2)
    module = Sampler(package, "ms_deform_attn")
    value, locations, logits = arguments()
    with (
        pytest.raises(CaptureError, match="20 values for levels"),
        torch.no_grad(),
        Tap(module, kernels=["compiled_kernels:ms_deform_attn"]),
    ):
        module(value[:, :20], locations, logits)


# ------------------------------------------------------------------------------------ transformers


def swapped(model: nn.Module) -> int:
    """Replace ``forward`` of every hub layer, as the ``kernels`` package does; how many there were."""
    count = 0

    def forward(
        self: Any,
        value: Any,
        value_spatial_shapes: Any,
        value_spatial_shapes_list: Any,
        level_start_index: Any,
        sampling_locations: Any,
        attention_weights: Any,
        im2col_step: Any,
    ) -> Tensor:
        return opaque(value, value_spatial_shapes_list, None, sampling_locations, attention_weights, im2col_step)

    for module in model.modules():
        if type(module).__name__ == "MultiScaleDeformableAttention":
            setattr(module, "forward", MethodType(forward, module))  # noqa: B010 - mypy knows forward as a method
            count += 1
    return count


@pytest.mark.parametrize("name", ["Deformable DETR", "RT-DETR"])
def test_a_swapped_hub_kernel_gives_the_records_of_plain_torch(name: str) -> None:
    pytest.importorskip("transformers")
    from detr_models import photos, tiny

    source: Any = tiny(name, image_size=(32, 32) if name == "RT-DETR" else (40, 72))
    batch = source.encode(photos((40, 72)))
    with torch.no_grad():
        plain = trace(source, batch)
        before = [dict(vars(module)) for module in source.module.modules()]
        assert swapped(source.module) > 0
        kernel = trace(source, batch)
    assert kernel.certificate.passed
    assert plain.records.keys() == kernel.records.keys()
    for call, record in plain.records.items():
        other = kernel.records[call]
        assert type(other) is type(record)
        torch.testing.assert_close(other.rows(slice(None)), record.rows(slice(None)), atol=2e-5, rtol=1e-3)
    names = {"forward"}
    for module, old in zip(source.module.modules(), before, strict=True):
        assert set(vars(module)) - set(old) <= names


FUNCTIONS = {
    "Mask2Former": "mask2former.modeling_mask2former:multi_scale_deformable_attention",
    "RT-DETRv2": "rt_detr_v2.modeling_rt_detr_v2:multi_scale_deformable_attention_v2",
}


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_function_that_the_source_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' module-level functions, replaced by ones that torch does not see."""
    pytest.importorskip("transformers")
    from importlib import import_module

    from detr_models import photos, tiny
    from foveate.capture.certify import certify

    size = (64, 64) if name == "Mask2Former" else (32, 32)
    source: Any = tiny(name, image_size=size)
    batch = source.encode(photos(size))
    with torch.no_grad():
        plain = trace(source, batch)
    module, _, function = FUNCTIONS[name].partition(":")
    holder = import_module(f"transformers.models.{module}")

    def pyramid(
        value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor
    ) -> Tensor:
        return opaque(value, value_spatial_shapes, None, sampling_locations, attention_weights, 0)

    def listed(value: Tensor, value_spatial_shapes: Any, sampling_locations: Tensor, attention_weights: Tensor,
               num_points_list: list[int], method: str = "default") -> Tensor:  # fmt: skip
        levels = len(num_points_list)  # here each level has as many points
        split = (t.unflatten(3, (levels, -1)) for t in (sampling_locations, attention_weights))
        return opaque(value, value_spatial_shapes, None, *split, 0)

    monkeypatch.setattr(holder, function, pyramid if name == "Mask2Former" else listed)
    site = next(site for site in source.sites if site.form == "deformable")
    with torch.no_grad(), pytest.raises(CaptureError, match="kernels"):
        trace(source, batch)
    source.kernels = (f"transformers.models.{module}:{function}",)
    with torch.no_grad():
        kernel = trace(source, batch)
    assert kernel.certificate.passed
    for call, record in plain.records.items():
        if call.site == site.id:
            torch.testing.assert_close(
                kernel.records[call].rows([0, 3]), record.rows([0, 3]), atol=2e-5, rtol=1e-3
            )
    assert certify(source, batch).passed
