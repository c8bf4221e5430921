"""Segmenters: object queries that answer with a class and a mask.

Mask2Former and OneFormer encode a pyramid with deformable attention and let the queries read one level a
decoder layer, each query only inside the mask that it predicted before (masked attention, Cheng et al. 2022,
arXiv:2112.01527, eq. 2). Each level is a site of its own (``decoder.cross.p5`` and so on, by the power of two of
its stride) because one softmax runs over one level. MaskFormer reads the backbone's last map, without masks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import ModelError
from foveate.interfaces import Batch, MergeStep, Site, Step, TokenAxis
from foveate_detr.detections import Detections
from foveate_detr.detector import CROSS, QUERIES, TOKENS, DetectorSource
from foveate_detr.pyramid import pyramid_tokens, sampled_levels

if TYPE_CHECKING:
    from torch import Tensor


class SegmenterSource(DetectorSource):
    """MaskFormer, and the common part of its successors; options as :class:`DetectorSource`."""

    def _has_boxes(self) -> bool:
        return False

    def _has_masks(self) -> bool:
        return True

    def _query_count(self) -> int:
        config = self._module.config
        return int(getattr(config, "num_queries", 0) or config.decoder_config.num_queries)

    def detections(self, outputs: Any, batch: Batch) -> Detections:
        """Class logits with "no object" last, and mask logits."""
        return Detections(outputs.class_queries_logits, "softmax", masks=outputs.masks_queries_logits)

    def _measure_levels(self, side: int) -> list[tuple[int, int]]:
        rows, columns = self.forward(self._blank(side)).encoder_last_hidden_state.shape[-2:]
        return [(int(rows), int(columns))]


class MaskedSegmenterSource(SegmenterSource):
    """Mask2Former: a deformable pyramid, and masked attention to one level a decoder layer."""

    divisor = 32

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sites = self._by_level()
        self._by_id = {site.id: site for site in self._sites}

    def _measure_levels(self, side: int) -> list[tuple[int, int]]:
        return sampled_levels(self, self._blank(side))

    # ------------------------------------------------------------------------- one site a level

    def _by_level(self) -> tuple[Site, ...]:
        """The declared sites, the decoder's cross-attention split by the level that each layer reads."""
        split: list[Site] = []
        for site in self._sites:
            split += self._split(site) if site.id == CROSS else [site]
        return tuple(split)

    def _split(self, site: Site) -> list[Site]:
        """Layer ``i`` reads level ``i mod levels``, coarsest first (Cheng et al. 2022, section 3.2.2)."""
        levels = len(self.strides)
        parts = []
        for level, name in enumerate(self._level_names()):
            modules = {path: layer for path, layer in site.modules.items() if layer % levels == level}
            if modules:
                parts.append(replace(site, id=f"{CROSS}.{name}", modules=modules, key=f"encoder.{name}"))
        return parts

    def _level_names(self) -> list[str]:
        return [f"p{round(math.log2(stride))}" for stride in self.strides]

    def _reading_site(self) -> str:
        """Where the last decoder layer reads."""
        cross = [site for site in self._sites if site.id.startswith(CROSS)]
        return max(cross, key=lambda site: site.layers[-1]).id

    # ------------------------------------------------------------------------- tokens and flow

    def _tokens(self, batch: Batch) -> TokenAxis:
        return pyramid_tokens(self.levels(batch), batch)

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        level = self._level_of(stream)
        if level is not None:
            return pyramid_tokens(self.levels(batch), batch, only=level)
        return super()._stream_tokens(stream, batch, outputs)

    def _level_of(self, stream: str) -> int | None:
        names = [f"encoder.{name}" for name in self._level_names()]
        return names.index(stream) if stream in names else None

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder layers, the levels taken apart, then the decoder layer by layer as the model runs it."""
        steps = super().flow(batch, outputs)
        first = next(i for i, step in enumerate(steps) if getattr(step, "query", None) == QUERIES)
        read = {site.key for site in self._sites if site.id.startswith(CROSS)}
        merges = [
            MergeStep(TOKENS, stream, selection(self.levels(batch), level, batch.inputs), "one level")
            for stream in sorted(read)
            if (level := self._level_of(stream)) is not None
        ]
        return [*steps[:first], *merges, *steps[first:]]


def selection(levels: Sequence[tuple[int, int]], level: int, like: Tensor) -> Tensor:
    """Rows of the identity that pick one level out of all, sparse (tokens of the level, all tokens)."""
    sizes = [rows * columns for rows, columns in levels]
    count, start = sizes[level], sum(sizes[:level])
    row = torch.arange(count, device=like.device)
    return torch.sparse_coo_tensor(
        torch.stack([row, row + start]),
        torch.ones(count, device=like.device),
        (count, sum(sizes)),
        check_invariants=True,
    )


class OneFormerSource(MaskedSegmenterSource):
    """OneFormer: as Mask2Former, with queries made from the picture and the task that is asked for.

    Option ``task``: ``panoptic``, ``instance`` or ``semantic``; ``task_inputs``: the token ids of "the task is
    {task}" for models without a tokenizer beside their weights.
    """

    options = (*MaskedSegmenterSource.options, "task", "task_inputs")

    def __init__(
        self, loaded: Any, family: Any, *, task: str = "panoptic", task_inputs: Any = None, **options: Any
    ) -> None:
        self._task = self._task_ids(loaded, task, task_inputs)
        super().__init__(loaded, family, **options)

    @staticmethod
    def _task_ids(loaded: Any, task: str, given: Any) -> Tensor:
        if given is not None:
            return torch.as_tensor(given, dtype=torch.long).reshape(1, -1)
        if task not in ("panoptic", "instance", "semantic"):
            raise ModelError(f"task {task!r} is not known", remedy="panoptic, instance or semantic")
        if loaded.beside is None:
            raise ModelError(
                "OneFormer without files beside its weights has no tokenizer for its task",
                remedy="give the token ids: task_inputs=[...]",
            )
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(loaded.beside)
        length = int(loaded.model.config.task_seq_len)
        text = f"the task is {task}"
        ids = tokenizer([text], padding="max_length", max_length=length, truncation=True)["input_ids"]
        return torch.as_tensor(ids, dtype=torch.long)

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {"pixel_mask": mask, "task_inputs": self._task.to(mask.device).expand(len(mask), -1)}

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        count = self._query_count()
        if stream == "query.tokens":  # the queries before the task token joins them
            return TokenAxis.of_kind("object", count - 1)
        if stream == QUERIES:  # the task token is an object query like the others
            return TokenAxis.of_kind("object", count, label=("",) * (count - 1) + ("task",))
        if stream == "mask.tokens":
            rows, columns = outputs.masks_queries_logits.shape[-2:]
            height, width = (float(size) for size in batch.inputs.shape[-2:])
            return TokenAxis.patches(int(rows), int(columns), height=height, width=width)
        return super()._stream_tokens(stream, batch, outputs)

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """As Mask2Former; the layers that make the queries lie beside the pyramid and are not followed."""
        followed = {"query.self", "query.cross"}
        return [s for s in super().flow(batch, outputs) if getattr(s, "call", (None,))[0] not in followed]


class EncoderSegmenterSource(SegmenterSource):
    """EoMT: a plain vision transformer; the queries join its tokens before the last blocks.

    Sites: ``encoder.self`` over cls, registers and patches, then ``decoder.self`` over queries and those.
    """

    joint = "joint.tokens"

    def __init__(self, loaded: Any, family: Any, **options: Any) -> None:
        super().__init__(loaded, family, **options)
        config = self._module.config
        first = int(config.num_hidden_layers) - int(config.num_blocks)
        (blocks,) = self._sites
        early = {path: layer for path, layer in blocks.modules.items() if layer < first}
        late = {path: layer for path, layer in blocks.modules.items() if layer >= first}
        joint = replace(blocks, id="decoder.self", modules=late, query=self.joint, key=self.joint)
        self._sites = (*((replace(blocks, modules=early, masks=()),) if early else ()), joint)
        self._by_id = {site.id: site for site in self._sites}

    def _per_sample(self, mask: Tensor) -> Mapping[str, Tensor]:
        return {}

    def _measure_levels(self, side: int) -> list[tuple[int, int]]:
        return [self._module.grid_size]

    @property
    def strides(self) -> tuple[float, ...]:
        """The patch."""
        return (float(self._module.config.patch_size),)

    def _recipe(self, loaded: Any, image_size: Any, canvas: Any) -> Any:
        """Positions are learned for one square, in which every image is fitted (the crops that the semantic
        checkpoints' processor makes would be several inputs of one image).
        """
        side = int(loaded.model.config.image_size)
        padded = super()._recipe(loaded, image_size, (side, side))
        if padded.recipe.exact is None:
            padded = replace(padded, recipe=replace(padded.recipe, edge=side, longest=side))
        return replace(padded, black=True)

    def _tokens(self, batch: Batch) -> TokenAxis:
        registers = int(self._module.config.num_register_tokens)
        prefix = [TokenAxis.of_kind("cls", 1), TokenAxis.of_kind("register", registers)]
        return TokenAxis.concat(*prefix, super()._tokens(batch))

    def _stream_tokens(self, stream: str, batch: Batch, outputs: Any) -> TokenAxis:
        if stream == self.joint:
            return TokenAxis.concat(TokenAxis.of_kind("object", self._query_count()), self._tokens(batch))
        return self._tokens(batch)

    def _reading_site(self) -> str:
        return "decoder.self"

    def _readout_width(self, found: Detections, batch: Batch) -> int:
        return self._query_count() + len(self._tokens(batch))

    def flow(self, batch: Batch, outputs: Any) -> list[Step]:
        """Encoder blocks, the queries put in front, then the joint blocks."""
        queries, tokens = self._query_count(), len(self._tokens(batch))
        joining = torch.cat([torch.zeros(queries, tokens), torch.eye(tokens)]).to(batch.inputs.device)
        early = [s for s in self._sites if s.id == "encoder.self"]
        late = [s for s in self._sites if s.id == "decoder.self"]
        merge = MergeStep(TOKENS, self.joint, joining, "queries put in front")
        return [*self._steps(early), merge, *self._steps(late)]
