"""The adapter: what foveate has to know about BlockViT, and nothing of how attention is captured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from foveate.errors import ModelError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate_example.model import CLASSES, HEADS, HEIGHT, LAYERS, PATCH, WIDTH, BlockViT, seeded

SITE, TOKENS = "encoder.self", "tokens"
GRID = (HEIGHT // PATCH, WIDTH // PATCH)
LABELS = tuple(f"class {i}" for i in range(CLASSES))


class BlockViTSource(AttentionSource):
    """BlockViT with letterboxed pictures."""

    targets = ("class",)

    def __init__(self, model: BlockViT, card: ModelCard) -> None:
        self._module, self.card = model.eval(), card

    @classmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        seed: int = 0,
    ) -> BlockViTSource:
        """``weights`` is a safetensors file, or "random" (then ``seed`` decides)."""
        model = seeded(seed) if weights in (None, "random") else _loaded(Path(str(weights)))
        card = ModelCard(row.id, row.source, cls.__name__, licence=row.licence, provenance=row.provenance)
        return cls(model.to(device=device, dtype=getattr(torch, dtype)), card)

    @property
    def module(self) -> nn.Module:
        """The model."""
        return self._module

    @property
    def sites(self) -> tuple[Site, ...]:
        """One site: the paths of the modules that call attention, each with its layer number."""
        return (Site(SITE, {f"blocks.{i}.attention": i for i in range(LAYERS)}, HEADS, TOKENS, TOKENS),)

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Shrink each picture into 48 x 64, pad with grey, scale to [-1, 1]."""
        boxes = [_letterbox(sample.pixels) for sample in samples]
        like = self._module.position
        inputs = torch.from_numpy(np.stack([pixels for pixels, _ in boxes])).to(like)
        return Batch(inputs, tuple(geometry for _, geometry in boxes), tuple(sample.id for sample in samples))

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """Logits ``(sample, class)``."""
        with torch.set_grad_enabled(grad):
            logits: Tensor = self._module(batch.inputs)
        return logits

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        """Every class, best first."""
        table = outputs.detach().float().softmax(-1)
        order = table.argsort(-1, descending=True)
        return [
            [Prediction(LABELS[c], float(row[c]), c) for c in best.tolist()]
            for row, best in zip(table, order, strict=True)
        ]

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        """The predicted class of each sample, or the class that is named."""
        if target.kind not in ("default", "class"):
            raise UsageError(f"block-vit has no target {target.kind!r}", remedy="use 'class'")
        chosen = outputs.argmax(-1).tolist() if target.label is None else [_class(target.label)] * len(batch)
        rows = tuple(TargetRow(i, "class", c, LABELS[c]) for i, c in enumerate(chosen))
        return BoundTarget(rows, target.scale)

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's class, float32 ``(target,)``."""
        logits = outputs.float()
        table = logits.softmax(-1) if bound.scale == "probability" else logits
        return table[[row.sample for row in bound.rows], [row.class_index for row in bound.rows]]

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        """The register, then the patches row by row."""
        patches = TokenAxis.patches(*GRID, height=HEIGHT, width=WIDTH)
        axis = TokenAxis.concat(TokenAxis.of_kind("register", 1), patches)
        return CallLabels((("sample", len(batch)),), axis, axis)

    def readout(self, batch: Batch, outputs: Tensor, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The mean of the patches, which is what the head sees."""
        count = GRID[0] * GRID[1]
        weights = torch.full((len(batch) if bound is None else len(bound), 1 + count), 1 / count)
        weights[:, 0] = 0.0
        return {SITE: Readout(weights, "patch mean")}

    def flow(self, batch: Batch, outputs: Tensor) -> list[Step]:
        """Layer after layer."""
        return [AttentionStep(CallKey(SITE, layer), TOKENS, TOKENS) for layer in range(LAYERS)]

    def cells(self, batch: Batch) -> CellGrid:
        """The patches."""
        return CellGrid.regular(*GRID, height=HEIGHT, width=WIDTH)

    def facts(self) -> Mapping[str, Any]:
        """What the registry row's `expect` is held against: read from the live model."""
        kernel, tokens = self._module.patchify.kernel_size[0], self._module.position.shape[1]
        return {
            "image": [HEIGHT, WIDTH],
            "patch": kernel,
            "grid": [HEIGHT // kernel, tokens // (HEIGHT // kernel)],
            "prefix": self._module.register.shape[1],
            "layers": len(self._module.blocks),
            "heads": HEADS,
        }


def _letterbox(pixels: Any) -> tuple[Any, Geometry]:
    """``(y, x, 3)`` uint8 as ``(3, 48, 64)`` float32, and the exact map between the two."""
    height, width = pixels.shape[:2]
    shrink = min(HEIGHT / height, WIDTH / width)
    rows, columns = max(1, round(height * shrink)), max(1, round(width * shrink))
    top, left = (HEIGHT - rows) // 2, (WIDTH - columns) // 2
    resized = Image.fromarray(pixels).resize((columns, rows), Image.Resampling.BILINEAR)
    canvas = np.full((HEIGHT, WIDTH, 3), 127.5, np.float32)
    canvas[top : top + rows, left : left + columns] = resized
    # The sizes after rounding decide the scale, not `shrink`: geometry is exact or it is useless.
    geometry = Geometry(height, width, HEIGHT, WIDTH, rows / height, columns / width, top, left)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1)) / 127.5 - 1.0, geometry


def _loaded(path: Path) -> BlockViT:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    model = BlockViT()
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{path}: not weights of BlockViT: {error}", remedy="give a safetensors file of it"
        ) from error
    return model


def _class(label: str | int) -> int:
    index = LABELS.index(label) if label in LABELS else label
    if not isinstance(index, int) or not 0 <= index < CLASSES:
        raise UsageError(f"block-vit has no class {label!r}", remedy=f"one of {', '.join(LABELS)}")
    return index
