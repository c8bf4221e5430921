"""What sources of clips from the transformers library share: opening, frames in, cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.errors import ModelError, SampleError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import AttentionSource, Batch, Sample, Site
from foveate.pretrained.loading import Loaded, load_model
from foveate.pretrained.sites import find_sites
from foveate_dvis.clip_preprocess import ClipRecipe, choose_frames
from foveate_dvis.video_vit_layout import ClipLayout

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, nn

_LOADING = ("architecture", "config", "seed")


class ClipSource(AttentionSource):
    """A model of clips with its preprocessing; the frames that it reads are named in ``frame_index``.

    Options of :meth:`open`: ``architecture`` (a class of transformers), ``config`` and ``seed`` (random weights),
    ``frames`` (how many it reads, where the model takes any number) and those of the subclass.
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

    @classmethod
    def _opened(
        cls, row: Any, weights: Path | str | None, device: str, dtype: str, options: Mapping[str, Any]
    ) -> Any:
        """The source; ``options`` are those of loading and those of the constructor."""
        loaded = load_model(
            row,
            adapter=f"{cls.__module__}:{cls.__name__}",
            weights=weights,
            device=device,
            dtype=dtype,
            attention=row.family.layout.get("attention", "sdpa") or None,
            **{name: options[name] for name in _LOADING},
        )
        return cls(loaded, row.family, **{name: options[name] for name in options if name not in _LOADING})

    # ------------------------------------------------------------------------- what the model is

    @property
    def module(self) -> nn.Module:
        """The model of transformers, in eval mode."""
        module: nn.Module = self._module
        return module

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where it attends."""
        return self._sites

    def facts(self) -> Mapping[str, Any]:
        """Shapes of the live model, to be held against the registry's ``expect``."""
        return {
            "architecture": type(self._module).__name__,
            "image": _side(self.layout.image),
            "patch": _side(self.layout.patch),
            "grid": list(self.layout.grid),
            "frames": self.frames or "all",
            "tubelet": self.layout.tubelet,
            "prefix": len(self.layout.prefix),
            "layers": self.layout.layers,
            "heads": self.layout.heads,
            "width": self.layout.width,
            "parameters": sum(p.numel() for p in self._module.parameters()),
        }

    def _frame_count(self, wanted: int | None) -> int:
        """How many frames are read; 0 for all of a clip."""
        own, step = self.layout.frames, self.layout.tubelet
        if wanted is None or (own and wanted == own):
            return own
        if own and not self._paths.get("any_frames", False):
            raise UsageError(f"{self.card.id} takes {own} frames, not {wanted}", remedy="leave out frames=")
        if wanted < step or wanted % step:
            raise UsageError(f"{self.card.id}: frames={wanted} is no multiple of its tubelets of {step} frames")
        return wanted

    def _labels(self) -> list[str]:
        table = self._module.config.id2label
        return [str(table[i]) for i in sorted(table)]

    # ------------------------------------------------------------------------- clips in

    def encode(self, samples: Sequence[Sample]) -> Batch:
        """Evenly chosen frames (or all), preprocessed as the model's own processor does.

        Raises SampleError naming the sample, and for clips of several lengths where all frames are read.
        """
        made = [self._encode_one(sample) for sample in samples]
        lengths = {len(index) for _, _, index in made}
        if len(lengths) > 1:
            raise SampleError(
                f"{self.card.id} reads all frames, and clips of one batch have {sorted(lengths)} of them",
                remedy="one clip a batch, or open the model with frames=N",
            )
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

    def _encode_one(self, sample: Sample) -> tuple[Tensor, Geometry, NDArray[np.int64]]:
        try:
            if sample.pixels.ndim != 4:
                self.recipe(sample.pixels)  # says what is wrong
            have = len(sample.pixels)
            index = choose_frames(have, self.frames or have)
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

    def cells(self, batch: Batch) -> CellGrid:
        """The patches of a frame."""
        return self.layout.cells()

    def frame_cells(self, batch: Batch) -> tuple[int, ...]:
        """Frames of one tubelet share a cell."""
        return self.layout.frame_cells(int(batch.inputs.shape[1]))


def _side(pair: tuple[int, int]) -> int | list[int]:
    return pair[0] if pair[0] == pair[1] else list(pair)
