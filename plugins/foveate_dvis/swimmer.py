"""The small video instance segmenter that ships with foveate, as an attention source: clips in, tracks out.

It reads six frames, evenly chosen, at 48 x 48 pixels whatever the clip's size, and answers for the whole clip at
once: one query is one track, so that identities are held by construction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

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
from foveate.pretrained.sites import find_sites
from foveate_dvis import swimmer_targets, videomt_tracks
from foveate_dvis.clip_preprocess import ClipRecipe, choose_frames
from foveate_dvis.swimmer_loading import OpenedSwimmer, open_swimmer
from foveate_dvis.swimmer_network import STRIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from foveate.geometry import Geometry
    from foveate_dvis.swimmer_network import Swimmer, SwimmerOutput
    from foveate_dvis.videomt_tracks import Tracks

TOKENS, QUERIES = "encoder.tokens", "decoder.queries"
ENCODER, CROSS, OWN = "encoder.self", "decoder.cross", "decoder.self"


class SwimmerSource(AttentionSource):
    """A swimmer with its preprocessing.

    Options of :meth:`open`: ``config`` and ``seed`` (random weights), ``threshold`` and ``max_objects`` (which
    tracks are answers, and what ``Target(object=None)`` means).
    """

    media = "clip"
    targets = swimmer_targets.KINDS

    def __init__(
        self, opened: OpenedSwimmer, family: Any, *, threshold: float = 0.5, max_objects: int = 20
    ) -> None:
        if not 0.0 <= threshold < 1.0:
            raise UsageError(f"threshold {threshold!r} is no probability", remedy="0 <= threshold < 1")
        self.card, self._model, self.config = opened.card, opened.model, opened.model.config
        self.threshold, self.max_objects = float(threshold), int(max_objects)
        self._sites = find_sites(family.sites, self._model)
        side = {"height": self.config.size, "width": self.config.size}
        self.recipe = ClipRecipe.read({"image_processor_type": "ViTImageProcessor", "size": side}, default="ViT")

    @classmethod
    def open(  # type: ignore[override]  # options are named, so that a wrong one is refused
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        threshold: float = 0.5,
        max_objects: int = 20,
    ) -> SwimmerSource:
        """Open a registry row; see the class. Raises ModelError, UsageError."""
        adapter = f"{cls.__module__}:{cls.__name__}"
        opened = open_swimmer(
            row, adapter=adapter, weights=weights, device=device, dtype=dtype, config=config, seed=seed
        )
        return cls(opened, row.family, threshold=threshold, max_objects=max_objects)

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The network, in eval mode."""
        module: nn.Module = self._model
        return module

    @property
    def model(self) -> Swimmer:
        """The same, by its own type."""
        return self._model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Cells of all frames among each other; queries to cells; queries among each other."""
        return self._sites

    @property
    def labels(self) -> list[str]:
        """Names of the classes by index; "no object" is none of them."""
        return list(self.config.classes)

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model, to be held against the registry's ``expect``."""
        config = self.config
        return {
            "architecture": "Swimmer",
            "image": [config.size, config.size],
            "frames": config.frames,
            "strides": [STRIDE],
            "grid": [config.cells, config.cells],
            "queries": config.queries,
            "classes": len(config.classes),
            "heads": config.heads,
            "layers": {site.id: len(site.layers) for site in self._sites},
            "parameters": sum(p.numel() for p in self._model.parameters()),
        }

    # ------------------------------------------------------------------------- clips in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Six frames of every clip, evenly chosen (repeated in shorter clips). Raises SampleError."""
        made = [self._encode_one(sample) for sample in samples]
        like = next(self._model.parameters())
        shape = (0, self.config.frames, 3, self.config.size, self.config.size)
        inputs = np.stack([values for values, _, _ in made]) if made else np.zeros(shape, np.float32)
        index = np.stack([index for _, _, index in made]) if made else np.zeros(shape[:2], np.int64)
        return Batch(
            inputs=torch.from_numpy(inputs).to(device=like.device, dtype=like.dtype),
            geometry=tuple(geometry for _, geometry, _ in made),
            ids=tuple(sample.id for sample in samples),
            per_sample={"frame_index": torch.from_numpy(index)},
        )

    def _encode_one(self, sample: Sample) -> tuple[NDArray[np.float32], Geometry, NDArray[np.int64]]:
        try:
            if sample.pixels.ndim != 4:
                self.recipe(sample.pixels)  # says what is wrong
            index = choose_frames(len(sample.pixels), self.config.frames)
            return (*self.recipe(sample.pixels[index]), index)
        except SampleError as error:
            raise SampleError(f"sample {sample.id!r}: {error.message}", remedy=error.remedy) from error

    def cells(self, batch: Batch) -> CellGrid:
        """The cells of a frame that the encoder's tokens lie on."""
        side = float(self.config.size)
        return CellGrid.regular(self.config.cells, self.config.cells, height=side, width=side)

    def stream(self, batch: Batch) -> str:
        """Cells of all frames."""
        return TOKENS

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> SwimmerOutput:
        """The network's own output."""
        with torch.set_grad_enabled(grad):
            outputs: SwimmerOutput = self._model(batch.inputs)
        return outputs

    def tracks(self, outputs: SwimmerOutput) -> Tracks:
        """Classes and masks by track."""
        return swimmer_targets.tracks_of(outputs)

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: SwimmerOutput, batch: Batch) -> list[list[Prediction]]:
        """Tracks surer than ``threshold``, surest first, with masks over the frames that were read."""
        return videomt_tracks.predictions(
            self.tracks(outputs), batch, self.labels, threshold=self.threshold, at_most=self.max_objects
        )

    def bind(self, outputs: SwimmerOutput, batch: Batch, target: Target) -> BoundTarget:
        """Rows for ``target.object`` (a query) or for every sure track; masks are frozen as they are now."""
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}; it has {', '.join(self.targets)}",
                remedy="use kind='class'",
            )
        found = self.tracks(outputs)
        limits = {"threshold": self.threshold, "at_most": self.max_objects}
        return swimmer_targets.bind(found, self.labels, target, kind, **limits)  # type: ignore[arg-type]

    def score(self, outputs: SwimmerOutput, batch: Batch, bound: BoundTarget) -> Tensor:
        """The track's class (probability or logit), or its mean mask logit over its frozen mask."""
        return swimmer_targets.score(self.tracks(outputs), bound)

    def identities(self, outputs: SwimmerOutput, bound: BoundTarget) -> swimmer_targets.Matched:
        """Which query says each bound shape in another run, and whether any does."""
        return swimmer_targets.match(self.tracks(outputs), bound)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: SwimmerOutput) -> CallLabels:
        """Cells by frame and place, queries by number: one track each."""
        cells, queries = self._cells(batch), self._queries()
        query = cells if call.site == ENCODER else queries
        return CallLabels((("sample", len(batch)),), query, queries if call.site == OWN else cells)

    def _cells(self, batch: Batch) -> TokenAxis:
        side, rows = float(self.config.size), self.config.cells
        picture = TokenAxis.patches(rows, rows, height=side, width=side)
        frames = (replace(picture, frame=np.full(len(picture), t, np.int32)) for t in range(self.config.frames))
        return TokenAxis.concat(*frames)

    def _queries(self) -> TokenAxis:
        count = self.config.queries
        return TokenAxis.of_kind("track", count, label=tuple(map(str, range(count))))

    def readout(
        self, batch: Batch, outputs: SwimmerOutput, bound: BoundTarget | None = None
    ) -> Mapping[str, Readout]:
        """Each target's own query, reading from the cells; without targets the query of the surest track."""
        found = self.tracks(outputs)
        if bound is None:
            query = found.probabilities.detach().amax(-1).argmax(-1)
        elif any(row.kind == swimmer_targets.MATCH for row in bound.rows):
            query = swimmer_targets.match(found, bound).query
        else:
            query = torch.tensor([int(row.object or 0) for row in bound.rows], dtype=torch.long)
        weights = F.one_hot(query, self.config.queries).float().to(batch.inputs.device)
        return {CROSS: Readout(weights, "track query")}

    def flow(self, batch: Batch, outputs: SwimmerOutput) -> list[Step]:
        """Encoder layers; then, decoder layer by layer, queries read from the cells and from each other."""
        layers = {site.id: site.layers for site in self._sites}
        steps: list[Step] = [AttentionStep(CallKey(ENCODER, n), TOKENS, TOKENS) for n in layers[ENCODER]]
        for n in layers[CROSS]:
            steps += [AttentionStep(CallKey(CROSS, n), QUERIES, TOKENS)]
            steps += [AttentionStep(CallKey(OWN, n), QUERIES, QUERIES)]
        return steps
