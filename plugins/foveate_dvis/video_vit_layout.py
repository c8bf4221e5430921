"""Tokens of a video transformer: tubelets in rows, columns and frame cells, with a class token or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from foveate.errors import ModelError
from foveate.geometry import CellGrid
from foveate.interfaces import TokenAxis


@dataclass(frozen=True)
class ClipLayout:
    """What a configuration says: sizes in pixels and frames. ``prefix`` names the tokens before the patches.

    ``frames`` is 0 for a model that reads all frames of a clip, whatever their number.
    """

    image: tuple[int, int]
    patch: tuple[int, int]
    frames: int
    tubelet: int
    prefix: tuple[str, ...]
    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, config: Any, paths: Mapping[str, Any]) -> ClipLayout:
        """From a live configuration and a family's ``layout`` row. Raises ModelError for a missing field.

        ``tubelet`` may name a field of one number (frames) or of three (frames, height, width); ``registers`` a
        field that says how many register tokens follow the prefix.
        """
        tubelet = _field(config, paths["tubelet"]) if "tubelet" in paths else 1
        frames = paths.get("frames", "num_frames")
        registers = int(_field(config, paths["registers"])) if "registers" in paths else 0
        patch = tubelet[1:] if isinstance(tubelet, Sequence) else _field(config, paths.get("patch", "patch_size"))
        return cls(
            image=_two(_field(config, paths.get("image", "image_size"))),
            patch=_two(patch),
            frames=int(_field(config, frames) if frames else 0),
            tubelet=int(tubelet[0] if isinstance(tubelet, Sequence) else tubelet),
            prefix=(*paths.get("prefix", ()), *("register",) * registers),
            layers=int(_field(config, paths.get("layers", "num_hidden_layers"))),
            heads=int(_field(config, paths.get("heads", "num_attention_heads"))),
            width=int(_field(config, paths.get("width", "hidden_size"))),
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along y and x."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    def frame_cells(self, frames: int) -> tuple[int, ...]:
        """The frame cell of each input frame."""
        return tuple(i // self.tubelet for i in range(frames))

    def picture(self) -> TokenAxis:
        """Prefix and the patches of one frame cell, row by row, without a frame number."""
        rows, columns = self.grid
        patches = TokenAxis.patches(
            rows, columns, height=float(rows * self.patch[0]), width=float(columns * self.patch[1])
        )
        return TokenAxis.concat(*(TokenAxis.of_kind(kind, 1) for kind in self.prefix), patches)

    def tokens(self, frames: int) -> TokenAxis:
        """Prefix, then all patches of frame cell 0, of frame cell 1 and so on."""
        picture = self.picture()
        prefix, patches = (
            picture.take(range(len(self.prefix))),
            picture.take(range(len(self.prefix), len(picture))),
        )
        cells = [
            replace(patches, frame=np.full(len(patches), cell, np.int32)) for cell in range(frames // self.tubelet)
        ]
        return TokenAxis.concat(prefix, *cells)

    def cells(self) -> CellGrid:
        """The patches as cells of the input."""
        rows, columns = self.grid
        return CellGrid.regular(rows, columns, height=rows * self.patch[0], width=columns * self.patch[1])


def _field(config: Any, path: str) -> Any:
    value = config
    for name in path.split("."):
        if not hasattr(value, name):
            raise ModelError(
                f"{type(config).__name__} has no field {path!r}", remedy="correct layout in the family's row"
            )
        value = getattr(value, name)
    return value


def _two(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)
