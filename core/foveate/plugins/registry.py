"""Which models are known: rows of TOML from foveate, from other packages and from the user, merged.

Read without importing any plugin. A fragment with a mistake is reported and left out; the others work.
Order: foveate's own, third parties' (entry-point group ``foveate.registry``), the user's
(``$FOVEATE_REGISTRY``). The first owner of an id keeps it; only the user's file may override.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from foveate.errors import UsageError
from foveate.plugins.discovery import OWN, REGISTRIES, Installed, installed
from foveate.plugins.rows import FamilyRow, ModelRow, family_row, model_row, problems_of

SCHEMA = 1
FILE = "registry.toml"
USER = "FOVEATE_REGISTRY"
"""Environment variable: path of the user's own registry file."""


@dataclass(frozen=True)
class Fragment:
    """One registry file, who brings it, and the folder its ``weights`` are relative to."""

    owner: str
    path: Path
    folder: Path
    overrides: bool = False


@dataclass(frozen=True)
class Problem:
    """A fragment, or a row of one, that is left out."""

    owner: str
    path: str
    message: str


@dataclass
class Registry:
    """All rows that are sound, and the problems with the others."""

    families: dict[str, FamilyRow] = field(default_factory=dict)
    models: dict[str, ModelRow] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def models() -> dict[str, ModelRow]:
    """Every known model by id."""
    return registry().models


def families() -> dict[str, FamilyRow]:
    """Every known family by id."""
    return registry().families


def resolve(reference: str) -> ModelRow:
    """The row of a model id. Raises UsageError with the close matches."""
    known = models()
    if reference in known:
        return known[reference]
    close = get_close_matches(reference, known, 3, cutoff=0.5)
    raise UsageError(
        f"no model {reference!r} in the registry",
        remedy=f"did you mean {', '.join(close)}?" if close else "foveate models lists the known ones",
    )


@cache
def registry() -> Registry:
    """The merged registry of this process. ``registry.cache_clear()`` after changing the environment."""
    merged = Registry()
    parsed = [(fragment, _parse(fragment, merged)) for fragment in _fragments(merged)]
    for fragment, data in parsed:
        for row in data.get("family", ()):
            if _free(merged.families, "family", row["id"], fragment, merged):
                merged.families[row["id"]] = family_row(row, fragment.owner)
    for fragment, data in parsed:
        for row in data.get("model", ()):
            if _free(merged.models, "model", row["id"], fragment, merged):
                _add_model(row, fragment, merged)
    return merged


def _fragments(merged: Registry) -> Iterator[Fragment]:
    yield _own_fragment()
    for plugin in installed(REGISTRIES):
        if plugin.allowed:
            path = _package_file(plugin)
            if path is None:
                merged.problems.append(
                    Problem(plugin.distribution, plugin.module, f"package {plugin.module!r} is not there")
                )
            else:
                yield Fragment(plugin.distribution, path, path.parent)
    if user := os.environ.get(USER):
        path = Path(user).expanduser()
        yield Fragment("user", path, path.parent, overrides=True)


def _own_fragment() -> Fragment:
    """The packaged file in a wheel; the repository's in an editable install, where files stay in place."""
    package = Path(__file__).parents[1]
    packaged = package / FILE
    return Fragment(OWN, packaged if packaged.is_file() else package.parents[1] / FILE, package)


def _package_file(plugin: Installed) -> Path | None:
    """Where a third party's fragment lies. The package is located, not imported."""
    top, *below = plugin.module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return None
    folders = spec.submodule_search_locations if spec else None
    return Path(next(iter(folders)), *below, FILE) if folders else None


def _parse(fragment: Fragment, merged: Registry) -> dict[str, Any]:
    """The tables of one file, or nothing (and problems entered) where it cannot be used."""
    try:
        data = tomllib.loads(fragment.path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        found = [f"cannot be read: {error}"]
    else:
        found = _check_file(data)
        if not found:
            return data
    merged.problems += [Problem(fragment.owner, str(fragment.path), message) for message in found]
    return {}


def _check_file(data: dict[str, Any]) -> list[str]:
    schema = data.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool):
        return [f"lacks the line: schema = {SCHEMA}"]
    if schema > SCHEMA:
        return [f"schema {schema} is newer than {SCHEMA}: pip install --upgrade foveate"]
    found = [
        f"unknown table {key!r}; known: family, model" for key in data if key not in ("schema", "family", "model")
    ]
    for table in ("family", "model"):
        rows = data.get(table, [])
        if not isinstance(rows, list):
            found.append(f"write [[{table}]], not [{table}]")
            continue
        for number, row in enumerate(rows, 1):
            found += problems_of(table, row, number)
    return found


def _free(known: Any, table: str, row_id: str, fragment: Fragment, merged: Registry) -> bool:
    """Whether a fragment may define this id; a clash is entered as a problem naming both owners."""
    if row_id not in known or (fragment.overrides and known[row_id].owner != fragment.owner):
        return True
    message = f"{table} {row_id!r} of {fragment.owner} is already defined by {known[row_id].owner}"
    merged.problems.append(Problem(fragment.owner, str(fragment.path), message))
    return False


def _add_model(row: dict[str, Any], fragment: Fragment, merged: Registry) -> None:
    family = merged.families.get(row["family"])
    if family is None:
        close = get_close_matches(row["family"], merged.families, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        message = f"model {row['id']!r}: no family {row['family']!r}{hint}"
        merged.problems.append(Problem(fragment.owner, str(fragment.path), message))
    else:
        merged.models[row["id"]] = model_row(row, family, fragment.owner, fragment.folder)
