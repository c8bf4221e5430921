"""What a live transformer looks like: its tower, its tokens and its attention modules.

All of it is read from the module and its configuration; a registry row says only *where* to look (config
paths and module patterns), so that a new transformers-style model needs a row and no code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError
from foveate.geometry import CellGrid
from foveate.interfaces import Site, TokenAxis

if TYPE_CHECKING:
    from torch import nn

_PREFIX_KINDS = {"cls": "cls", "distillation": "cls", "register": "register"}
"""Word in ``layout.prefix`` -> token kind. DeiT's distillation token is a second class token."""


@dataclass(frozen=True)
class Layout:
    """Token layout of one tower: ``prefix`` names the tokens before the patches, in order."""

    image: tuple[int, int]
    patch: tuple[int, int]
    prefix: tuple[str, ...]
    layers: int
    heads: int
    width: int

    @classmethod
    def of(cls, config: Any, paths: Mapping[str, Any]) -> Layout:
        """From a live configuration and a family's ``layout`` row. Raises ModelError for a missing field."""
        registers = paths.get("registers")
        count = int(_field(config, registers) or 0) if registers else 0
        return cls(
            image=_two(_field(config, paths.get("image", "image_size"))),
            patch=_two(_field(config, paths.get("patch", "patch_size"))),
            prefix=(*paths.get("prefix", ()), *("register",) * count),
            layers=int(_field(config, paths.get("layers", "num_hidden_layers"))),
            heads=int(_field(config, paths.get("heads", "num_attention_heads"))),
            width=int(_field(config, paths.get("width", "hidden_size"))),
        )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Patches along y and x of an input; pixels beyond the last whole patch are not seen."""
        return height // self.patch[0], width // self.patch[1]

    def tokens(self, rows: int, columns: int) -> TokenAxis:
        """The token axis: prefix tokens, then patches row by row."""
        patches = TokenAxis.patches(
            rows, columns, height=float(rows * self.patch[0]), width=float(columns * self.patch[1])
        )
        if not self.prefix:
            return patches
        # only a second token of one kind needs a name to be told apart
        named = len({_PREFIX_KINDS[w] for w in self.prefix if w != "register"}) < sum(
            w != "register" for w in self.prefix
        )
        parts = [TokenAxis.of_kind(_PREFIX_KINDS[w], 1, label=(w,) if named else None) for w in self.prefix]
        return TokenAxis.concat(*parts, patches)

    def cells(self, rows: int, columns: int) -> CellGrid:
        """The patches as cells of the input."""
        return CellGrid.regular(rows, columns, height=rows * self.patch[0], width=columns * self.patch[1])


def vision_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The image encoder inside ``model`` and its module path ("" where the model is the encoder)."""
    return _tower(model, "vision_model")


def text_tower(model: nn.Module) -> tuple[nn.Module, str]:
    """The text encoder inside ``model`` and its module path."""
    return _tower(model, "text_model")


def _tower(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    base = getattr(model, "base_model", model)
    if not hasattr(base, name) and not hasattr(base, "embeddings"):
        base = model  # DINOv3 calls its bare encoder the base model
    found = getattr(base, name, base)
    path = next(path for path, module in model.named_modules() if module is found)
    return found, path


def family_sites(
    rows: Any, tower: nn.Module, path: str, prefix: str, paths: Mapping[str, Any]
) -> tuple[Site, ...]:
    """The declared sites of one tower (ids beginning with ``prefix``) that the live module has.

    ``module`` patterns are relative to the tower; ``{layer}`` stands for the layer's number. Heads come
    from the attention module itself where it says, else from the configuration.
    """
    names = {name: module for name, module in tower.named_modules() if name}
    sites = [
        _site(row, names, path, _heads(tower.config, paths)) for row in rows if str(row["id"]).startswith(prefix)
    ]
    found = tuple(site for site in sites if site is not None)
    if not found:
        patterns = ", ".join(str(row["module"]) for row in rows if str(row["id"]).startswith(prefix))
        raise ModelError(
            f"{type(tower).__name__}: no module matches {patterns or 'any declared site'}",
            remedy="correct the family's site patterns (foveate inspect MODEL prints the module paths)",
        )
    return found


def _site(row: Mapping[str, Any], names: Mapping[str, nn.Module], path: str, heads: int) -> Site | None:
    pattern = re.compile(re.escape(str(row["module"])).replace(r"\{layer\}", r"(?P<layer>\d+)"))
    matches = {name: match for name in names if (match := pattern.fullmatch(name))}
    if not matches:
        return None
    modules = {f"{path}.{n}" if path else n: int(m.groupdict().get("layer") or 0) for n, m in matches.items()}
    own = getattr(names[next(iter(matches))], "num_heads", None)
    site = Site(
        id=str(row["id"]),
        modules=modules,
        heads=int(own) if isinstance(own, int) else heads,
        query=str(row["query"]),
        key=str(row["key"]),
    )
    extra = {key: row[key] for key in ("kind", "form", "summary") if key in row}
    return replace(site, masks=tuple(row.get("masks", ())), **extra)


def _heads(config: Any, paths: Mapping[str, Any]) -> int:
    return int(_field(config, paths.get("heads", "num_attention_heads")))


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
