"""Declared sites of a family, found in the live model by the pattern of their module paths."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError
from foveate.interfaces import Site

if TYPE_CHECKING:
    from torch import nn

_HEAD_NAMES = ("num_heads", "n_heads", "num_attention_heads", "nheads", "n_head")


def find_sites(rows: Sequence[Mapping[str, Any]], model: nn.Module) -> tuple[Site, ...]:
    """Sites whose ``module`` pattern ends a path of ``model``; ``{layer}`` stands for the layer's number.

    Rows that match nothing are left out (a detector without a dense encoder). The number of heads is the
    module's own; ``heads`` of the row, a config path, only where it has none. Raises ModelError where no row
    matches.
    """
    found = tuple(site for row in rows if (site := _site(row, model)) is not None)
    if not found:
        patterns = ", ".join(str(row["module"]) for row in rows) or "any site"
        raise ModelError(
            f"{type(model).__name__}: no module matches {patterns}",
            remedy="correct the family's site patterns (foveate inspect MODEL prints the module paths)",
        )
    return found


def _site(row: Mapping[str, Any], model: nn.Module) -> Site | None:
    wanted, mark, number = str(row["module"]).partition("#")  # the softmax of a module that attends several times
    escaped = re.escape(wanted).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{any\}", r"\d+")
    pattern = re.compile(rf"(?:.*\.)?{escaped}")
    modules = {
        f"{path}{mark}{number}": int(match.groupdict().get("layer") or 0)
        for path, _ in model.named_modules()
        if (match := pattern.fullmatch(path))
    }
    if not modules:
        return None
    return Site(
        id=str(row["id"]),
        modules=modules,
        heads=_heads(model.get_submodule(next(iter(modules)).partition("#")[0]), row, model),
        query=str(row["query"]),
        key=str(row["key"]),
        kind=row["kind"],
        form=row.get("form", "dense"),
        normalised_over=row.get("normalised_over", "key"),
        masks=tuple(row.get("masks", ())),
        group=tuple(row.get("group", ())),
        summary=str(row.get("summary", "")),
    )


def _heads(module: nn.Module, row: Mapping[str, Any], model: nn.Module) -> int:
    for name in _HEAD_NAMES:
        value = getattr(module, name, None)
        if isinstance(value, int):
            return value
    width, head = getattr(module, "embed_dim", None), getattr(module, "head_dim", None)
    if isinstance(width, int) and isinstance(head, int):
        return width // head
    return _from_config(model, row)


def _from_config(model: nn.Module, row: Mapping[str, Any]) -> int:
    wanted = row.get("heads", "num_attention_heads")
    if isinstance(wanted, int):
        return wanted
    value: Any = model.config
    for part in str(wanted).split("."):
        value = getattr(value, part, None)
    if not isinstance(value, int):
        raise ModelError(
            f"site {row['id']}: neither its module nor config.{wanted} says how many heads it has",
            remedy="set heads in the family's site row (a number or a config path)",
        )
    return value
