"""Video transformers with joint space-time attention: VideoMAE, ViViT and V-JEPA 2.

A clip becomes tubelets (a patch through two frames or so), every tubelet attends to every other, and the answer is
read from the class token (ViViT), the mean of all tokens (VideoMAE) or an attentive pooler (V-JEPA 2), which is a
site of its own. Families differ in what a registry row says. TimeSformer, whose attention is divided into time and
space, is :mod:`foveate_dvis.video_vit_divided`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.errors import ModelError, SampleError, UsageError
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
from foveate.pretrained.choices import bind_choice, one_kind, score_choice, top_predictions
from foveate.pretrained.features import bind_feature, score_feature
from foveate.pretrained.loading import Loaded, load_model
from foveate.pretrained.sites import find_sites
from foveate_dvis.clip_preprocess import ClipRecipe, choose_frames
from foveate_dvis.video_vit_layout import ClipLayout

if TYPE_CHECKING:
    from torch import Tensor, nn

TOKENS, PROBE = "clip.tokens", "pooler.query"
ENCODER, POOLER_SELF, POOLER = "encoder.self", "pooler.self", "pooler.cross"


class VideoSource(AttentionSource):
    """A video transformer of the transformers library with its preprocessing.

    Options of :meth:`open`: ``architecture`` (a class of transformers), ``config`` and ``seed`` (random weights),
    ``frames`` (how many frames the model takes, where it takes any number: V-JEPA 2). Frames are chosen evenly and
    named in ``Batch.per_sample["frame_index"]``.
    """

    media = "clip"

    def __init__(self, loaded: Loaded, family: Any, *, frames: int | None = None) -> None:
        self.card = loaded.card
        self._module: Any = loaded.model
        self._paths: Mapping[str, Any] = family.layout
        self.layout = ClipLayout.of(loaded.model.config, self._paths)
        self.frames = self._frame_count(frames)
        self._sites = find_sites(family.sites, loaded.model)
        self.recipe = self._recipe(loaded)
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
        frames: int | None = None,
    ) -> VideoSource:
        """Open a registry row; see the class. Raises ModelError, MissingDependencyError."""
        loaded = load_model(
            row,
            adapter=f"{cls.__module__}:{cls.__name__}",
            weights=weights,
            device=device,
            dtype=dtype,
            architecture=architecture,
            config=config,
            seed=seed,
            attention=row.family.layout.get("attention", "sdpa") or None,
        )
        return cls(loaded, row.family, frames=frames)

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The model of transformers, in eval mode."""
        module: nn.Module = self._module
        return module

    @property
    def sites(self) -> tuple[Site, ...]:
        """The encoder's self-attention over space and time, and the pooler's where there is one."""
        return self._sites

    @property
    def is_classifier(self) -> bool:
        """Whether the model answers with logits over ``config.id2label``."""
        return type(self._module).__name__.endswith("ForVideoClassification")

    @property
    def rule(self) -> str:
        """Where the answer is read from: cls, token mean, first token or pooling head."""
        if any(site.id == POOLER for site in self._sites):
            return "pooling head"
        if getattr(self._module.config, "use_mean_pooling", True) is False:
            return "first token"  # VideoMAE without mean pooling reads its first tubelet: it has no class token
        return str(self._paths.get("readout", "token mean"))

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model, to be held against the registry's ``expect``."""
        return {
            "architecture": type(self._module).__name__,
            "image": _side(self.layout.image),
            "patch": _side(self.layout.patch),
            "grid": list(self.layout.grid),
            "frames": self.frames,
            "tubelet": self.layout.tubelet,
            "prefix": len(self.layout.prefix),
            "layers": self.layout.layers,
            "heads": self.layout.heads,
            "width": self.layout.width,
            "readout": self.rule,
            "parameters": sum(p.numel() for p in self._module.parameters()),
        }

    def _frame_count(self, wanted: int | None) -> int:
        own, step = self.layout.frames, self.layout.tubelet
        if wanted is None or wanted == own:
            return own
        if not self._paths.get("any_frames", False):
            raise UsageError(f"{self.card.id} takes {own} frames, not {wanted}", remedy="leave out frames=")
        if wanted < step or wanted % step:
            raise UsageError(f"{self.card.id}: frames={wanted} is no multiple of its tubelets of {step} frames")
        return wanted

    # ------------------------------------------------------------------------- clips in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Evenly chosen frames, preprocessed as the model's own processor does.

        Raises SampleError naming the sample.
        """
        made = [self._encode_one(sample) for sample in samples]
        like = next(self._module.parameters())
        inputs = torch.stack([values for values, _, _ in made]) if made else self._no_clips()
        index = np.stack([index for _, _, index in made]) if made else np.zeros((0, self.frames), np.int64)
        return Batch(
            inputs=inputs.to(device=like.device, dtype=like.dtype),
            geometry=tuple(geometry for _, geometry, _ in made),
            ids=tuple(sample.id for sample in samples),
            per_sample={"frame_index": torch.from_numpy(index)},
        )

    def _no_clips(self) -> Tensor:
        return torch.zeros(0, self.frames, 3, *self.layout.image)

    def _encode_one(self, sample: Sample) -> tuple[Tensor, Geometry, np.ndarray[Any, np.dtype[np.int64]]]:
        try:
            if sample.pixels.ndim != 4:
                self.recipe(sample.pixels)  # says what is wrong
            index = choose_frames(len(sample.pixels), self.frames)
            values, geometry = self.recipe(sample.pixels[index])
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error.message}", remedy=error.remedy) from error
        return torch.from_numpy(values), geometry, index

    def _recipe(self, loaded: Loaded) -> ClipRecipe:
        names = ("video_preprocessor_config.json", "preprocessor_config.json")
        found = next((file for name in names if (file := loaded.side_file(name)) is not None), None)
        recipe = ClipRecipe.read(found, default=str(self._paths["processor"]))
        if found is None:
            note = f"no preprocessor_config.json: {recipe.processor} defaults"
            self.card = replace(self.card, notes=(*self.card.notes, note))
            return recipe.at(*self.layout.image)
        if recipe.output_size() != self.layout.image:
            raise ModelError(
                f"{self.card.id}: its processor makes frames of {recipe.output_size()} (height, width), "
                f"its configuration says {self.layout.image}",
                remedy="correct crop_size or size in preprocessor_config.json",
            )
        return recipe

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The model's own output. V-JEPA 2's predictor, which plays no part in an answer, is left out."""
        arguments: dict[str, Any] = {str(self._module.main_input_name): batch.inputs}
        if hasattr(self._module, "predictor"):
            arguments["skip_predictor"] = True
        with torch.set_grad_enabled(grad):
            return self._module(**arguments)

    def embedding(self, outputs: Any) -> Tensor:
        """The clip's embedding ``(sample, channel)``: pooled where the model pools, else as :attr:`rule` says."""
        pooled = getattr(outputs, "pooler_output", None)
        if pooled is not None:
            return pooled  # type: ignore[no-any-return]
        tokens = getattr(outputs, "last_hidden_state", None)
        if tokens is None:
            raise UsageError(f"{self.card.id}: {type(self._module).__name__} returns logits, not features")
        return tokens.mean(1) if self.rule == "token mean" else tokens[:, 0]  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """The best classes by softmax; empty lists for an encoder without a head."""
        if not self.is_classifier:
            return [[] for _ in batch.ids]
        return top_predictions(outputs.logits.detach().float().softmax(-1), self._labels())

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Freeze ``class`` (argmax, or the one named) or ``feature`` (the direction away from a blank clip)."""
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}; it has {', '.join(self.targets)}",
                remedy="only classifiers have 'class'" if kind == "class" else f"use kind={self.targets[0]!r}",
            )
        if target.object is not None:
            raise UsageError(f"{self.card.id}: answers about whole clips, so a target has no object")
        if kind == "class":
            return bind_choice(outputs.logits, self._labels(), target, kind)
        return bind_feature(self.embedding(outputs), self._blank(batch), label="clip against blank")

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """Probability or logit of each row's class, or its projection (which has one scale only)."""
        if one_kind(bound) == "feature":
            return score_feature(self.embedding(outputs), bound)
        return score_choice(outputs.logits, bound)

    def _blank(self, batch: Batch) -> Tensor:
        """Embedding of zeros, the training set's mean colour, in every frame: ``(1, channel)``."""
        if not len(batch):
            return torch.zeros(1, 1)
        return self.embedding(self.forward(batch.replace(torch.zeros_like(batch.inputs[:1]), [0])))

    def _labels(self) -> list[str]:
        table = self._module.config.id2label
        return [str(table[i]) for i in sorted(table)]

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """All tokens of the clip on both axes; the pooler's query alone on its query axis."""
        tokens, leading = self._tokens(batch), (("sample", len(batch)),)
        query = TokenAxis.of_kind("pool", 1) if call.site == POOLER else tokens
        return CallLabels(leading, query, tokens)

    def _tokens(self, batch: Batch) -> TokenAxis:
        return self.layout.tokens(int(batch.inputs.shape[1]))

    def readout(self, batch: Batch, outputs: Any, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The rule of the model for every row alike: every answer is read from one place."""
        return self._readout(batch, len(bound) if bound is not None else len(batch))

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The same: known before the forward."""
        return self._readout(batch, len(batch))

    def _readout(self, batch: Batch, rows: int) -> Mapping[str, Readout]:
        rule, device = self.rule, batch.inputs.device
        if rule == "pooling head":
            return {POOLER: Readout(torch.ones(rows, 1, device=device), rule)}
        tokens = len(self._tokens(batch))
        weights = torch.full((tokens,), 1 / tokens) if rule == "token mean" else torch.eye(tokens)[0]
        return {ENCODER: Readout(weights.to(device).expand(rows, -1), rule)}

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder and pooler layers with their residuals, then the pooler's query, which keeps nothing."""
        steps: list[Step] = []
        for site in self._sites:
            own = site.id != POOLER
            steps += [AttentionStep(CallKey(site.id, n), site.query, site.key, residual=own) for n in site.layers]
        return steps

    def stream(self, batch: Batch) -> str:
        """All tokens of the clip."""
        return TOKENS

    def cells(self, batch: Batch) -> CellGrid:
        """The patches of a frame."""
        return self.layout.cells()

    def frame_cells(self, batch: Batch) -> tuple[int, ...]:
        """Frames of one tubelet share a cell."""
        return self.layout.frame_cells(int(batch.inputs.shape[1]))


def _side(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)
