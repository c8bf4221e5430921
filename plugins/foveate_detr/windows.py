"""Attention inside the backbones of detectors: in windows (Swin, RF-DETR's DINOv2), and over all windows at once.

Swin (Liu et al. 2021, arXiv:2103.14030) cuts a stage's grid into windows, every other block after rolling it by
half a window; windows lie row by row, the grid padded at the right and the bottom. RF-DETR cuts its patches
into n x n windows, each with a copy of the class token, and lets some blocks attend over all windows side by
side.

A window's calls share their token axis, so its tokens are labelled by their place within the window (the one at
the upper left), which is what distances and offsets need. :func:`window_cells` says which cell of the grid each
token of each window is. Sweeps end above the backbone (convolutions lie between), so these sites are captured,
measured and changed, not followed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import CaptureError
from foveate.interfaces import Batch, CallKey, CallLabels, Site, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

PREFIX = "backbone."


@dataclass(frozen=True)
class BackboneSite:
    """One site of a backbone: its blocks by layer number, pixels of a ``patch``, and how often the grid was halved
    before it (``stage``, Swin).
    """

    site: Site
    blocks: dict[int, Any]
    patch: int
    stage: int = 0


class BackboneAttention:
    """Sites in the backbone of one live model, and labels of their calls; empty where it has none that is
    known."""

    def __init__(self, model: nn.Module) -> None:
        found = _swin(model) or _windowed_dino(model)
        self._by_id = {one.site.id: one for one in found}

    @property
    def sites(self) -> tuple[Site, ...]:
        """In the order in which they run."""
        return tuple(one.site for one in self._by_id.values())

    def label(self, call: CallKey, batch: Batch) -> CallLabels:
        """Windows as a leading axis, tokens by their place. Raises CaptureError for grids that the model
        scrambles."""
        found = self._by_id[call.site]
        block = found.blocks[call.layer]
        height, width = (int(side) for side in batch.inputs.shape[-2:])
        if hasattr(block, "shift_size"):
            return _label_swin(found, block, len(batch), height, width)
        return _label_dino(found, block, len(batch), height, width)


def window_cells(rows: int, columns: int, window: int, shift: int = 0) -> NDArray[np.int64]:
    """Cell of the grid (row by row) that each token of each of Swin's windows is: int64 ``(window, token)``.

    -1 where a token is padding beyond the grid. ``shift`` is the block's ``shift_size``.
    """
    height, width = (math.ceil(n / window) * window for n in (rows, columns))
    cells = np.full((height, width), -1, np.int64)
    cells[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    rolled = np.roll(cells, (-shift, -shift), (0, 1))
    tiles = rolled.reshape(height // window, window, width // window, window).transpose(0, 2, 1, 3)
    return tiles.reshape(-1, window * window)


# ------------------------------------------------------------------------------------------------ Swin


def _swin(model: nn.Module) -> list[BackboneSite]:
    """A site a stage: heads and grid change between them."""
    stages: dict[str, dict[str, Any]] = {}
    for path, module in model.named_modules():
        if type(module).__name__.endswith("SwinLayer") and hasattr(module, "shift_size"):
            stages.setdefault(path.rpartition(".blocks.")[0], {})[path] = module
    found, layer = [], 0
    for stage, blocks in enumerate(stages.values()):
        numbers = {path: layer + i for i, path in enumerate(blocks)}
        layer += len(blocks)
        name = f"{PREFIX}stage{stage + 1}"
        modules = {f"{path}.attention": number for path, number in numbers.items()}
        heads = _heads(next(iter(blocks.values())).attention)
        site = _site(name, modules, heads, summary="windows of the backbone's grid, shifted every other block")
        by_layer = {numbers[path]: block for path, block in blocks.items()}
        found.append(BackboneSite(site, by_layer, _patch(model), stage))
    return found


def _label_swin(found: BackboneSite, block: Any, samples: int, height: int, width: int) -> CallLabels:
    rows, columns = (_halved(math.ceil(side / found.patch), found.stage) for side in (height, width))
    window = int(block.window_size)
    count = math.ceil(rows / window) * math.ceil(columns / window)
    size = float(found.patch * 2**found.stage * window)
    tokens = TokenAxis.patches(window, window, height=size, width=size)
    return CallLabels((("sample", samples), ("window", count)), tokens, tokens)


def _halved(side: int, times: int) -> int:
    for _ in range(times):
        side = (side + 1) // 2
    return side


def _patch(model: nn.Module) -> int:
    """Pixels of a cell of the first stage."""
    for module in model.modules():
        if type(module).__name__.endswith("SwinPatchEmbeddings"):
            size = module.patch_size
            return int(size[0]) if isinstance(size, list | tuple) else int(size)  # type: ignore[arg-type]
    raise CaptureError(f"{type(model).__name__}: Swin blocks without patch embeddings")


# ------------------------------------------------------------------------------------------ RF-DETR


def _windowed_dino(model: nn.Module) -> list[BackboneSite]:
    """Blocks that attend within windows, and those that attend over all of them."""
    blocks = {path: m for path, m in model.named_modules() if hasattr(m, "global_attention")}
    layers = {path: number for number, path in enumerate(blocks)}
    found = []
    for name, everywhere in ((f"{PREFIX}window", False), (f"{PREFIX}self", True)):
        chosen = {path: m for path, m in blocks.items() if bool(m.global_attention) == everywhere}
        if chosen:
            modules = {f"{path}.attention": layers[path] for path in chosen}
            heads = _heads(next(iter(chosen.values())).attention)
            text = "all windows side by side" if everywhere else "windows of patches, each with a class token"
            site = _site(name, modules, heads, summary=text, windows=not everywhere)
            patch = next(iter(chosen.values())).attention.config.patch_size
            patch = int(patch if isinstance(patch, int) else patch[0])
            found.append(BackboneSite(site, {layers[path]: m for path, m in chosen.items()}, patch))
    return found


def _label_dino(found: BackboneSite, block: Any, samples: int, height: int, width: int) -> CallLabels:
    count = int(block.num_windows)
    side = height // found.patch // count
    if height != width:
        raise CaptureError(
            f"{found.site.id}: windows of an input of {height} x {width} are not tiles of the picture",
            remedy="give image_size=(n, n), as the model's own processor does",
        )
    if not found.site.group:
        tokens = _all_windows(count, side, found.patch)
        return CallLabels((("sample", samples),), tokens, tokens)
    extent = float(side * found.patch)
    window = TokenAxis.patches(side, side, height=extent, width=extent)
    tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), window)
    return CallLabels((("sample", samples), ("window", count * count)), tokens, tokens)


def _all_windows(count: int, side: int, patch: int) -> TokenAxis:
    """Each window's class token and patches, window after window, at their places in the picture."""
    whole = float(count * side * patch)
    grid = TokenAxis.patches(count * side, count * side, height=whole, width=whole)
    cells = window_cells(count * side, count * side, side)
    parts = [part for tile in cells for part in (TokenAxis.of_kind("cls", 1), grid.take(tile.tolist()))]
    return TokenAxis.concat(*parts)


# ------------------------------------------------------------------------------------------- helpers


def _heads(attention: Any) -> int:
    for module in attention.modules():
        for name in ("num_attention_heads", "num_heads"):
            if isinstance(getattr(module, name, None), int):
                return int(getattr(module, name))
    raise CaptureError(f"{type(attention).__name__}: does not say how many heads it has")


def _site(name: str, modules: dict[str, int], heads: int, *, summary: str, windows: bool = True) -> Site:
    stream = f"{name}.tokens"
    return Site(name, modules, heads, stream, stream, group=("window",) if windows else (), summary=summary)
