"""One source for the vision transformers of the transformers library: classifiers and plain encoders.

ViT, DeiT, DINOv2 (with and without registers) and DINOv3 differ in module names, prefix tokens and
readout; all of that is a registry row. What is left is the model's own call and two kinds of target:
``class`` for classifiers, and ``feature`` (:mod:`foveate.pretrained.features`) for encoders without a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import SampleError, UsageError
from foveate.geometry import CellGrid
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
from foveate.pretrained.features import bind_feature, score_feature
from foveate_vit.architecture import Layout, family_sites, vision_tower
from foveate_vit.choices import bind_choice, score_choice, top_predictions
from foveate_vit.loading import Loaded, load_model
from foveate_vit.preprocess import Recipe
from foveate_vit.readouts import weights_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODER, POOL = "vision.encoder.self", "vision.pool"
TOKENS, PROBE = "vision.tokens", "vision.probe"


class VisionSource(AttentionSource):
    """A vision transformer with its preprocessing; see the module docstring for its targets.

    Options of :meth:`open`: ``architecture`` (class of transformers), ``config`` and ``seed`` (random
    weights), ``image_size`` (pixels, or (height, width): another input size than the model's files say).
    """

    def __init__(self, loaded: Loaded, family: Any, *, image_size: int | Sequence[int] | None = None) -> None:
        self.card = loaded.card
        self._module: Any = loaded.model
        self._paths: Mapping[str, Any] = family.layout
        self.tower: Any
        self.tower, self._tower_path = vision_tower(loaded.model)
        self.layout = Layout.of(self.tower.config, self._paths)
        self._sites = family_sites(family.sites, self.tower, self._tower_path, "vision.", self._paths)
        self.recipe = self._recipe(loaded, image_size)
        self.targets: tuple[str, ...] = ("class",) if self.is_classifier else ("feature",)

    @classmethod
    def open(  # type: ignore[override]  # options are named, so that a wrong one is refused
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        architecture: str | None = None,
        config: Mapping[str, Any] | Path | str | None = None,
        seed: int = 0,
        image_size: int | Sequence[int] | None = None,
    ) -> VisionSource:
        """Open a registry row; see the class. Raises ModelError, MissingDependencyError."""
        loaded = load_model(
            row,
            adapter=adapter_of(cls),
            weights=weights,
            device=device,
            dtype=dtype,
            architecture=architecture,
            config=config,
            seed=seed,
        )
        return cls(loaded, row.family, image_size=image_size)

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The model of transformers, in eval mode."""
        module: nn.Module = self._module
        return module

    @property
    def sites(self) -> tuple[Site, ...]:
        """Encoder self-attention, and the attention-pooling head where there is one."""
        return self._sites

    @property
    def is_classifier(self) -> bool:
        """Whether the model answers with logits over ``config.id2label``."""
        return type(self._module).__name__.endswith(
            ("ForImageClassification", "ForImageClassificationWithTeacher")
        )

    @property
    def rule(self) -> str:
        """Where the answer is read from; a word of :data:`foveate_vit.readouts.RULES`."""
        by_class = dict(self._paths.get("readouts", {}))
        rule = str(by_class.get(type(self._module).__name__, self._paths.get("readout", "cls")))
        if rule == "pooling head" and not any(site.id == POOL for site in self._sites):
            return "token mean"  # a SigLIP without its head
        return rule

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model on its own input size, to be held against the registry's ``expect``."""
        height, width = self.recipe.output_size() or self.layout.image
        return {
            "architecture": type(self._module).__name__,
            "image": _side((height, width)),
            "patch": _side(self.layout.patch),
            "grid": list(self.layout.grid(height, width)),
            "prefix": len(self.layout.prefix),
            "registers": self.layout.prefix.count("register"),
            "layers": self.layout.layers,
            "heads": self.layout.heads,
            "width": self.layout.width,
            "readout": self.rule,
            "parameters": sum(p.numel() for p in self._module.parameters()),
        }

    # ------------------------------------------------------------------------- images in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Preprocess images as the model's own processor does. Raises SampleError naming the sample."""
        pairs = [self._encode_one(sample) for sample in samples]
        like = next(self._module.parameters())
        size = self.recipe.output_size() or self.layout.image
        inputs = torch.stack([p for p, _ in pairs]) if pairs else torch.zeros(0, 3, *size)
        return Batch(
            inputs=inputs.to(device=like.device, dtype=like.dtype),
            geometry=tuple(geometry for _, geometry in pairs),
            ids=tuple(sample.id for sample in samples),
        )

    def _encode_one(self, sample: Sample) -> tuple[Tensor, Any]:
        try:
            values, geometry = self.recipe(sample.pixels)
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error.message}", remedy=error.remedy) from error
        return torch.from_numpy(values), geometry

    def _recipe(self, loaded: Loaded, image_size: int | Sequence[int] | None) -> Recipe:
        found = loaded.side_file("preprocessor_config.json")
        if found is None:  # transformers 5 may keep it inside processor_config.json
            found = (loaded.side_file("processor_config.json") or {}).get("image_processor")
        recipe = Recipe.read(found, default=str(self._paths.get("processor", "ViTImageProcessor")))
        if image_size is not None:
            height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
            return recipe.at(height, width)
        if found is None:
            self.card = replace(
                self.card, notes=(*self.card.notes, f"no preprocessor_config.json: {recipe.processor} defaults")
            )
            return recipe.at(*self.layout.image)
        return recipe

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The model's own output for ``batch.inputs``."""
        with torch.set_grad_enabled(grad):
            return self._call(self._module, batch.inputs)

    def _call(self, module: Any, pixels: Tensor) -> Any:
        arguments: dict[str, Any] = {"pixel_values": pixels}
        if self._must_interpolate(pixels):
            arguments["interpolate_pos_encoding"] = True
        return module(**arguments)

    def _must_interpolate(self, pixels: Tensor) -> bool:
        """Whether positions must be resampled; DINOv2 and DINOv3 do it unasked and take no such argument."""
        return tuple(pixels.shape[-2:]) != self.layout.image and (
            "interpolate_pos_encoding" in signature(self.tower.forward).parameters
        )

    def embedding(self, outputs: Any) -> Tensor:
        """The image's embedding, ``(sample, channel)``: pooled where the family pools, else the class token."""
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None and self._paths.get("feature", "pooled") == "pooled":
            return pooled  # type: ignore[no-any-return]
        tokens = getattr(outputs, "last_hidden_state", None)
        if tokens is None:
            raise UsageError(
                f"{self.card.id}: {type(self._module).__name__} returns logits, not features",
                remedy="use kind='class', or open the encoder alone with architecture=...",
            )
        return tokens.mean(1) if self.rule == "token mean" else tokens[:, 0]  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """The best classes by softmax; empty lists for an encoder without a head."""
        if not self.is_classifier:
            return [[] for _ in batch.ids]
        return top_predictions(outputs.logits.detach().float().softmax(-1), self._labels())

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Freeze ``class`` (argmax, or the one named) or ``feature`` (the direction away from blank)."""
        kind = self._kind(target)
        if kind == "class":
            return bind_choice(outputs.logits, self._labels(), target, kind)
        return self._bind_feature(outputs, batch)

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's class, or its projection (which has one scale only)."""
        if bound.rows and bound.rows[0].kind == "feature":
            return score_feature(self.embedding(outputs), bound)
        return score_choice(outputs.logits, bound)

    def _kind(self, target: Target) -> str:
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}; it has {', '.join(self.targets)}",
                remedy=self._remedy(kind),
            )
        if target.object is not None:
            raise UsageError(f"{self.card.id}: answers about whole images, so a target has no object")
        return kind

    def _remedy(self, kind: str) -> str:
        return "only classifiers have 'class'" if kind == "class" else f"use kind={self.targets[0]!r}"

    def _bind_feature(self, outputs: Any, batch: Batch) -> BoundTarget:
        blank = self._blank_embedding(batch)
        return bind_feature(self.embedding(outputs), blank, label="image against blank")

    def _blank_embedding(self, batch: Batch) -> Tensor:
        """Embedding of an input of zeros, which is the training set's mean colour, ``(1, channel)``."""
        if not len(batch):
            return torch.zeros(1, 1)
        blank = batch.replace(torch.zeros_like(batch.inputs[:1]), [0])
        return self.embedding(self.forward(blank)).detach().float()

    def _labels(self) -> list[str]:
        table = self._module.config.id2label
        return [str(table[i]) for i in sorted(table)]

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """Prefix tokens and patches on both axes; the probe on the pooling head's query axis."""
        leading = (("sample", len(batch)),)
        tokens = self._tokens(batch)
        if call.site == POOL:
            return CallLabels(leading, TokenAxis.of_kind("pool", 1), tokens)
        return CallLabels(leading, tokens, tokens)

    def readout(self, batch: Batch, outputs: Any, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The rule of the family for every row alike: these models read every answer from one place."""
        return self._readout(batch, len(bound) if bound is not None else len(batch))

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The same: known before the forward."""
        return self._readout(batch, len(batch))

    def _readout(self, batch: Batch, rows: int) -> Mapping[str, Readout]:
        if self.rule == "pooling head":
            return {POOL: Readout(torch.ones(rows, 1, device=batch.inputs.device), self.rule)}
        weights = weights_of(self.rule, prefix=self.layout.prefix, tokens=len(self._tokens(batch)))
        return {ENCODER: Readout(weights.to(batch.inputs.device).expand(rows, -1), self.rule)}

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder layers with their residuals, then the pooling head, which keeps nothing of its probe."""
        encoder = next(site for site in self._sites if site.id == ENCODER)
        steps: list[Step] = [AttentionStep(CallKey(ENCODER, n), TOKENS, TOKENS) for n in encoder.layers]
        if self.rule == "pooling head":
            steps.append(AttentionStep(CallKey(POOL, 0), PROBE, TOKENS, residual=False))
        return steps

    def cells(self, batch: Batch) -> CellGrid:
        """The patches; a rim narrower than a patch is not seen by the model and belongs to no cell."""
        return self.layout.cells(*self._grid(batch))

    def _grid(self, batch: Batch) -> tuple[int, int]:
        return self.layout.grid(*batch.inputs.shape[-2:])

    def _tokens(self, batch: Batch) -> TokenAxis:
        return self.layout.tokens(*self._grid(batch))


def _side(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)


def adapter_of(cls: type) -> str:
    """How a model card names its adapter."""
    return f"{cls.__module__}:{cls.__name__}"
