"""The Swin backbone under its published names: transformers' layers against a slow oracle of the paper.

Liu et al. 2021, arXiv:2103.14030: attention in windows, every other block shifted by half a window, biases by
relative position, patches merged two by two.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from daq_models import TINY
from foveate.errors import ModelError
from foveate_dvis.daq.config import SwinConfig
from foveate_dvis.daq.infer import _backbone as backbone_of
from foveate_dvis.daq.keys import IGNORED_HERE, translate
from foveate_dvis.daq.network import DvisDaq

Array = NDArray[np.float64]
WIDTH, DEPTHS, HEADS, WINDOW = 8, (2, 2, 1, 1), (2, 2, 4, 4), 3
ENCODER = "segmenter.model.pixel_level_module.encoder."


def published() -> dict[str, Array]:
    """Random tensors under the names of the original Swin backbone in detectron2."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "patch_embed.proj.bias": (WIDTH,),
        "patch_embed.norm.weight": (WIDTH,),
        "patch_embed.norm.bias": (WIDTH,),
    }
    for stage, depth in enumerate(DEPTHS):
        c = WIDTH << stage
        for block in range(depth):
            at = f"layers.{stage}.blocks.{block}"
            shapes |= {
                f"{at}.attn.relative_position_bias_table": ((2 * WINDOW - 1) ** 2, HEADS[stage]),
                f"{at}.attn.qkv.weight": (3 * c, c),
                f"{at}.attn.qkv.bias": (3 * c,),
                f"{at}.attn.proj.weight": (c, c),
                f"{at}.attn.proj.bias": (c,),
                f"{at}.mlp.fc1.weight": (4 * c, c),
                f"{at}.mlp.fc1.bias": (4 * c,),
                f"{at}.mlp.fc2.weight": (c, 4 * c),
                f"{at}.mlp.fc2.bias": (c,),
            }
            shapes |= {f"{at}.norm{i}.{leaf}": (c,) for i in (1, 2) for leaf in ("weight", "bias")}
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * c, 4 * c)
            shapes |= {f"layers.{stage}.downsample.norm.{leaf}": (4 * c,) for leaf in ("weight", "bias")}
        shapes |= {f"norm{stage}.{leaf}": (c,) for leaf in ("weight", "bias")}
    return {f"backbone.{name}": 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}


class Oracle:
    def __init__(self, weights: dict[str, Array]) -> None:
        self.w = {name.removeprefix("backbone."): value for name, value in weights.items()}

    def norm(self, name: str, x: Array) -> Array:
        z = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return np.asarray(z * self.w[f"{name}.weight"] + self.w[f"{name}.bias"])

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self.w[f"{name}.weight"].T
        return np.asarray(y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y)

    def __call__(self, image: Array) -> list[Array]:
        """(3, y, x) to the normalised maps (y, x, channel) of the four stages."""
        rows, columns = image.shape[1] // 4, image.shape[2] // 4
        kernel = self.w["patch_embed.proj.weight"]
        x = np.zeros((rows, columns, WIDTH))
        for y, c in itertools.product(range(rows), range(columns)):
            x[y, c] = np.einsum("oijk,ijk->o", kernel, image[:, 4 * y : 4 * y + 4, 4 * c : 4 * c + 4])
        x = self.norm("patch_embed.norm", x + self.w["patch_embed.proj.bias"])
        maps = []
        for stage, depth in enumerate(DEPTHS):
            for block in range(depth):
                x = self.block(f"layers.{stage}.blocks.{block}", x, HEADS[stage], WINDOW // 2 if block % 2 else 0)
            maps.append(self.norm(f"norm{stage}", x))
            if stage < 3:
                x = self.merge(f"layers.{stage}.downsample", x)
        return maps

    def merge(self, name: str, x: Array) -> Array:
        x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2), (0, 0)))
        four = np.concatenate([x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]], axis=-1)
        return self.linear(f"{name}.reduction", self.norm(f"{name}.norm", four))

    def block(self, name: str, x: Array, heads: int, shift: int) -> Array:
        x = x + self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x), heads, shift)
        hidden = self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x))
        erf = torch.erf(torch.from_numpy(hidden / np.sqrt(2))).numpy()
        return x + self.linear(f"{name}.mlp.fc2", 0.5 * hidden * (1 + erf))

    def attention(self, name: str, x: Array, heads: int, shift: int) -> Array:
        """One query after another. Padding takes part as zeros, as in the original."""
        rows, columns, c = x.shape
        height, width = (-(-side // WINDOW) * WINDOW for side in (rows, columns))
        padded = np.zeros((height, width, c))
        padded[:rows, :columns] = x
        q, k, v = np.split(self.linear(f"{name}.qkv", padded), 3, axis=-1)
        d, table = c // heads, self.w[f"{name}.relative_position_bias_table"]
        out = np.zeros_like(padded)
        for y0, x0 in itertools.product(range(height), range(width)):
            seen = [
                (y1, x1)
                for y1, x1 in itertools.product(range(height), range(width))
                if _window(y0, shift, height) == _window(y1, shift, height)
                and _window(x0, shift, width) == _window(x1, shift, width)
            ]
            for h in range(heads):
                part = slice(h * d, (h + 1) * d)
                scores = np.array([q[y0, x0, part] @ k[y1, x1, part] / np.sqrt(d) for y1, x1 in seen])
                bias = [
                    table[(y0 - y1 + WINDOW - 1) * (2 * WINDOW - 1) + x0 - x1 + WINDOW - 1, h] for y1, x1 in seen
                ]
                weight = np.exp(scores + bias - (scores + bias).max())
                weight /= weight.sum()
                out[y0, x0, part] = sum(a * v[y1, x1, part] for a, (y1, x1) in zip(weight, seen, strict=True))
        return self.linear(f"{name}.proj", out)[:rows, :columns]


def _window(position: int, shift: int, length: int) -> int:
    """Which window a position is in; a shifted grid leaves part windows at both ends, which stay apart."""
    return (position - shift) // WINDOW if position >= shift else length


@pytest.fixture(scope="module")
def net() -> DvisDaq:
    backbone = SwinConfig(WIDTH, DEPTHS, HEADS, WINDOW)
    model = DvisDaq(replace(TINY, backbone=backbone)).double().eval()
    ours, unknown = translate({name: torch.from_numpy(value) for name, value in published().items()})
    assert unknown == []
    result = model.load_state_dict(ours, strict=False)
    assert result.unexpected_keys == []
    left = [k for k in result.missing_keys if k.startswith(ENCODER) and not any(p in k for p in IGNORED_HERE)]
    assert left == []
    return model


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_maps_of_the_four_stages(net: DvisDaq, size: tuple[int, int]) -> None:
    image = np.random.default_rng(1).standard_normal((3, *size))
    expected = Oracle(published())(image)
    with torch.no_grad():
        found = net.segmenter.model.pixel_level_module.encoder(torch.from_numpy(image)[None]).feature_maps
    for ours, slow in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[0].permute(1, 2, 0).numpy(), slow, atol=1e-6, rtol=0)


def test_a_swin_model_runs(net: DvisDaq) -> None:
    out = net(torch.randn(3, 3, 32, 64, dtype=torch.float64))
    assert len(out.rows) == 3


def test_sizes_are_read_off_the_tensors() -> None:
    state = {name: torch.from_numpy(value) for name, value in published().items()}
    assert backbone_of(state) == SwinConfig(WIDTH, DEPTHS, HEADS, WINDOW)


def test_three_stages_are_refused() -> None:
    with pytest.raises(ModelError, match="expected 4"):
        DvisDaq(replace(TINY, backbone=SwinConfig(8, (1, 1, 1), (2, 2, 2), 3)))
