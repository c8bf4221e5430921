"""The rows of a ``registry.toml`` and the check of each, with an error that names the row and the key.

A row describes; nothing is computed from it. ``expect`` in particular is held against the live model after
it is opened, so that a wrong belief about a checkpoint is found instead of being carried on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from foveate.interfaces import SiteForm, SiteKind

Table = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class FamilyRow:
    """Models that one adapter opens in one way.

    ``source`` names a SourceSpec; ``model_types`` are the ``model_type`` values of a ``config.json`` that
    this family claims; ``layout`` maps facts to dotted paths in the live config; ``sites`` are tables with
    ``id``, ``module`` (pattern with ``{layer}``), ``kind``, ``query``, ``key`` and more.
    """

    id: str
    source: str
    model_types: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    paper: str = ""
    licence: str = ""
    summary: str = ""
    layout: Table = field(default_factory=dict)
    sites: tuple[Table, ...] = ()
    options: Table = field(default_factory=dict)
    owner: str = ""


@dataclass(frozen=True, eq=False)
class ModelRow:
    """One checkpoint.

    ``weights`` is a file or folder that ships with the registry fragment, or None where the source finds
    the weights by ``id`` and ``revision``. ``licence`` is the SPDX id of the weights, or "unverified".
    ``options`` are defaults for the source; ``expect`` are facts compared with the live model.
    """

    id: str
    family: FamilyRow
    revision: str = ""
    sha256: str = ""
    licence: str = "unverified"
    provenance: str = ""
    summary: str = ""
    weights: Path | None = None
    expect: Table = field(default_factory=dict)
    options: Table = field(default_factory=dict)
    owner: str = ""

    @property
    def source(self) -> str:
        """The SourceSpec that opens it."""
        return self.family.source


Rule = Callable[[Any], str]
"""Says what a value should have been, or nothing where it is right."""


def _text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "a non-empty string"


def _texts(value: Any) -> str:
    return "" if isinstance(value, list) and all(isinstance(v, str) and v for v in value) else "a list of strings"


def _table(value: Any) -> str:
    return "" if isinstance(value, dict) else "a table"


def _tables(value: Any) -> str:
    fits = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    return "" if fits else "an array of tables ([[family.site]])"


def _number_or_text(value: Any) -> str:
    return "" if isinstance(value, int | str) and not isinstance(value, bool) else "a number or a config path"


def _one_of(*choices: str) -> Rule:
    return lambda value: "" if value in choices else f"one of {', '.join(sorted(choices))}"


def _sha256(value: Any) -> str:
    fits = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return "" if fits else "64 lower-case hexadecimal digits"


def _inside(value: Any) -> str:
    path = PurePosixPath(value) if isinstance(value, str) else None
    fits = path is not None and value and not path.is_absolute() and ".." not in path.parts
    return "" if fits else "a path below the package that holds this registry.toml"


SITE_RULES: dict[str, Rule] = {
    "id": _text,
    "module": _text,
    "kind": _one_of(*get_args(SiteKind)),
    "form": _one_of(*get_args(SiteForm)),
    "query": _text,
    "key": _text,
    "heads": _number_or_text,
    "layers": _number_or_text,
    "normalised_over": _one_of("key", "query", "point"),
    "masks": _texts,
    "group": _texts,
    "tower": _text,
    "readout": _text,
    "summary": _text,
}
FAMILY_RULES: dict[str, Rule] = {
    "id": _text,
    "source": _text,
    "model_types": _texts,
    "requires": _texts,
    "paper": _text,
    "licence": _text,
    "summary": _text,
    "layout": _table,
    "site": _tables,
    "options": _table,
}
MODEL_RULES: dict[str, Rule] = {
    "id": _text,
    "family": _text,
    "revision": _text,
    "sha256": _sha256,
    "licence": _text,
    "provenance": _text,
    "summary": _text,
    "weights": _inside,
    "expect": _table,
    "options": _table,
}
NEEDED = {
    "site": ("id", "module", "kind", "query", "key"),
    "family": ("id", "source"),
    "model": ("id", "family", "licence", "provenance"),
}


def problems_of(table: str, row: Table, number: int) -> list[str]:
    """Everything wrong with one ``[[family]]`` or ``[[model]]`` row, each with its place; empty if sound."""
    where = f"{table} {row['id']!r}" if isinstance(row.get("id"), str) else f"[[{table}]] number {number}"
    found = _check(row, FAMILY_RULES if table == "family" else MODEL_RULES, NEEDED[table], where)
    sites = row.get("site") if table == "family" else None
    for site in sites if isinstance(sites, list) else ():
        if isinstance(site, dict):
            found += _check(site, SITE_RULES, NEEDED["site"], f"{where}, site {site.get('id')!r}")
    return found


def _check(row: Table, rules: Mapping[str, Rule], needed: tuple[str, ...], where: str) -> list[str]:
    found = [f"{where}: lacks {key!r}" for key in needed if key not in row]
    for key, value in row.items():
        if key not in rules:
            close = get_close_matches(key, rules, 1)
            hint = f" (did you mean {close[0]!r}?)" if close else f"; known keys: {', '.join(rules)}"
            found.append(f"{where}: unknown key {key!r}{hint}")
        elif wanted := rules[key](value):
            found.append(f"{where}: {key} must be {wanted}, not {value!r}")
    return found


def family_row(row: Table, owner: str) -> FamilyRow:
    """A validated ``[[family]]`` table as a row."""
    texts = {key: row.get(key, "") for key in ("paper", "licence", "summary")}
    return FamilyRow(
        row["id"],
        row["source"],
        model_types=tuple(row.get("model_types", ())),
        requires=tuple(row.get("requires", ())),
        **texts,
        layout=row.get("layout", {}),
        sites=tuple(row.get("site", ())),
        options=row.get("options", {}),
        owner=owner,
    )


def model_row(row: Table, family: FamilyRow, owner: str, folder: Path) -> ModelRow:
    """A validated ``[[model]]`` table as a row; ``folder`` is what its ``weights`` are relative to."""
    texts = {key: row.get(key, "") for key in ("revision", "sha256", "licence", "provenance", "summary")}
    return ModelRow(
        row["id"],
        family,
        **texts,
        weights=folder / row["weights"] if "weights" in row else None,
        expect=row.get("expect", {}),
        options=row.get("options", {}),
        owner=owner,
    )
