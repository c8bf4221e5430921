"""The text tower of CLIP, SigLIP or SigLIP 2: attention between the tokens of a prompt.

A sample's prompt is its manifest column ``text``. The one differentiable tensor is the sequence of token
embeddings ``(sample, token, channel)``, which takes the place of the embedding layer's output while the
model runs its own forward. There is no picture: :meth:`TextSource.cells` says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from foveate.errors import SampleError, UsageError
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
    TargetRow,
    TokenAxis,
)
from foveate_vit.architecture import family_sites, text_tower
from foveate_vit.loading import Loaded, load_model
from foveate_vit.prompts import open_tokenizer, tokenise
from foveate_vit.vision import adapter_of

if TYPE_CHECKING:
    from torch import Tensor, nn

ENCODER, TOKENS, COLUMN = "text.encoder.self", "text.tokens", "text"


class TextSource(AttentionSource):
    """A text tower. Its target ``feature`` is the prompt's embedding against that of the empty prompt.

    Options of :meth:`open`: ``tokenizer``, ``architecture``, ``config`` and ``seed`` (random weights).
    """

    targets = ("feature",)

    def __init__(self, loaded: Loaded, family: Any, *, tokenizer: Any = None) -> None:
        self.card = loaded.card
        self._module: Any = loaded.model
        self.tower: Any
        self.tower, path = text_tower(loaded.model)
        sites = family_sites(family.sites, self.tower, path, "text.", family.layout)
        self.is_causal = str(self.tower.config.model_type).startswith("clip")
        self._sites = tuple(replace(site, masks=("causal",)) if self.is_causal else site for site in sites)
        self.tokenizer = tokenizer or open_tokenizer(loaded)
        self.length = int(self.tower.config.max_position_embeddings)

    @classmethod
    def open(  # type: ignore[override]
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        tokenizer: Any = None,
        architecture: str | None = None,
        config: Mapping[str, Any] | Path | str | None = None,
        seed: int = 0,
    ) -> TextSource:
        """Open a registry row. Raises ModelError, MissingDependencyError."""
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
        return cls(loaded, row.family, tokenizer=tokenizer)

    @property
    def module(self) -> nn.Module:
        """The model of transformers: the whole one where it has both towers."""
        module: nn.Module = self._module
        return module

    @property
    def sites(self) -> tuple[Site, ...]:
        """Self-attention of the text tower."""
        return self._sites

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Token embeddings of each sample's ``text``. Raises SampleError where there is none."""
        texts = [self._text_of(sample) for sample in samples]
        device = next(self._module.parameters()).device
        ids = tokenise(self.tokenizer, texts, self.length, device=device).view(-1, self.length)
        return self._batch(ids, tuple(sample.id for sample in samples))

    def _batch(self, ids: Tensor, names: tuple[str, ...]) -> Batch:
        with torch.no_grad():
            embedded = self._embedding_layer(ids)
        geometry = Geometry.identity(1, self.length)  # one row of tokens; there are no pixels
        return Batch(embedded, (geometry,) * len(names), names, per_sample={"input_ids": ids})

    def _text_of(self, sample: Sample) -> str:
        text = sample.columns.get(COLUMN)
        if not isinstance(text, str) or not text.strip():
            raise SampleError(
                f"sample {sample.id!r}: no text in column {COLUMN!r}",
                remedy=f"a text tower reads prompts: give a manifest with a column {COLUMN!r}",
            )
        return text

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """The model's own text call with ``batch.inputs`` as token embeddings: ``(sample, channel)``."""
        call = getattr(self._module, "get_text_features", self._module)
        with torch.set_grad_enabled(grad), self._given_embeddings(batch.inputs):
            outputs = call(input_ids=batch.per_sample["input_ids"])
        found: Tensor = outputs.text_embeds if hasattr(outputs, "text_embeds") else outputs.pooler_output
        return found

    @contextmanager
    def _given_embeddings(self, embeddings: Tensor) -> Iterator[None]:
        handle = self._embedding_layer.register_forward_hook(lambda *_: embeddings)
        try:
            yield
        finally:
            handle.remove()

    @property
    def _embedding_layer(self) -> nn.Module:
        layer: nn.Module = self.tower.embeddings.token_embedding
        return layer

    def predictions(self, outputs: Tensor, batch: Batch) -> list[list[Prediction]]:
        """None: a tower alone answers nothing."""
        return [[] for _ in batch.ids]

    def bind(self, outputs: Tensor, batch: Batch, target: Target) -> BoundTarget:
        """Freeze the direction from the empty prompt's embedding to each prompt's own."""
        if target.kind not in ("default", "feature") or target.label is not None:
            raise UsageError(f"{self.card.id}: a text tower has the target 'feature' only, without label")
        own = outputs.detach().float()
        empty = self._batch(tokenise(self.tokenizer, [""], self.length, device=outputs.device), ("",))
        blank = self.forward(empty).detach().float().expand_as(own)
        direction = torch.nn.functional.normalize(own - blank, dim=-1)
        rows = tuple(TargetRow(i, "feature", label="prompt against empty") for i in range(len(own)))
        return BoundTarget(rows, "value", {"direction": direction, "blank": blank})

    def score(self, outputs: Tensor, batch: Batch, bound: BoundTarget) -> Tensor:
        """Projection of each row's embedding, float32 ``(target,)``."""
        chosen = outputs.float()[[row.sample for row in bound.rows]]
        direction, blank = (bound.context[name].to(chosen) for name in ("direction", "blank"))
        return ((chosen - blank) * direction).sum(-1)

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        """Text tokens on both axes; ``batch.per_sample["input_ids"]`` says which words, sample by sample."""
        tokens = TokenAxis.of_kind("text", self.length)
        return CallLabels((("sample", len(batch)),), tokens, tokens)

    def readout(self, batch: Batch, outputs: Tensor, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The token that the tower's embedding is read from (see :meth:`end_positions`)."""
        samples = range(len(batch)) if bound is None else [row.sample for row in bound.rows]
        ends = self.end_positions(batch)
        one_hot = torch.eye(self.length, device=batch.inputs.device)[[ends[i] for i in samples]]
        return {ENCODER: Readout(one_hot, "end of text")}

    def fixed_readout(self, batch: Batch) -> Mapping[str, Readout]:
        """The same: it follows from the token ids."""
        return self.readout(batch, batch.inputs)

    def end_positions(self, batch: Batch) -> list[int]:
        """CLIP reads at the first end-of-text token (older configs: the largest id), SigLIP at the last token."""
        ids = batch.per_sample["input_ids"]
        if not self.is_causal:
            return [self.length - 1] * len(ids)
        end = int(self.tower.config.eos_token_id)
        found = ids if end == 2 else (ids == end).int()  # transformers keeps 2 for configs written before 4.31
        return [int(i) for i in found.argmax(-1)]

    def flow(self, batch: Batch, outputs: Tensor) -> list[Step]:
        """Layer after layer, each with its residual."""
        return [AttentionStep(CallKey(ENCODER, layer), TOKENS, TOKENS) for layer in self._sites[0].layers]

    def cells(self, batch: Batch) -> CellGrid:
        """Raises UsageError: words do not lie on a picture."""
        self._no_pixels()

    def facts(self) -> Mapping[str, Any]:
        """Shape of the live tower."""
        config = self.tower.config
        return {
            "architecture": type(self._module).__name__,
            "tokens": self.length,
            "layers": len(self._sites[0].layers),
            "heads": self._sites[0].heads,
            "width": int(config.hidden_size),
            "causal": self.is_causal,
        }

    def _no_pixels(self) -> NoReturn:
        raise UsageError(
            f"{self.card.id}: a text tower has tokens, not pixels, so there is no map on a picture",
            remedy="capture its attention and metrics, or open the image tower for maps",
        )
