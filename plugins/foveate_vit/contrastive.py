"""CLIP, StreetCLIP, SigLIP and SigLIP 2: images compared with the user's prompts.

``zero_shot`` is the softmax over all prompts (CLIP: Radford et al. 2021, section 3.1), the default once
prompts are given; ``match`` is SigLIP's own sigmoid of one image-text pair (Zhai et al. 2023, eq. 1), which
needs no other prompt. Both share the logits ``exp(scale) <image, text> + bias``. The vision tower alone,
or a model without prompts, has the target ``feature`` (see :mod:`foveate_vit.vision`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import UsageError
from foveate.interfaces import Batch, BoundTarget, Prediction, Sample, Target
from foveate_vit.choices import bind_choice, one_kind, score_choice, top_predictions
from foveate_vit.loading import Loaded, load_model
from foveate_vit.prompts import Prompts, embed, open_tokenizer, tokenise
from foveate_vit.vision import VisionSource, adapter_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ContrastiveOutputs:
    """The vision tower's output, and logits ``(sample, prompt)`` where there are prompts."""

    vision: Any
    logits: Tensor | None

    @property
    def pooler_output(self) -> Tensor | None:
        """The projected image embedding, ``(sample, channel)``, not normalised."""
        return self.vision.pooler_output  # type: ignore[no-any-return]

    @property
    def last_hidden_state(self) -> Tensor:
        """Tokens after the last layer, ``(sample, token, channel)``."""
        return self.vision.last_hidden_state  # type: ignore[no-any-return]


class ContrastiveSource(VisionSource):
    """An image-text model with its prompts.

    Options of :meth:`open` besides those of :class:`~foveate_vit.vision.VisionSource`: ``prompts`` (a list,
    or a file with one a line), ``template`` (for instance ``"a photo taken in {}"``), ``tokenizer``.
    """

    def __init__(
        self,
        loaded: Loaded,
        family: Any,
        *,
        image_size: int | Sequence[int] | None = None,
        prompts: Prompts | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__(loaded, family, image_size=image_size)
        self.prompts = prompts
        self._texts = self._embed_prompts(loaded, prompts, tokenizer) if prompts else None
        self.targets = self._target_kinds()

    @classmethod
    def open(
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        prompts: Sequence[str] | Path | str | None = None,
        template: str = "{}",
        tokenizer: Any = None,
        image_size: int | Sequence[int] | None = None,
        **options: Any,
    ) -> ContrastiveSource:
        """Open a registry row; see the class. Raises ModelError, UsageError, MissingDependencyError."""
        asked = Prompts.read(prompts, template) if prompts is not None else None
        loaded = load_model(row, adapter=adapter_of(cls), weights=weights, device=device, dtype=dtype, **options)
        return cls(loaded, row.family, image_size=image_size, prompts=asked, tokenizer=tokenizer)

    @property
    def has_text(self) -> bool:
        """Whether the text tower is there."""
        return hasattr(self._module, "text_model")

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """As :meth:`VisionSource.encode`; ``shared`` carries the unit prompt embeddings ``(prompt, channel)``."""
        batch = super().encode(samples)
        if self._texts is None:
            return batch
        return Batch(batch.inputs, batch.geometry, batch.ids, shared={"prompts": self._texts})

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The vision tower's own call (and its projection), then logits over the prompts."""
        with torch.set_grad_enabled(grad):
            if not self.has_text:
                return self._call(self._module, batch.inputs)
            vision = self._call(self._module.get_image_features, batch.inputs)
            return ContrastiveOutputs(vision, self._logits(vision.pooler_output, batch.shared.get("prompts")))

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """The best prompts by softmax over all of them; empty without prompts."""
        if self.prompts is None or self.is_classifier:
            return super().predictions(outputs, batch)
        return top_predictions(outputs.logits.detach().float().softmax(-1), self.prompts.labels)

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Freeze the winning (or named) prompt, or the embedding's direction away from blank."""
        kind = self._kind(target)
        if kind not in ("zero_shot", "match") or self.prompts is None:
            return super().bind(outputs, batch, target)
        if kind == "zero_shot" and target.scale == "probability" and len(self.prompts.labels) == 1:
            raise UsageError(
                "zero_shot: the softmax over one prompt is always 1",
                remedy="give at least two prompts, or scale='logit'",
            )
        return bind_choice(outputs.logits, self.prompts.labels, target, kind)

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """Softmax, sigmoid or logit of each row's prompt, float32 ``(target,)``."""
        if one_kind(bound) != "match":
            return super().score(outputs, batch, bound)
        logit = score_choice(outputs.logits, bound.at("logit" if bound.scale == "probability" else bound.scale))
        return logit.sigmoid() if bound.scale == "probability" else logit

    def _target_kinds(self) -> tuple[str, ...]:
        if self.is_classifier:
            return ("class",)
        if self.prompts is None:
            return ("feature",)
        return (
            ("zero_shot", "match", "feature") if hasattr(self._module, "logit_bias") else ("zero_shot", "feature")
        )

    def _remedy(self, kind: str) -> str:
        if kind in ("zero_shot", "match") and self.prompts is None:
            return "give prompts=[...] or --prompts FILE when opening the model"
        return super()._remedy(kind)

    def _logits(self, image: Tensor, texts: Tensor | None) -> Tensor | None:
        """``exp(scale) <image, text> + bias``, both unit length, ``(sample, prompt)``."""
        if texts is None:
            return None
        cosine = torch.nn.functional.normalize(image, dim=-1) @ texts.to(image).T
        scaled = cosine * self._module.logit_scale.exp()
        logits: Tensor = scaled + getattr(self._module, "logit_bias", 0.0)
        return logits

    def _embed_prompts(self, loaded: Loaded, prompts: Prompts, tokenizer: Any) -> Tensor:
        if not self.has_text:
            raise UsageError(
                f"{self.card.id}: {type(self._module).__name__} has no text tower, so prompts mean nothing to it",
                remedy="open the whole model (architecture='CLIPModel' or 'SiglipModel'), or give no prompts",
            )
        length = int(self._module.text_model.config.max_position_embeddings)
        device = next(self._module.parameters()).device
        ids = tokenise(tokenizer or open_tokenizer(loaded), prompts.texts, length, device=device)
        return embed(self._module, ids)

    def facts(self) -> Mapping[str, Any]:
        """As :meth:`VisionSource.facts`, with the number of prompts."""
        return {**super().facts(), "prompts": len(self.prompts.labels) if self.prompts else 0}
