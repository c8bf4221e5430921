"""Grounding DINO: an open-vocabulary detector that reads words and pictures together.

All prompts form one text, "a cat. a dog."; every object query scores every token, and the score of a prompt
is the largest among its tokens, as in the authors' post-processing. In the decoder the queries read the words
(``decoder.text``) and then sample the pyramid (``decoder.cross``).

The encoder also exchanges information between words and picture in both directions, with two softmaxes in one
module (``encoder.words``, ``encoder.picture``). They are captured; sweeps stop there and say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import UsageError
from foveate.interfaces import Batch, OpaqueStep, Step, TokenAxis
from foveate_detr.detections import Detections, boxes_to_original
from foveate_detr.detector import TOKENS
from foveate_detr.prompts import phrase_ids, read_prompts
from foveate_detr.pyramid import PyramidSource

if TYPE_CHECKING:
    from torch import Tensor

TEXT = "text.tokens"
EXCHANGE = ("encoder.words", "encoder.picture")
"""Sites of the encoder's fusion layers: one module, two softmaxes of one product of words and picture."""


class GroundedSource(PyramidSource):
    """Grounding DINO.

    Options: those of :class:`~foveate_detr.detector.DetectorSource`, ``prompts`` (a list, or a file with one a
    line) and ``prompt_ids`` (token ids of each prompt, for models without a tokenizer beside their weights).
    """

    options = (*PyramidSource.options, "prompts", "prompt_ids")

    def __init__(
        self,
        loaded: Any,
        family: Any,
        *,
        prompts: Sequence[str] | Path | str | None = None,
        prompt_ids: Sequence[Sequence[int]] | None = None,
        **options: Any,
    ) -> None:
        self._prompts = read_prompts(prompts)
        self._ids, self._spans, self._words = phrase_ids(loaded, self._prompts, prompt_ids)
        if len(self._ids) > int(loaded.model.config.max_text_len):
            raise UsageError(
                f"prompts take {len(self._ids)} tokens, the model reads {loaded.model.config.max_text_len}",
                remedy="give fewer or shorter prompts",
            )
        super().__init__(loaded, family, **options)

    @property
    def labels(self) -> list[str]:
        """The prompts."""
        return list(self._prompts)

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        ids = torch.tensor(self._ids, device=mask.device).expand(len(mask), -1)
        return {"pixel_mask": mask, "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def detections(self, outputs: Any, batch: Batch) -> Detections:
        """Scores of prompts, each the largest of its tokens."""
        logits = torch.stack([outputs.logits[..., span].amax(-1) for span in self._spans], -1)
        return Detections(logits, "sigmoid", boxes_to_original(outputs.pred_boxes, batch.geometry, "image"))

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        if stream == TEXT:
            return TokenAxis.of_kind("text", len(self._ids), label=self._words)
        return super()._stream_tokens(stream, batch, outputs)

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """The text's own layers; then each encoder layer after its exchange of words and picture; the decoder.

        The exchange is captured, but no sweep goes through it: both streams read each other's state at the same
        time, for which neither rollout nor the rules of Chefer et al. for one reading stream say anything.
        """
        steps: list[Step] = []
        for step in super().flow(batch, outputs):
            call = getattr(step, "call", None)
            if call is not None and call.site in EXCHANGE:
                stream = TOKENS if call.site == "encoder.picture" else TEXT
                steps.append(OpaqueStep(stream, "words and picture exchange information"))
            else:
                steps.append(step)
        return steps
