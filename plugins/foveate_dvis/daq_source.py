"""DVIS-DAQ (Zhou et al. 2024, arXiv:2404.00086) as an attention source: clips in, tracks out.

The network is our own (:mod:`foveate_dvis.daq`); it answers as the published code does. Samples of a batch run
one after the other, since each has its own tracks. Online the model reads a video in blocks of frames
(:attr:`AttentionSource.carries`); blocks should hold a multiple of ``facts()["window"]`` frames, and then answer
as the whole clip does. Offline the refiner needs the whole clip at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.errors import ModelError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import (
    AttentionSource,
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
)
from foveate_dvis import daq_targets
from foveate_dvis.daq.postprocess import answer
from foveate_dvis.daq_clips import DaqClips
from foveate_dvis.daq_encode import DaqRecipe
from foveate_dvis.daq_flow import daq_flow
from foveate_dvis.daq_opening import OpenedDaq, open_daq
from foveate_dvis.daq_readouts import daq_readouts
from foveate_dvis.daq_sites import (
    INSTANCES,
    PIXELS,
    ROWS,
    SLOT_INPUTS,
    SLOTS,
    STRIDES,
    daq_sites,
    label_call,
    level_sizes,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate.geometry import Geometry
    from foveate.temporal.trackers import Carried, Reach
    from foveate_dvis.daq.config import DaqConfig
    from foveate_dvis.daq.network import DvisDaq
    from foveate_dvis.daq.outputs import DaqOutputs

MAX_TRACKS = 200
"""Tracks of one video for which a stored run has room, where the option does not say otherwise."""


class DaqSource(AttentionSource):
    """DVIS-DAQ, online or offline.

    Options of :meth:`open`: ``config`` (a :class:`~foveate_dvis.daq.config.DaqConfig`, a mapping or a JSON file)
    or ``dataset`` (``ovis``, ``ytvis19``, ``ytvis21``: whose rules), ``mode`` (``online``, ``offline``), ``rule``
    (``ovis``: the slot gate takes part in keeping tracks; ``ytvis``: class scores alone), ``seed`` (random
    weights), ``upstream_exact``; ``shortest_edge`` (0 leaves frames at their size) and ``canvas`` (pad to
    (height, width)); ``threshold`` and ``max_objects`` (which instances ``Target(object=None)`` means);
    ``max_tracks`` (room for tracks in a stored run).
    """

    media = "clip"
    targets = daq_targets.KINDS

    def __init__(
        self,
        opened: OpenedDaq,
        *,
        shortest_edge: int | None = None,
        canvas: Sequence[int] | None = None,
        threshold: float = 0.3,
        max_objects: int = 10,
        max_tracks: int = MAX_TRACKS,
    ) -> None:
        self.card, self._model, self.config = opened.card, opened.model, opened.model.config
        self._sites = daq_sites(self.config)
        self.recipe = DaqRecipe.of(self.config, shortest_edge=shortest_edge, canvas=_pair(canvas))
        if not 0.0 <= threshold <= 1.0:
            raise UsageError(f"threshold {threshold!r} is no probability", remedy="a number from 0 to 1")
        self.threshold, self.max_objects, self.max_tracks = float(threshold), int(max_objects), int(max_tracks)
        self.carries = self.config.mode == "online"
        self.ignored: Mapping[str, str] = _IGNORED

    @classmethod
    def open(  # type: ignore[override]  # options are named, so that a wrong one is refused
        cls,
        row: Any,
        *,
        weights: Path | str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        config: DaqConfig | Mapping[str, Any] | Path | str | None = None,
        dataset: str = "ovis",
        mode: str | None = None,
        rule: str | None = None,
        seed: int = 0,
        upstream_exact: bool = False,
        shortest_edge: int | None = None,
        canvas: Sequence[int] | None = None,
        threshold: float = 0.3,
        max_objects: int = 10,
        max_tracks: int = MAX_TRACKS,
    ) -> DaqSource:
        """Open a registry row; see the class. Raises ModelError, UsageError, MissingDependencyError."""
        opened = open_daq(
            row,
            adapter=f"{cls.__module__}:{cls.__name__}",
            weights=weights,
            device=device,
            dtype=dtype,
            config=config,
            dataset=dataset,
            mode=mode,
            rule=rule,
            seed=seed,
            upstream_exact=upstream_exact,
        )
        return cls(
            opened,
            shortest_edge=shortest_edge,
            canvas=canvas,
            threshold=threshold,
            max_objects=max_objects,
            max_tracks=max_tracks,
        )

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The :class:`~foveate_dvis.daq.network.DvisDaq`, in eval mode."""
        return self._model

    @property
    def model(self) -> DvisDaq:
        """The same, by its own type."""
        return self._model

    @property
    def sites(self) -> tuple[Site, ...]:
        """Segmenter, tracker and, offline, refiner."""
        return self._sites

    @property
    def labels(self) -> list[str]:
        """Names of the classes by index; their numbers where the configuration names none."""
        return list(self.config.labels) or [f"class {i}" for i in range(self.config.num_classes)]

    def facts(self) -> Mapping[str, Any]:
        """What the live model is."""
        config = self.config
        return {
            "architecture": "DVIS-DAQ",
            "mode": config.mode,
            "rule": "ovis" if config.tracker.ovis_rule else "ytvis",
            "backbone": type(config.backbone).__name__.removesuffix("Config"),
            "image": f"short side {self.recipe.clip.frame.edge}" if self.recipe.clip.frame.edge else "as the clip",
            "strides": list(STRIDES),
            "window": config.window,
            "queries": config.num_queries,
            "slots": config.tracker.slots,
            "classes": config.num_classes,
            "heads": config.heads,
            "layers": {site.id: len(site.layers) for site in self._sites},
            "parameters": sum(p.numel() for p in self._model.parameters()),
        }

    def bounds(self, header: Mapping[str, Any]) -> Mapping[str, int]:
        """Room for rows, slots and instances: tracks come and go, and no clip has as many as another."""
        config = self.config
        tracks, slots = self.max_tracks, config.tracker.slots
        room = {ROWS: config.num_queries + tracks, SLOTS: slots + tracks, SLOT_INPUTS: slots + tracks}
        if config.refiner is not None:
            # Instances are the best tracks, filled up with linked queries to the number of new-instance rows.
            instances = max(config.refiner.top_tracks, config.num_new_ins)
            room |= {INSTANCES: instances, "track": instances}
        return room

    # ------------------------------------------------------------------------- clips in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """All frames of every clip. Raises SampleError naming the sample."""
        made = self.recipe(samples)
        like = next(self._model.parameters())
        return Batch(
            inputs=torch.from_numpy(made.inputs).to(device=like.device, dtype=like.dtype),
            geometry=made.geometry,
            ids=tuple(sample.id for sample in samples),
            per_sample={"frame_index": torch.from_numpy(made.frame_index)},
        )

    def cells(self, batch: Batch) -> CellGrid:
        """The cells of the finest map that is attended to, 8 pixels wide."""
        height, width = (float(side) for side in batch.inputs.shape[-2:])
        rows, columns = level_sizes(batch)[-1]
        return CellGrid.regular(rows, columns, height=height, width=width)

    def stream(self, batch: Batch) -> str:
        """Cells of all three feature maps, frame by frame."""
        return PIXELS

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> DaqClips:
        """Every clip in turn, from the state that ``batch.shared["state"]`` holds, if any."""
        states = batch.shared.get("state", {}).get("states", {})
        held = batch.shared.get("held", {})
        read = batch.per_sample["frame_index"] >= 0
        clips = []
        with torch.set_grad_enabled(grad):
            for i, name in enumerate(batch.ids):
                frames = batch.inputs[i, : int(read[i].sum())]
                clips.append(self._model(frames, state=states.get(name), held=held.get(name)))
        kept = tuple(name in held for name in batch.ids)
        config = self.config
        return DaqClips(tuple(clips), batch.ids, kept, config.num_queries, config.tracker.slots, config.window)

    def carry(self, outputs: DaqClips) -> Mapping[str, Any]:
        """The tracker's state after this block, by sample, for ``batch.shared["state"]``."""
        pairs = zip(outputs.ids, outputs.clips, strict=True)
        return {"states": {name: clip.state.detached() for name, clip in pairs}}

    def carried(self, batch: Batch) -> list[list[Carried]]:
        """See :class:`foveate.temporal.trackers.CarryingSource`."""
        from foveate_dvis import daq_carrying

        return daq_carrying.carried(self, batch)

    def reach(self, batch: Batch, *, untrained: bool = False) -> list[list[Reach]]:
        """See :class:`foveate.temporal.trackers.RecurrentSource`. Raises UsageError for an offline model."""
        from foveate_dvis import daq_carrying

        return daq_carrying.reach(self, batch, untrained=untrained)

    def hold(self, batch: Batch, outputs: DaqClips) -> Batch:
        """The batch with the decisions of ``outputs``: its forwards keep which rows are tracks."""
        held = dict(zip(outputs.ids, outputs.clips, strict=True))
        return replace(batch, shared={**batch.shared, "held": held})

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: DaqClips, batch: Batch) -> list[list[Prediction]]:
        """The best pairs of track and class, best first; a track may stand under several classes.

        Masks are bool (frame, y, x) over original pixels and the frames of this block.
        """
        pairs = zip(outputs.clips, batch.geometry, strict=True)
        return [self._answers(clip, geometry, batch.inputs.shape[-2:]) for clip, geometry in pairs]

    def _answers(self, clip: DaqOutputs, geometry: Geometry, size: Sequence[int]) -> list[Prediction]:
        original = (geometry.original_height, geometry.original_width)
        shown = (round(original[0] * geometry.scale_y), round(original[1] * geometry.scale_x))
        found = answer(
            clip.final_logits.detach().float(),
            clip.final_masks.detach().float(),
            max_num=self.config.max_num,
            padded=(int(size[0]), int(size[1])),
            shown=shown,
            original=original,
            upstream_exact=self._model.upstream_exact,
        )
        rows = zip(found.scores.tolist(), found.labels.tolist(), found.index.tolist(), strict=True)
        masks = found.masks.cpu().numpy()
        return [
            Prediction(
                self.labels[label],
                score,
                label,
                object=index,
                mask=masks[i],
                track=clip.final_names[index],
                extra=_life(clip, index),
            )
            for i, (score, label, index) in enumerate(rows)
        ]

    def bind(self, outputs: DaqClips, batch: Batch, target: Target) -> BoundTarget:
        """Freeze a target to instances; see :mod:`foveate_dvis.daq_targets`."""
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(
                f"{self.card.id}: no target kind {target.kind!r}", remedy=f"one of {', '.join(self.targets)}"
            )
        return daq_targets.bind(
            outputs, self.labels, target, kind, threshold=self.threshold, at_most=self.max_objects
        )

    def score(self, outputs: DaqClips, batch: Batch, bound: BoundTarget) -> Tensor:
        """One differentiable number a row; see :mod:`foveate_dvis.daq_targets`."""
        return daq_targets.score(outputs, bound).to(batch.inputs.device)

    def identities(self, outputs: DaqClips, bound: BoundTarget) -> list[daq_targets.Identity]:
        """What became of every bound instance in another run: kept or lost, how much its mask moved."""
        return daq_targets.identities(outputs, bound)

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: DaqClips) -> CallLabels:
        """Frames, rows and tracks of one call; see :mod:`foveate_dvis.daq_sites`."""
        return label_call(call, batch, outputs)

    def readout(self, batch: Batch, outputs: DaqClips, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """Each instance's own rows; without targets those of the best instance."""
        return daq_readouts(outputs, bound, offline=self.config.mode == "offline", device=batch.inputs.device)

    def flow(self, batch: Batch, outputs: DaqClips) -> list[Step]:
        """See :mod:`foveate_dvis.daq_flow`."""
        return daq_flow(self.config, self._sites, batch, outputs)


_IGNORED = {
    "segmenter.model.pixel_level_module.encoder.*": "a Swin backbone's attention within windows is not captured: "
    "what this source follows begins at the feature maps that the backbone makes",
    "tracker": "class probabilities, which decide which rows are tracks",
    "": "class probabilities, which order the tracks",
}


def _life(clip: DaqOutputs, index: int) -> dict[str, float | str]:
    """First and last frame of an instance's track, counted through the whole video."""
    if clip.refined is not None and clip.refined.linked[index]:
        return {"first_frame": 0, "last_frame": clip.frames.stop - 1}
    number = (clip.ids if clip.refined is None else clip.refined.ids)[index]
    track = next(track for track in clip.tracks if track.id == number)
    return {"first_frame": track.start, "last_frame": track.end - 1}


def _pair(canvas: Sequence[int] | None) -> tuple[int, int] | None:
    if canvas is None:
        return None
    sides = np.asarray(canvas)
    if sides.shape != (2,) or not np.issubdtype(sides.dtype, np.integer) or bool((sides < 1).any()):
        raise ModelError(f"canvas {canvas!r} is not known", remedy="(height, width) in pixels")
    return int(sides[0]), int(sides[1])
