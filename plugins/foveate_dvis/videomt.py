"""VidEoMT: video instance segmentation in a plain vision transformer (``VideomtForUniversalSegmentation``).

Its first blocks encode every frame by itself (site ``encoder.self``). Then the object queries join the tokens of
one frame after the other for the last blocks (site ``decoder.self``): in the first frame they are learned, later
they are what became of them in the frame before, passed through one linear layer. So a query is a track by its
number, and its attention row in each frame is where it looked there. Nothing else carries memory.

The flow is the model's: frames side by side, and between two frames the queries handed on. The learned part that
is added to them holds no information about the clip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from foveate.errors import UsageError
from foveate.interfaces import (
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    MergeStep,
    Part,
    Prediction,
    Readout,
    Site,
    Step,
    Target,
    TokenAxis,
)
from foveate.pretrained.choices import one_kind
from foveate_dvis import videomt_tracks as tracks
from foveate_dvis.video_clips import ClipSource
from foveate_dvis.videomt_tracks import Tracks

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from foveate.pretrained.loading import Loaded

ENCODER, DECODER = "encoder.self", "decoder.self"
TOKENS, JOINT = "encoder.tokens", "joint.tokens"


class VideomtSource(ClipSource):
    """VidEoMT with its preprocessing.

    Options of :meth:`open`: ``architecture``, ``config`` and ``seed`` as everywhere, ``frames`` (evenly chosen;
    default all of the clip), ``threshold`` and ``max_objects`` (which tracks are answers, and what
    ``Target(object=None)`` means).
    """

    targets = ("class", "mask")

    def __init__(
        self,
        loaded: Loaded,
        family: Any,
        *,
        frames: int | None = None,
        threshold: float = 0.5,
        max_objects: int = 20,
    ) -> None:
        super().__init__(loaded, family, frames=frames)
        if not 0.0 <= threshold < 1.0:
            raise UsageError(f"threshold {threshold} is not a probability", remedy="0 <= threshold < 1")
        self.threshold, self.max_objects = float(threshold), int(max_objects)
        self._sites = self._split()

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
        threshold: float = 0.5,
        max_objects: int = 20,
    ) -> VideomtSource:
        """Open a registry row; see the class. Raises ModelError, MissingDependencyError."""
        options = {"architecture": architecture, "config": config, "seed": seed, "frames": frames}
        chosen = {"threshold": threshold, "max_objects": max_objects}
        opened: VideomtSource = cls._opened(row, weights, device, dtype, options | chosen)
        return opened

    def _split(self) -> tuple[Site, ...]:
        """The blocks that see frames alone, and those that the queries join."""
        (blocks,) = self._sites
        config = self._module.config
        first = int(config.num_hidden_layers) - int(config.num_blocks)
        early = {path: layer for path, layer in blocks.modules.items() if layer < first}
        late = {path: layer for path, layer in blocks.modules.items() if layer >= first}
        summary = "queries (tracks) and the tokens of one frame; queries come from the frame before"
        joint = replace(blocks, id=DECODER, modules=late, query=JOINT, key=JOINT, summary=summary)
        return (*((replace(blocks, modules=early),) if early else ()), joint)

    @property
    def queries(self) -> int:
        """How many tracks there can be."""
        return int(self._module.config.num_queries)

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model."""
        return {**super().facts(), "queries": self.queries, "joint_layers": len(self._sites[-1].layers)}

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        """The model's own output: frame by frame, within a frame sample by sample."""
        with torch.set_grad_enabled(grad):
            return self._module(pixel_values_videos=batch.inputs)

    def tracks(self, outputs: Any, batch: Batch) -> Tracks:
        """Its answers by sample and frame."""
        shape = (int(batch.inputs.shape[1]), len(batch))
        logits, masks = (
            found.unflatten(0, shape).transpose(0, 1)
            for found in (outputs.class_queries_logits, outputs.masks_queries_logits)
        )
        return Tracks(logits, masks)

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        """Tracks surer than ``threshold``, surest first, with masks over the frames that were read."""
        return tracks.predictions(
            self.tracks(outputs, batch), batch, self._labels(), threshold=self.threshold, at_most=self.max_objects
        )

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        """Rows for ``target.object`` (a query) or for every sure track; masks are frozen as they are now."""
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}; it has {', '.join(self.targets)}",
                remedy="use kind='class'",
            )
        return tracks.bind(
            self.tracks(outputs, batch),
            self._labels(),
            replace(target, kind=kind),
            threshold=self.threshold,
            at_most=self.max_objects,
        )

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        """The track's class (probability or logit), or its mean mask logit over its frozen mask."""
        return tracks.score(self.tracks(outputs, batch), bound)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """Class token, registers and patches of a frame; in the last blocks the queries before them."""
        picture, frames = self.layout.picture(), int(batch.inputs.shape[1])
        samples = ("sample", len(batch))
        if call.site == ENCODER:
            return CallLabels((samples, ("frame", frames)), picture, picture)
        axis = TokenAxis.concat(self._queries(), picture)
        return CallLabels((samples,), axis, axis, at={"frame": Part((call.number,), frames)})

    def _queries(self) -> TokenAxis:
        return TokenAxis.of_kind("track", self.queries, label=tuple(map(str, range(self.queries))))

    def readout(self, batch: Batch, outputs: Any, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The track's own row in every frame; without targets that of the surest track.

        A class is read from all frames alike (its logit is their mean), a mask as its pixels lie in them.
        """
        found = self.tracks(outputs, batch)
        if bound is None:
            query = found.probabilities.detach().amax(-1).argmax(-1).tolist()
        else:
            query = [int(row.object or 0) for row in bound.rows]
        size = self.queries + len(self.layout.picture())
        row = F.one_hot(torch.tensor(query, dtype=torch.long), size).float().to(batch.inputs.device)
        if bound is not None and one_kind(bound) == "mask":
            row = tracks.shares(bound).to(row)[:, :, None] * row[:, None]
        return {DECODER: Readout(row, "track")}

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Blocks over single frames; then frame after frame the joint blocks, and the queries handed on."""
        frames, device = int(batch.inputs.shape[1]), batch.inputs.device
        late, tokens = self._sites[-1], len(self.layout.picture())
        size = self.queries + tokens
        steps: list[Step] = []
        for site in self._sites[:-1]:
            steps += [AttentionStep(CallKey(site.id, layer), TOKENS, TOKENS) for layer in site.layers]
            placed = _placed(frames, self.queries, tokens, device)
            steps.append(MergeStep(TOKENS, JOINT, placed, "queries in front"))
        for frame in range(frames):
            steps += [AttentionStep(CallKey(DECODER, layer, frame), JOINT, JOINT) for layer in late.layers]
            if frame + 1 < frames:
                handed = _handed_on(frames, size, self.queries, frame, device)
                steps.append(MergeStep(JOINT, JOINT, handed, f"queries go on to frame {frame + 1}"))
        return steps

    def stream(self, batch: Batch) -> str:
        """Tokens of all frames, before the queries join them."""
        return TOKENS if len(self._sites) > 1 else JOINT


def _placed(frames: int, queries: int, tokens: int, device: torch.device) -> Tensor:
    """Where a frame's tokens lie in the joint stream, sparse ``(frame * (query + token), frame * token)``."""
    column = np.arange(frames * tokens)
    row = (np.arange(frames)[:, None] * (queries + tokens) + queries + np.arange(tokens)).ravel()
    return _ones(row, column, (frames * (queries + tokens), frames * tokens), device)


def _handed_on(frames: int, size: int, queries: int, frame: int, device: torch.device) -> Tensor:
    """The identity, but the queries of frame ``frame + 1`` are those of ``frame``: sparse, square."""
    column = np.arange(frames * size)
    start = (frame + 1) * size
    column[start : start + queries] -= size
    return _ones(np.arange(frames * size), column, (frames * size, frames * size), device)


def _ones(
    row: NDArray[np.int64], column: NDArray[np.int64], shape: tuple[int, int], device: torch.device
) -> Tensor:
    index = torch.from_numpy(np.stack([row, column]))
    found = torch.sparse_coo_tensor(index, torch.ones(len(row)), shape, check_invariants=True, device=device)
    return found.coalesce()
