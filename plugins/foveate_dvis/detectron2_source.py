"""A model of a detectron2 installation that shares this environment: Mask2Former, ViTDet, any that takes pictures.

The model stays detectron2's own, called as its predictors call it. Sites are found by running it once: its
attention modules, under their own paths. What flows between them is not known here, so there is no rollout;
capture, metrics, gradients and perturbations work.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.capture.deformable import DeformableRecord
from foveate.capture.tap import Tap
from foveate.capture.wrap_run import Heads
from foveate.errors import ModelError, SampleError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import (
    AttentionSource,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    ModelCard,
    OpaqueStep,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
)
from foveate.pretrained.loading import torch_dtype
from foveate.pretrained.preprocess import Recipe
from foveate.pretrained.weights import sha256_of
from foveate_dvis import detectron2_answers as answering
from foveate_dvis.detectron2_answers import Answers
from foveate_dvis.detectron2_opening import build, class_names, load, resizing
from foveate_dvis.module_sites import FoundSite, Room, Shape, finest, found_sites, label

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.capture.records import Record
    from foveate.geometry import Geometry

SHORTEST, LONGEST = 800, 1333
"""detectron2's default size of test images."""
TOP = 100


class Detectron2Source(AttentionSource):
    """Options of :meth:`open`: ``imports`` (modules that register what the configuration builds on, for instance
    ``["mask2former"]``), ``overrides`` (dotted names of the configuration and values), ``labels`` (class names),
    ``seed`` (random weights), and ``size`` ((height, width): every picture is resized to it; without it the
    configuration's shortest edge is, and pictures of other proportions belong into other runs).

    :meth:`of` takes a live model.
    """

    targets = ("class",)

    def __init__(
        self,
        model: nn.Module,
        card: ModelCard,
        *,
        resize: tuple[int, int] | None = None,
        size: Sequence[int] | None = None,
        labels: Sequence[str] = (),
        channels: str = "",
    ) -> None:
        if getattr(model, "tracker", None) is not None:
            raise ModelError(
                f"{card.id}: {type(model).__name__} keeps tracks: it takes clips, not pictures",
                remedy="open its weights with source 'dvis-daq', or record it: python -m foveate_dvis.exporter",
            )
        self._model, self.card = model.eval().requires_grad_(False), card
        self.channels = channels or str(getattr(model, "input_format", None) or "RGB")
        edge, longest = resize or (SHORTEST, LONGEST)
        fixed = None if size is None else (int(size[0]), int(size[1]))
        # The recipe only resizes: the model normalises and pads by itself.
        self._recipe = Recipe(
            "detectron2", edge=None if fixed else edge, longest=longest, resample=2, rescale=None
        )
        self._recipe = self._recipe.at(*fixed) if fixed else self._recipe
        self.labels = class_names(model, _classes(model), labels)
        self.ignored = {
            "": "class probabilities",
            "sem_seg_head": "class probabilities",
            "roi_heads*": "class scores",
        }
        self._seen: dict[tuple[int, int], dict[str, FoundSite]] = {}
        example = fixed or (min(edge, 256), min(edge, 320))
        self._sites = tuple(one.site for one in self._at(self._padded(example)).values())
        if not self._sites:
            raise ModelError(f"{card.id}: no attention was seen in {type(model).__name__}")

    @classmethod
    def of(cls, model: nn.Module, *, name: str = "", **options: Any) -> Detectron2Source:
        """A live model of detectron2; ``options``: ``resize``, ``size``, ``labels``, ``channels``."""
        own = name or type(model).__name__
        return cls(model, ModelCard(id=own, source="a live model", adapter=_adapter(cls)), **options)

    @classmethod
    def open(  # type: ignore[override]  # options are named, so that a wrong one is refused
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        imports: Sequence[str] = (),
        overrides: Mapping[str, Any] | None = None,
        labels: Sequence[str] = (),
        size: Sequence[int] | None = None,
        seed: int = 0,
    ) -> Detectron2Source:
        """``row.id`` is the configuration file. Raises MissingDependencyError, ModelError, UsageError."""
        if weights is None:
            raise ModelError(
                f"{row.id}: give the weights", remedy='weights=FILE (.pth of tensors, safetensors) or "random"'
            )
        named = [imports] if isinstance(imports, str) else list(imports)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, config = build(Path(str(row.id)), named, overrides or {})
        hashed = f"random:{Path(str(row.id)).name}:{seed}"
        if str(weights) != "random":
            load(model, Path(weights))
            hashed = sha256_of([Path(weights)])
        card = ModelCard(
            id=Path(str(row.id)).stem,
            source=str(weights),
            adapter=_adapter(cls),
            weights_sha256=hashed,
            licence=getattr(row, "licence", "unverified") or "unverified",
            family=row.family.id,
            notes=("random weights: attention means nothing here",) if str(weights) == "random" else (),
        )
        model = model.to(device=device, dtype=torch_dtype(dtype))
        return cls(model, card, resize=resizing(config), size=size, labels=labels)

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """detectron2's model."""
        return self._model

    @property
    def sites(self) -> tuple[Site, ...]:
        """One for every group of attention modules that repeat."""
        return self._sites

    def facts(self) -> Mapping[str, Any]:
        """What the live model is."""
        return {
            "architecture": type(self._model).__name__,
            "classes": len(self.labels),
            "channels": self.channels,
            "sites": len(self._sites),
            "parameters": sum(p.numel() for p in self._model.parameters()),
        }

    def _at(self, size: tuple[int, int]) -> dict[str, FoundSite]:
        """Sites as they are for inputs of (height, width), learned from one run on noise.

        Asked for first when pictures are encoded: while a capture looks at the model nothing else can.
        """
        if size not in self._seen:
            like = next(self._model.parameters())
            calls: dict[str, list[Shape]] = defaultdict(list)
            noise = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)) * 255
            tap = Tap(
                self._model, lambda record: calls[record.name].append(_shape(record)), heads=Heads(self._model)
            )
            with torch.no_grad(), tap:
                self._call(noise.to(device=like.device, dtype=like.dtype))
            self._seen[size] = found_sites(calls, Room(size))
        return self._seen[size]

    def _of(self, batch: Batch) -> dict[str, FoundSite]:
        """Sites as they are for this batch."""
        return self._at((int(batch.inputs.shape[-2]), int(batch.inputs.shape[-1])))

    # ------------------------------------------------------------------------- pictures in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Resized and padded pictures, 0 to 255 in the model's channel order (the model normalises by itself).

        The padding is the model's mean, which its normalisation turns into the zeros that detectron2 pads with.
        Raises SampleError where padded sizes differ.
        """
        made = [self._recipe(sample.pixels) for sample in samples]
        sizes = {self._padded(values.shape[-2:]) for values, _ in made}
        if len(sizes) > 1:
            raise SampleError(
                f"pictures of {len(sizes)} sizes in one batch", remedy="batch size 1, or size=(height, width)"
            )
        height, width = sizes.pop()
        self._at((height, width))
        like = next(self._model.parameters())
        mean = getattr(self._model, "pixel_mean", torch.zeros(3, 1, 1)).detach().cpu().reshape(3, 1, 1)
        inputs = mean.expand(len(made), 3, height, width).clone()
        for i, (values, _) in enumerate(made):
            picture = torch.from_numpy(np.ascontiguousarray(values)).float()
            picture = picture.flip(0) if self.channels == "BGR" else picture
            inputs[i, :, : picture.shape[1], : picture.shape[2]] = picture
        geometry = tuple(_placed(placed, height, width) for _, placed in made)
        ids = tuple(sample.id for sample in samples)
        return Batch(inputs.to(device=like.device, dtype=like.dtype), geometry, ids)

    def _padded(self, size: Sequence[int]) -> tuple[int, int]:
        """Size after detectron2's own padding of a picture."""
        square = dict(getattr(getattr(self._model, "backbone", None), "padding_constraints", None) or {})
        divisor = int(getattr(self._model, "size_divisibility", 0) or square.get("size_divisibility", 0))
        divisor = divisor or int(getattr(getattr(self._model, "backbone", None), "size_divisibility", 0) or 1)
        side = int(square.get("square_size", 0))
        height, width = (-(-max(int(one), side) // divisor) * divisor for one in size)
        return height, width

    def cells(self, batch: Batch) -> CellGrid:
        """The finest map that is read."""
        height, width = (int(side) for side in batch.inputs.shape[-2:])
        rows, columns = finest(self._of(batch), (height, width))
        return CellGrid.regular(rows, columns, height=float(height), width=float(width))

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Answers:
        """The model on every picture of the batch."""
        with torch.set_grad_enabled(grad):
            return self._call(batch.inputs)

    def _call(self, inputs: Tensor) -> Answers:
        height, width = (int(side) for side in inputs.shape[-2:])
        kept: list[tuple[Tensor, Tensor]] = []
        hook = None
        head = getattr(self._model, "sem_seg_head", None)
        if head is not None:
            hook = head.register_forward_hook(lambda module, args, out: kept.extend(_queries(out)))
        try:
            given = [{"image": image, "height": height, "width": width} for image in inputs]
            out = self._model(given)
        finally:
            if hook is not None:
                hook.remove()
        instances = tuple(one["instances"] for one in out if "instances" in one)
        return Answers(kept[0] if kept else None, instances)

    def predictions(self, outputs: Answers, batch: Batch) -> list[list[Prediction]]:
        """Queries or instances, best first; none of a model of another kind."""
        if outputs.queries is None and not outputs.instances:
            return [[] for _ in batch.ids]
        pairs = enumerate(batch.geometry)
        return [answering.predictions(outputs, i, geometry, self.labels, TOP) for i, geometry in pairs]

    def bind(self, outputs: Answers, batch: Batch, target: Target) -> BoundTarget:
        """Freeze a target to a query or an instance; see :mod:`foveate_dvis.detectron2_answers`."""
        if target.kind not in ("default", "class"):
            raise UsageError(f"{self.card.id}: no target kind {target.kind!r}", remedy="class")
        if outputs.queries is None and not outputs.instances:
            raise UsageError(f"{self.card.id}: this model answers neither queries nor instances")
        return answering.bind(outputs, len(batch), self.labels, target)

    def score(self, outputs: Answers, batch: Batch, bound: BoundTarget) -> Tensor:
        """One differentiable number a row."""
        return answering.score(outputs, bound).to(batch.inputs.device)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Answers) -> CallLabels:
        """See :mod:`foveate_dvis.module_sites`."""
        return label(self._of(batch)[call.site], call, len(batch))

    def readout(self, batch: Batch, outputs: Answers, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The row of the bound (else the best) query at every site of queries; none of instances."""
        if outputs.queries is None:
            return {}
        chosen = bound if bound is not None else self.bind(outputs, batch, Target())
        count = outputs.queries[0].shape[1]
        weights = torch.zeros(len(chosen), count, device=batch.inputs.device)
        for i, row in enumerate(chosen.rows):
            weights[i, int(row.object or 0)] = 1.0
        found = self._of(batch)
        readers = [name for name, one in found.items() if len(one.query) == count and not one.site.group]
        return {name: Readout(weights, "object query") for name in reversed(readers)}

    def flow(self, batch: Batch, outputs: Answers) -> list[Step]:
        """Not known: one opaque step."""
        return [OpaqueStep(self.stream(batch), "how detectron2's modules follow one another is not known here")]


def _adapter(cls: type) -> str:
    return f"{cls.__module__}:{cls.__name__}"


def _placed(geometry: Geometry, height: int, width: int) -> Geometry:
    return replace(geometry, input_height=height, input_width=width)


def _shape(record: Record) -> Shape:
    shape = record.shape
    if not isinstance(record, DeformableRecord):
        return Shape(*shape)
    levels = tuple(level.size for level in record.levels)
    return Shape(shape.batch, shape.heads, shape.queries, shape.keys, levels, "deformable")


def _queries(out: Any) -> list[tuple[Tensor, Tensor]]:
    """Class and mask logits of a head that answers by queries."""
    if not isinstance(out, Mapping) or not {"pred_logits", "pred_masks"} <= set(out):
        return []
    return [(out["pred_logits"], out["pred_masks"])]


def _classes(model: nn.Module) -> int:
    """How many classes a model tells apart, 0 where it does not say."""
    for name in ("sem_seg_head", "roi_heads"):
        count = getattr(getattr(model, name, None), "num_classes", None)
        if isinstance(count, int):
            return count
    return 0
