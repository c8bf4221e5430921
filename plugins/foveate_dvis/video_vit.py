"""Video transformers with joint space-time attention: VideoMAE, ViViT and V-JEPA 2.

A clip becomes tubelets (a patch through two frames or so), every tubelet attends to every other, and the answer is
read from the class token (ViViT), the mean of all tokens (VideoMAE) or an attentive pooler (V-JEPA 2), which is a
site of its own. Families differ in what a registry row says. TimeSformer, whose attention is divided into time and
space, is :mod:`foveate_dvis.video_vit_divided`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import UsageError
from foveate.interfaces import (
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Prediction,
    Readout,
    Step,
    Target,
    TokenAxis,
)
from foveate.pretrained.choices import bind_choice, one_kind, score_choice, top_predictions
from foveate.pretrained.features import bind_feature, score_feature
from foveate_dvis.video_clips import ClipSource

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.pretrained.loading import Loaded

TOKENS = "clip.tokens"
ENCODER, POOLER = "encoder.self", "pooler.cross"


class VideoSource(ClipSource):
    """A video transformer of the transformers library with its preprocessing.

    Options of :meth:`open`: ``architecture`` (a class of transformers), ``config`` and ``seed`` (random weights),
    ``frames`` (how many frames the model takes, where it takes any number: V-JEPA 2). Frames are chosen evenly.
    """

    def __init__(self, loaded: Loaded, family: Any, *, frames: int | None = None) -> None:
        super().__init__(loaded, family, frames=frames)
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
        options = {"architecture": architecture, "config": config, "seed": seed, "frames": frames}
        opened: VideoSource = cls._opened(row, weights, device, dtype, options)
        return opened

    # ------------------------------------------------------------------------- what the model is

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
        """Shapes of the live model, and where the answer is read from."""
        return {**super().facts(), "readout": self.rule}

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
