"""From a reference to an opened model: a registry id, a folder with a ``config.json``, or a hub id.

The adapter does the opening. Here it is only chosen, and afterwards the live model is held against what
the registry expects of it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import FoveateError, MissingDependencyError, ModelError, PluginError, UsageError
from foveate.plugins import hub
from foveate.plugins.hub import CONFIG
from foveate.plugins.manager import plugin_manager
from foveate.plugins.registry import families, models
from foveate.plugins.rows import FamilyRow, ModelRow
from foveate.plugins.specs import is_installed

if TYPE_CHECKING:
    from foveate.interfaces import AttentionSource

_REFUSED = re.compile(r"unexpected keyword argument '(\w+)'")


def open_source(
    reference: str | Path,
    *,
    source: str | None = None,
    weights: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    **options: Any,
) -> AttentionSource:
    """Open a model and return its adapter.

    ``reference`` is a registry id, a local folder that holds a ``config.json``, a hub id, or anything that
    ``source`` understands. ``source`` names an adapter or a family where the reference alone is ambiguous.
    ``weights`` is a file, a folder or ``"random"``; by default what the registry row ships or names.
    ``options`` go to the adapter, over the defaults of the family and the row.

    Raises UsageError (unknown reference or option), ModelError (not what the registry expects),
    MissingDependencyError, PluginError.
    """
    row = find_row(str(reference), source)
    adapter = plugin_manager().spec("source", row.source).load()
    merged = {**row.family.options, **row.options, **options}
    chosen = weights if weights is not None else row.weights
    if isinstance(chosen, Path) and not chosen.exists():
        raise ModelError(f"{row.id}: its weights are not there: {chosen}", remedy="give others with weights=")
    _check_options(adapter, row, merged)
    opened = _open(adapter, row, weights=chosen, device=device, dtype=dtype, options=merged)
    if chosen != "random":
        check_expect(row, opened.facts())
    return opened


def find_row(reference: str, source: str | None = None) -> ModelRow:
    """The row that a reference stands for; one is made up for folders, hub ids and families.

    Raises UsageError, ModelError or MissingDependencyError.
    """
    if reference in models() and source in (None, models()[reference].source, models()[reference].family.id):
        return models()[reference]
    folder = Path(reference).expanduser()
    if (folder / CONFIG).is_file():
        family = _claiming(_read_config(folder / CONFIG), source, reference)
        return ModelRow(folder.resolve().name, family, weights=folder, owner="local folder")
    if source is not None:
        return ModelRow(reference, _named(source), owner="given by source=")
    if reference in families():
        return ModelRow(reference, families()[reference], owner="family")
    if folder.exists():
        raise UsageError(f"{reference} holds no {CONFIG}", remedy="give the folder that does, or source=")
    if _looks_like_hub_id(reference) and not _ships_here(reference):
        return ModelRow(reference, _claiming(_hub_config(reference), None, reference), owner="hub")
    raise UsageError(
        f"no model {reference!r}: not in the registry, not a folder with a {CONFIG}, not a hub id (owner/name)",
        remedy=_close(reference) + "foveate models lists the known ones",
    )


def check_expect(row: ModelRow, facts: Mapping[str, Any]) -> None:
    """Hold the live model against the row. Raises ModelError naming every fact that differs."""
    differ = [
        f"{name}: expected {expected!r}, got {facts[name]!r}"
        if name in facts
        else f"{name}: expected {expected!r}, but the source does not state it"
        for name, expected in row.expect.items()
        if name not in facts or not _same(expected, facts[name])
    ]
    if differ:
        raise ModelError(
            f"{row.id} is not what the registry row of {row.owner} expects: " + "; ".join(differ),
            remedy="check the weights and their revision; if they are right, correct `expect` in the row",
        )


def _open(adapter: Any, row: ModelRow, *, options: Mapping[str, Any], **given: Any) -> AttentionSource:
    from foveate.interfaces import AttentionSource

    try:
        opened = adapter.open(row, **given, **options)
    except FoveateError:
        raise
    except Exception as error:
        refused = _REFUSED.search(str(error)) if isinstance(error, TypeError) else None
        if refused and refused[1] in options:  # its `open` passes **options on
            raise _no_option(adapter, row, refused[1]) from error
        raise PluginError(
            f"source {row.source!r} failed to open {row.id}: {type(error).__name__}: {error}",
            remedy="FOVEATE_DEBUG=1 shows the traceback; foveate doctor checks the plugin",
        ) from error
    if not isinstance(opened, AttentionSource):
        raise PluginError(f"source {row.source!r}: open must return an AttentionSource, got {opened!r}")
    return opened


def _check_options(adapter: Any, row: ModelRow, options: Mapping[str, Any]) -> None:
    """Refuse an option that the adapter's ``open`` does not take; one with ``**options`` checks for itself."""
    named, passes_on = _options_of(adapter)
    for name in options:
        if name not in named and not passes_on:
            raise _no_option(adapter, row, name)


def _options_of(adapter: Any) -> tuple[list[str], bool]:
    """The options that ``open`` names, and whether it passes others on."""
    parameters = inspect.signature(adapter.open).parameters.values()
    fixed = ("row", "weights", "device", "dtype")
    named = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in fixed]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _no_option(adapter: Any, row: ModelRow, name: str) -> UsageError:
    named, passes_on = _options_of(adapter)
    more = " and others, which its documentation lists" if passes_on else ""
    return UsageError(
        f"source {row.source!r} takes no option {name!r}",
        remedy=f"its options: {', '.join(named) or 'none'}{more}",
    )


def _close(reference: str) -> str:
    close = get_close_matches(reference, [*models(), *families()], 3)
    return f"did you mean {', '.join(close)}? Otherwise " if close else ""


def _same(expected: Any, fact: Any) -> bool:
    if isinstance(expected, list | tuple):
        items = list(fact) if isinstance(fact, list | tuple) else None
        return items is not None and len(items) == len(expected) and all(map(_same, expected, items))
    if isinstance(expected, float) and isinstance(fact, int | float):
        return math.isclose(expected, fact, rel_tol=1e-6)
    return bool(expected == fact)


def _named(source: str) -> FamilyRow:
    """The family that ``source=`` means: a family id, else an adapter's name."""
    if source in families():
        return families()[source]
    spec = plugin_manager().spec("source", source)
    owned = [family for family in families().values() if family.source == source]
    return owned[0] if len(owned) == 1 else FamilyRow(spec.name, spec.name, owner="made up")


def _claiming(config: Mapping[str, Any], source: str | None, reference: str) -> FamilyRow:
    """The one family that claims a config's ``model_type``, among those that ``source`` allows."""
    kind = config.get("model_type")
    if source in families():
        return families()[str(source)]
    allowed = [family for family in families().values() if source in (None, family.source)]
    claimants = [family for family in allowed if kind in family.model_types]
    if len(claimants) == 1:
        return claimants[0]
    if claimants:
        raise UsageError(
            f"{reference}: model_type {kind!r} is claimed by {', '.join(family.id for family in claimants)}",
            remedy=f"choose one, for instance source={claimants[0].id!r} (--source on the command line)",
        )
    if source is not None:
        return replace(_named(source), model_types=())
    known = sorted({name for family in families().values() for name in family.model_types})
    raise UsageError(
        f"{reference}: no plugin claims model_type {kind!r}",
        remedy=f"known: {', '.join(known)}. docs/plugins.md shows how to add a family",
    )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _ships_here(reference: str) -> bool:
    """Whether every known model of this owner comes with a package, so that a hub has nothing to add."""
    owner = reference.partition("/")[0]
    theirs = [row for name, row in models().items() if name.startswith(f"{owner}/")]
    return bool(theirs) and all(row.weights is not None for row in theirs)


def _looks_like_hub_id(reference: str) -> bool:
    owner, slash, name = reference.partition("/")
    return bool(owner and slash and name) and "/" not in name and not reference.startswith((".", "~"))


def _hub_config(reference: str) -> dict[str, Any]:
    """The ``config.json`` of a hub id, from the local cache or the network."""
    if not is_installed("huggingface_hub"):
        raise MissingDependencyError(
            f"{reference} is not in the registry, and asking the hub needs huggingface_hub",
            remedy="pip install huggingface_hub, or give a local folder",
        )
    try:
        path = _download(reference)
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise ModelError(
            f"{reference} is not in the registry and the hub did not give its {CONFIG}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}",
            remedy=_close(reference)
            + "check the id and the connection, or download the model and give its folder",
        ) from error
    return _read_config(path)


def _download(reference: str) -> Path:
    """The model's config, from the cache where it is there. Raises at once where the hub does not answer."""
    from huggingface_hub import hf_hub_download

    if (found := hub.cached(reference)) is not None:
        return found
    hub.ask(reference)
    return Path(hf_hub_download(reference, CONFIG))
