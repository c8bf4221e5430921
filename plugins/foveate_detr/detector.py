"""Encoder-decoder detectors with dense attention over one feature map: DETR and its descendants.

An image becomes a feature map, its cells attend to each other in the encoder, and object queries read from
them in the decoder. All of it is the model's own call; this file labels the axes and reads the answers.
Families differ in what a registry row says; other adapters of this package subclass :class:`DetectorSource`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Prediction,
    Readout,
    Sample,
    Site,
    Step,
    Target,
    TokenAxis,
)
from foveate_detr import targets
from foveate_detr.alignment import corner_cells, grid_tokens, looks_from_corners
from foveate_detr.detections import Detections, boxes_to_original
from foveate_detr.loading import load_detector
from foveate_detr.preprocess import Canvas, PaddedRecipe
from foveate_detr.sites import find_sites
from foveate_detr.windows import PREFIX, BackboneAttention

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.detection.readouts import LayerAnswers
    from foveate_vit.loading import Loaded

ENCODER, OWN, CROSS = "encoder.self", "decoder.self", "decoder.cross"
TOKENS, QUERIES = "encoder.tokens", "decoder.queries"
_LOADING = ("architecture", "config", "seed")
_PROBE = 128
"""Side of the blank image by which the strides of a backbone are measured; a multiple of every stride."""


class DetectorSource(AttentionSource):
    """A detector of transformers with its preprocessing.

    Options of :meth:`open`: ``architecture`` (a class of transformers), ``config`` and ``seed`` (random
    weights), ``image_size`` (resize every image to exactly (height, width)), ``canvas`` (see
    :class:`~foveate_detr.preprocess.PaddedRecipe`), ``threshold`` and ``max_objects`` (which objects
    ``Target(object=None)`` means), ``backbone`` (True: capture attention inside the backbone, too; see
    :mod:`foveate_detr.windows`).
    """

    divisor: ClassVar[int] = 1
    """Inputs have sides that are multiples of this."""
    options: ClassVar[tuple[str, ...]] = ("image_size", "canvas", "threshold", "max_objects", "backbone")
    """What the constructor takes besides the loaded model."""

    def __init__(
        self,
        loaded: Loaded,
        family: Any,
        *,
        image_size: int | Sequence[int] | None = None,
        canvas: Canvas | Sequence[int] = "fixed",
        threshold: float = 0.5,
        max_objects: int = 20,
        backbone: bool = False,
    ) -> None:
        self.card = loaded.card
        self._module: Any = loaded.model
        self._layout: Mapping[str, Any] = family.layout
        self._sites = find_sites(family.sites, loaded.model)
        self._by_id = {site.id: site for site in self._sites}
        self.ignored: Mapping[str, str] = dict(self._layout.get("ignored", {}))
        self._inside = self._backbone_attention() if backbone else None
        self.recipe = self._recipe(loaded, image_size, canvas)
        self._own_size = self._recipe(loaded, None, canvas).size()
        self.threshold, self.max_objects = _fraction(threshold), int(max_objects)
        self.targets: tuple[str, ...] = targets.kinds_of(boxes=self._has_boxes(), masks=self._has_masks())
        self._strides: tuple[float, ...] | None = None

    @classmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        **options: Any,
    ) -> DetectorSource:
        """Open a registry row; options see the class. Raises ModelError, UsageError, MissingDependencyError."""
        known = (*_LOADING, *cls.options)
        for name in options:
            if name not in known:
                raise UsageError(
                    f"source {cls.__name__} takes no option {name!r}", remedy=f"its options: {', '.join(known)}"
                )
        loading = {name: options.pop(name) for name in _LOADING if name in options}
        adapter = f"{cls.__module__}:{cls.__name__}"
        loaded = load_detector(row, adapter=adapter, weights=weights, device=device, dtype=dtype, **loading)
        return cls(loaded, row.family, **options)

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The model of transformers, in eval mode."""
        module: nn.Module = self._module
        return module

    @property
    def sites(self) -> tuple[Site, ...]:
        """Encoder self-attention, and the queries' own and cross attention."""
        return self._sites if self._inside is None else (*self._inside.sites, *self._sites)

    def _backbone_attention(self) -> BackboneAttention:
        found = BackboneAttention(self._module)
        if not found.sites:
            raise UsageError(
                f"{self.card.id}: its backbone has no attention that is known", remedy="leave out backbone=True"
            )
        return found

    @property
    def labels(self) -> list[str]:
        """Names of the classes by index; "no object" is none of them."""
        table = self._module.config.id2label
        return [str(table[i]) for i in sorted(table)]

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model on its own input size, to be held against the registry's ``expect``."""
        size = self._own_size
        return {
            "architecture": type(self._module).__name__,
            "image": list(size) if size else "as the batch",
            "strides": [int(s) if s == int(s) else s for s in self.strides],
            "queries": self._query_count(),
            "classes": len(self.labels),
            "layers": {site.id: len(site.layers) for site in self._sites},
            "heads": {site.id: site.heads for site in self._sites},
            "parameters": sum(p.numel() for p in self._module.parameters()),
        }

    def _query_count(self) -> int:
        return int(self._module.config.num_queries)

    def _has_boxes(self) -> bool:
        return True

    def _has_masks(self) -> bool:
        return type(self._module).__name__.endswith("ForSegmentation")

    # ------------------------------------------------------------------------- images in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Preprocess images on one canvas, with the mask of what is image. Raises SampleError."""
        encoded = self.recipe(samples)
        like = next(self._module.parameters())
        return Batch(
            inputs=torch.from_numpy(encoded.inputs).to(device=like.device, dtype=like.dtype),
            geometry=encoded.geometry,
            ids=tuple(sample.id for sample in samples),
            per_sample=self._per_sample(torch.from_numpy(encoded.mask).to(like.device)),
        )

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {"pixel_mask": mask}

    def _recipe(
        self, loaded: Loaded, image_size: int | Sequence[int] | None, canvas: Canvas | Sequence[int]
    ) -> PaddedRecipe:
        found = loaded.side_file("preprocessor_config.json")
        if found is None:  # transformers 5 may keep it inside processor_config.json
            found = (loaded.side_file("processor_config.json") or {}).get("image_processor")
        recipe = PaddedRecipe.read(
            found,
            default=str(self._layout.get("processor", "DetrImageProcessor")),
            canvas=_canvas(canvas),
            divisor=self.divisor,
        )
        if image_size is None:
            return recipe
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        step = _size_step(loaded.model.config)
        if int(height) % step or int(width) % step:
            raise UsageError(
                f"image_size {int(height)} x {int(width)}: this model needs sides that are multiples of {step}",
                remedy=f"for instance image_size={max(1, round(int(height) / step)) * step}",
            )
        return recipe.at(int(height), int(width))

    @property
    def size_step(self) -> int:
        """Sides of ``image_size`` must be multiples of this; 1 where any will do."""
        return _size_step(self._module.config)

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The model's own output."""
        with torch.set_grad_enabled(grad):
            return self._module(pixel_values=batch.inputs, **batch.per_sample)

    # ------------------------------------------------------------------------- answers

    def detections(self, outputs: Any, batch: Batch) -> Detections:
        """What the model said, in original pixels, differentiable."""
        return Detections(
            outputs.logits,
            self._layout.get("scores", "softmax"),
            boxes_to_original(outputs.pred_boxes, batch.geometry, self._layout.get("boxes", "image")),
            outputs.pred_masks if self._has_masks() else None,
        )

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """One prediction an object query with its best class, best first; masks above the threshold only."""
        found = self.detections(outputs, batch)
        found.check(batch.ids)
        return [self._answers(found, batch, i) for i in range(len(batch))]

    def _answers(self, found: Detections, batch: Batch, sample: int) -> list[Prediction]:
        scores, classes = found.probabilities[sample].detach().max(-1)
        order = scores.argsort(descending=True, stable=True).tolist()
        return [
            Prediction(
                self.labels[int(classes[q])],
                float(scores[q]),
                int(classes[q]),
                q,
                box=_box(found, sample, q),
                mask=self._mask(found, batch, sample, q) if float(scores[q]) > self.threshold else None,
            )
            for q in order
        ]

    @staticmethod
    def _mask(found: Detections, batch: Batch, sample: int, query: int) -> Any:
        """Mask logits above 0 on the pixels of the original image, bool (y, x)."""
        if found.masks is None:
            return None
        logits = found.masks[sample, query].detach().float()[None, None]
        geometry = batch.geometry[sample]
        size = batch.inputs.shape[-2:]
        fine = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        rows = max(1, round(geometry.original_height * geometry.scale_y))
        columns = max(1, round(geometry.original_width * geometry.scale_x))
        whole = (geometry.original_height, geometry.original_width)
        image = F.interpolate(fine[..., :rows, :columns], size=whole, mode="bilinear", align_corners=False)
        return (image[0, 0] > 0).cpu().numpy()

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Freeze a target to objects; see :mod:`foveate_detr.targets`. A sample without objects has no rows."""
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}", remedy=f"one of {', '.join(self.targets)}"
            )
        found = self.detections(outputs, batch)
        found.check(batch.ids)
        return targets.bind(found, self.labels, target, kind, threshold=self.threshold, at_most=self.max_objects)

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """One differentiable number a row; see :mod:`foveate_detr.targets`."""
        return targets.score(self.detections(outputs, batch), bound)

    def layer_answers(self, batch: Batch) -> list[LayerAnswers]:
        """What each decoder layer would answer, by the model's own heads; see :mod:`foveate_detr.layers`."""
        from foveate_detr.layers import layer_answers

        return layer_answers(self, batch)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """Cells of the feature map, and object queries."""
        if self._inside is not None and call.site.startswith(PREFIX):
            return self._inside.label(call, batch)
        site = self._by_id[call.site]
        return CallLabels(
            (("sample", len(batch)),),
            self._stream_tokens(site.query, batch, outputs),
            self._stream_tokens(site.key, batch, outputs),
            self._valid(batch) if site.form == "deformable" and "padding" in site.masks else None,
        )

    def _valid(self, batch: Batch) -> Tensor | None:
        """Tokens of all levels that lie on the picture, bool (sample, key), by the model's own rule: the mask's
        nearest pixel.
        """
        mask = batch.per_sample.get("pixel_mask")
        if mask is None:
            return None
        parts = [F.interpolate(mask[:, None].float(), size=size).flatten(1) > 0 for size in self.levels(batch)]
        return torch.cat(parts, 1)

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        if stream == QUERIES:
            return TokenAxis.of_kind("object", self.detections(outputs, batch).queries)
        return self._tokens(batch)

    def _tokens(self, batch: Batch) -> TokenAxis:
        return grid_tokens(self.cells(batch))

    def readout(self, batch: Batch, outputs: Any, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Each target's own object query; without targets the query of the surest object."""
        found = self.detections(outputs, batch)
        if bound is None:
            chosen = found.probabilities.detach().amax(-1).argmax(-1)
        elif any(row.kind.endswith(targets.MATCH) for row in bound.rows):
            chosen = targets.match(found, bound)[0]
        else:
            chosen = torch.tensor([int(row.object or 0) for row in bound.rows], dtype=torch.long)
        row = self._reading_row(chosen, batch)
        weights = F.one_hot(row, self._readout_width(found, batch)).float().to(batch.inputs.device)
        return {self._reading_site(): Readout(weights, "object query")}

    def _reading_row(self, chosen: Tensor, batch: Batch) -> Tensor:
        """Positions of object queries among the reading site's queries."""
        return chosen

    def _readout_width(self, found: Detections, batch: Batch) -> int:
        """How many queries the reading site has."""
        return found.queries

    def _reading_site(self) -> str:
        return CROSS

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder layers, then the decoder's own and cross attention, layer by layer."""
        decoder = [site for site in self._sites if site.query == QUERIES]
        return [*self._steps([s for s in self._sites if s not in decoder]), *self._steps(decoder)]

    @staticmethod
    def _steps(sites: Sequence[Site]) -> list[Step]:
        """Layer by layer, and within a layer in the order in which the sites are declared."""
        layers = sorted({layer for site in sites for layer in site.layers})
        return [
            AttentionStep(CallKey(site.id, layer), site.query, site.key)
            for layer in layers
            for site in sites
            if layer in site.layers
        ]

    def stream(self, batch: Batch) -> str:
        """The cells of the feature map."""
        return TOKENS

    def cells(self, batch: Batch) -> CellGrid:
        """The cells of the (finest) feature map that is attended to, tiling the input."""
        height, width = (float(side) for side in batch.inputs.shape[-2:])
        rows, columns = max(self.levels(batch))
        if self._looks_from_corners():
            return corner_cells(rows, columns, height=height, width=width, stride=max(self.strides))
        return CellGrid.regular(rows, columns, height=height, width=width)

    def _looks_from_corners(self) -> bool:
        """Whether the one feature map is a convolutional backbone's own; see :mod:`foveate_detr.alignment`."""
        return len(self.strides) == 1 and looks_from_corners(self._module.config)

    # ------------------------------------------------------------------------- feature maps

    @property
    def strides(self) -> tuple[float, ...]:
        """Input pixels a cell of each feature map that is attended to, measured once on a blank image."""
        if self._strides is None:
            side = -(-_PROBE // self.divisor) * self.divisor
            with torch.no_grad():
                self._strides = tuple(side / rows for rows, _ in self._measure_levels(side))
        return self._strides

    def levels(self, batch: Batch) -> list[tuple[int, int]]:
        """(rows, columns) of each feature map that is attended to, in the model's order."""
        height, width = batch.inputs.shape[-2:]
        return [(int(np.ceil(height / s)), int(np.ceil(width / s))) for s in self.strides]

    def _measure_levels(self, side: int) -> list[tuple[int, int]]:
        blank = self._blank(side)
        shape = self.feature_map(blank).shape[-2:]
        return [(int(shape[0]), int(shape[1]))]

    def feature_map(self, batch: Batch) -> Tensor:
        """The backbone's last map, ``(sample, channel, y, x)``, which is what the encoder attends to."""
        height, width = batch.inputs.shape[-2:]
        features = self._backbone()(
            batch.inputs, batch.inputs.new_ones(len(batch), height, width, dtype=torch.long)
        )
        if isinstance(features[0], list):  # some families give (maps, positions)
            features = features[0]
        found: Tensor = features[-1][0]
        return found

    def _blank(self, side: int) -> Batch:
        """One input of zeros, which is the mean colour of the training set."""
        like = next(self._module.parameters())
        mask = torch.ones(1, side, side, device=like.device, dtype=torch.long)
        zeros = torch.zeros(1, 3, side, side, device=like.device, dtype=like.dtype)
        return Batch(zeros, (Geometry.identity(side, side),), ("blank",), self._per_sample(mask))

    def _backbone(self) -> Any:
        path = next(name for name, _ in self._module.named_modules() if name.rpartition(".")[2] == "backbone")
        return self._module.get_submodule(path)


def _box(found: Detections, sample: int, query: int) -> tuple[float, float, float, float] | None:
    if found.boxes is None:
        return None
    top, left, bottom, right = found.boxes[sample, query].tolist()
    return top, left, bottom, right


def _canvas(canvas: Any) -> Canvas:
    if canvas in ("fixed", "batch"):
        return canvas  # type: ignore[no-any-return]
    if isinstance(canvas, str) or len(canvas) != 2:
        raise UsageError(f"canvas {canvas!r} is not known", remedy="'fixed', 'batch' or (height, width)")
    return int(canvas[0]), int(canvas[1])


def _fraction(value: float) -> float:
    if not 0.0 <= float(value) <= 1.0:
        raise UsageError(f"threshold {value!r} is no probability", remedy="a number from 0 to 1")
    return float(value)


def _size_step(config: Any) -> int:
    """What the sides of an input must be multiples of; 1 where any will do.

    RF-DETR's windows cut the patches into ``num_windows`` a side. RT-DETR and D-FINE put each map beside the
    coarser one, doubled, so the coarsest stride must divide the input.
    """
    own = getattr(config, "backbone_config", None)
    windows, patch = getattr(own, "num_windows", None), getattr(own, "patch_size", None)
    if isinstance(windows, int) and isinstance(patch, int):
        return windows * patch
    return max([1, *(int(stride) for stride in getattr(config, "feat_strides", None) or ())])
