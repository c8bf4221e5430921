"""SAM 2: one prompted object is followed through a clip by memory attention (Ravi et al. 2024, arXiv:2408.00714).

The object is prompted by points on the first frame. In every later frame the places of the frame read each other
(site ``memory.self``) and then a memory (``memory.cross``): features of earlier frames with the masks that were
predicted there, and the object pointers of these frames. Rows of ``memory.cross`` are places of the current frame,
its keys are places of earlier frames, labelled by frame: how old the memory is that a place reads.

Hiera's windows and the mask decoder's small attentions are named in the registry row and not captured. Memories
are made by convolutions of a frame's features and mask, which attention does not describe: the flow ends at them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from foveate.errors import SampleError, UsageError
from foveate.interfaces import (
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    OpaqueStep,
    Part,
    Place,
    Prediction,
    Readout,
    Sample,
    Step,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate.pretrained.choices import one_kind
from foveate_dvis.video_clips import ClipSource

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.pretrained.loading import Loaded

SELF, CROSS = "memory.self", "memory.cross"
PLACES, MEMORY = "frame.tokens", "memory.tokens"
OBJECT = 1
"""The id that the one object has in the model's session."""

Points = Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class Followed:
    """Logits of the object's pixels, ``masks (sample, frame, y, x)``, and of its ``presence (sample, frame)``."""

    masks: Tensor
    presence: Tensor


class Sam2VideoSource(ClipSource):
    """SAM 2 with one object, prompted on the first frame that is read.

    Options of :meth:`open`: ``points``, places ``[[x, y], ...]`` on the object, in pixels of the clip; a sample's
    own columns ``point_x`` and ``point_y`` overrule them; without either the middle of the frame is the prompt.
    ``frames`` (evenly chosen; default all), ``architecture``, ``config`` and ``seed`` as everywhere.

    The model's own forward runs without gradients (``torch.inference_mode``); here it runs below that decorator,
    which changes no number, so that gradients reach the pixels. Memories are kept in bfloat16, as the model does.
    """

    targets = ("mask", "presence")

    def __init__(
        self, loaded: Loaded, family: Any, *, frames: int | None = None, points: Points | None = None
    ) -> None:
        super().__init__(loaded, family, frames=frames)
        self._points = None if points is None else _pairs(points)
        self.ignored: Mapping[str, str] = dict(self._paths.get("ignored", {}))
        self._sites = tuple(
            replace(site, ragged=("key",) if site.id == CROSS else (), optional=True) for site in self._sites
        )

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
        points: Points | None = None,
    ) -> Sam2VideoSource:
        """Open a registry row; see the class. Raises ModelError, MissingDependencyError."""
        options = {"architecture": architecture, "config": config, "seed": seed, "frames": frames}
        opened: Sam2VideoSource = cls._opened(row, weights, device, dtype, options | {"points": points})
        return opened

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model."""
        config = self._module.config
        return {
            **super().facts(),
            "memories": config.num_maskmem,
            "pointers": config.max_object_pointers_in_encoder,
        }

    # ------------------------------------------------------------------------- clips and prompts in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Frames, and ``per_sample["points"]`` ``(sample, point, 2)``: x and y in pixels of the input.

        Raises SampleError naming the sample.
        """
        batch = super().encode(samples)
        found = [self._prompt(sample, i, batch) for i, sample in enumerate(samples)]
        if len({len(points) for points in found}) > 1:
            raise SampleError("clips of one batch have prompts of different length", remedy="one clip a batch")
        points = torch.tensor(found, dtype=torch.float32).reshape(len(samples), -1, 2)
        return replace(batch, per_sample={**batch.per_sample, "points": points.to(batch.inputs.device)})

    def _prompt(self, sample: Sample, position: int, batch: Batch) -> list[list[float]]:
        geometry = batch.geometry[position]
        height, width = geometry.original_height, geometry.original_width
        columns = sample.columns
        if "point_x" in columns and "point_y" in columns:
            own = [(_number(sample, "point_x"), _number(sample, "point_y"))]
        else:
            own = self._points or [(width / 2, height / 2)]
        outside = [point for point in own if not (0 <= point[0] <= width and 0 <= point[1] <= height)]
        if outside:
            raise SampleError(
                f"sample {sample.id!r}: prompt {outside[0]} (x, y) lies outside {width} x {height} pixels"
            )
        return [[x * geometry.scale_x, y * geometry.scale_y] for x, y in own]

    # ------------------------------------------------------------------------- the model's own call

    def forward(self, batch: Batch, *, grad: bool = False) -> Followed:
        """Clip by clip, each in a session of its own, frame after frame."""
        with torch.set_grad_enabled(grad):
            clips = [
                self._follow(clip, points)
                for clip, points in zip(batch.inputs, batch.per_sample["points"], strict=True)
            ]
        if not clips:
            return Followed(torch.zeros(0, 0, 1, 1), torch.zeros(0, 0))
        return Followed(torch.stack([masks for masks, _ in clips]), torch.stack([there for _, there in clips]))

    def _follow(self, clip: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        height, width = (int(side) for side in clip.shape[-2:])
        session = Sam2VideoInferenceSession(
            clip, height, width, clip.device, clip.device, clip.device, dtype=clip.dtype
        )
        labels = torch.ones(1, 1, len(points), dtype=torch.int32, device=clip.device)
        prompt = {"point_coords": points.to(clip)[None, None], "point_labels": labels}
        session.add_point_inputs(session.obj_id_to_idx(OBJECT), 0, prompt)
        session.obj_with_new_inputs = [OBJECT]
        run = type(self._module).forward.__wrapped__
        answers = [run(self._module, session, frame_idx=frame) for frame in range(len(clip))]
        masks = torch.stack([answer.pred_masks[0, 0] for answer in answers])
        return masks, torch.stack([answer.object_score_logits.reshape(()) for answer in answers])

    # ------------------------------------------------------------------------- answers

    def predictions(self, outputs: Followed, batch: Batch) -> list[list[Prediction]]:
        """The object with its masks over the frames that were read; the score is its mean presence."""
        answers = []
        for sample, geometry in enumerate(batch.geometry):
            size = (geometry.original_height, geometry.original_width)
            planes = outputs.masks[sample].detach().float()[:, None]
            large = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
            mask = np.asarray((large[:, 0] > 0).cpu().numpy(), dtype=np.bool_)
            frames = batch.per_sample["frame_index"][sample].tolist()
            shown = [frames[i] for i in np.flatnonzero(mask.any((1, 2)))]
            extra = {"first_frame": float(shown[0]), "last_frame": float(shown[-1])} if shown else {}
            score = float(outputs.presence[sample].detach().float().sigmoid().mean())
            answers.append([Prediction("object", score, object=0, mask=mask, track=str(OBJECT), extra=extra)])
        return answers

    def bind(self, outputs: Followed, batch: Batch, target: Target) -> BoundTarget:
        """``mask``: the object's pixels as they are now; ``presence``: that it is there. One row a sample.

        A clip in which the object has no pixel has no row of kind ``mask``. Raises UsageError for anything else.
        """
        kind = self.targets[0] if target.kind == "default" else target.kind
        if kind not in self.targets:
            raise UsageError(f"{self.card.id}: no target kind {kind!r}; it has {', '.join(self.targets)}")
        if target.object not in (None, 0) or target.label not in (None, "object"):
            raise UsageError(f"{self.card.id} follows one object (number 0), which has no class")
        frozen = outputs.masks.detach() > 0
        chosen = [i for i in range(len(batch)) if kind == "presence" or bool(frozen[i].any())]
        rows = tuple(TargetRow(i, kind, label="object", object=0) for i in chosen)
        return BoundTarget(rows, "value", {"mask": frozen[chosen]})

    def score(self, outputs: Followed, batch: Batch, bound: BoundTarget) -> Tensor:
        """The mean mask logit over the frozen pixels, or the mean presence logit over frames."""
        sample = [row.sample for row in bound.rows]
        if one_kind(bound) == "presence":
            return outputs.presence[sample].float().mean(1)
        frozen = bound.context["mask"].to(outputs.masks.device)
        return (outputs.masks[sample].float() * frozen).sum((1, 2, 3)) / frozen.sum((1, 2, 3))

    # ------------------------------------------------------------------------- attention

    def label(self, call: CallKey, batch: Batch, outputs: Any) -> CallLabels:
        """Places of one later frame; in ``memory.cross`` its keys are places and pointers of earlier frames."""
        frames = int(batch.inputs.shape[1])
        sample, frame = divmod(call.number, max(frames - 1, 1))
        at = {"sample": Part((sample,), len(batch)), "frame": Part((frame + 1,), frames)}
        places = self.layout.picture()
        leading = (("sample", 1),)
        if call.site == SELF:
            return CallLabels(leading, places, places, at=at)
        axis, index = self._memory(frames), self._read(frame + 1, frames)
        return CallLabels(leading, places, axis.take(index), at=at, key_place=Place(axis, tuple(index)))

    def _memory(self, frames: int) -> TokenAxis:
        """All that any frame could remember: the places of every frame, then every frame's object pointer."""
        places = self.layout.picture()
        cells = [replace(places, frame=np.full(len(places), f, np.int32)) for f in range(frames)]
        names = tuple(f"pointer of frame {f}" for f in range(frames) for _ in range(self._pointer))
        pointers = TokenAxis.of_kind("object", frames * self._pointer, label=names)
        own = np.repeat(np.arange(frames, dtype=np.int32), self._pointer)
        return TokenAxis.concat(*cells, replace(pointers, frame=own))

    @property
    def _pointer(self) -> int:
        """Tokens of one object pointer: it is cut to the width of the memory."""
        return max(int(self._module.hidden_dim) // int(self._module.mem_dim), 1)

    def _read(self, frame: int, frames: int) -> list[int]:
        """Positions on the memory's axis that a frame reads, in the model's order.

        The prompted frame first, then the ``num_maskmem - 1`` frames before, oldest first; then the pointers, that
        of the prompted frame and those of the frames before, latest first.
        """
        config, places = self._module.config, len(self.layout.picture())
        seen = [0, *(f for f in range(frame - int(config.num_maskmem) + 1, frame) if f > 0)]
        reach = min(frames, int(config.max_object_pointers_in_encoder))
        told = [0, *(f for f in range(frame - 1, frame - reach, -1) if f > 0)]
        spatial = [f * places + i for f in seen for i in range(places)]
        return [*spatial, *(frames * places + f * self._pointer + i for f in told for i in range(self._pointer))]

    def readout(self, batch: Batch, outputs: Followed, bound: BoundTarget | None = None) -> Mapping[str, Readout]:
        """The places that the object covers, in every frame after the first, by how much of them it covers."""
        frames = int(batch.inputs.shape[1])
        if frames < 2:
            return {}
        masks = outputs.masks.detach() > 0
        if bound is not None:
            masks = bound.context["mask"].to(masks.device)
        covered = F.adaptive_avg_pool2d(masks.flatten(0, 1)[:, None].float(), self.layout.grid).reshape(
            len(masks), frames, -1
        )
        covered[:, 0] = 0.0  # the prompted frame reads no memory
        total = covered.sum((1, 2), keepdim=True)
        return {CROSS: Readout(torch.where(total > 0, covered / total.clamp_min(1e-12), 0.0), "object's places")}

    def flow(self, batch: Batch, outputs: Followed) -> list[Step]:
        """Memories come from convolutions; then frame after frame its places read each other and the memory."""
        frames = int(batch.inputs.shape[1])
        steps: list[Step] = [OpaqueStep(MEMORY, "memory encoder")]
        for number in range(len(batch) * (frames - 1)):
            for layer in self._sites[0].layers:
                steps.append(AttentionStep(CallKey(SELF, layer, number), PLACES, PLACES))
                steps.append(AttentionStep(CallKey(CROSS, layer, number), PLACES, MEMORY))
        return steps

    def stream(self, batch: Batch) -> str:
        """The memory: what lies below it, attention does not describe."""
        return MEMORY


def _pairs(points: Points) -> list[tuple[float, float]]:
    try:
        return [(float(x), float(y)) for x, y in points]
    except (TypeError, ValueError) as error:
        raise UsageError(f"points {points!r}: expected [[x, y], ...] in pixels of the clip") from error


def _number(sample: Sample, name: str) -> float:
    try:
        return float(str(sample.columns[name]))
    except ValueError as error:
        raise SampleError(
            f"sample {sample.id!r}: column {name} is {sample.columns[name]!r}, not a number"
        ) from error
