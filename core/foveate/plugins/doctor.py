"""Is this installation sound? Every check returns findings; ``foveate doctor`` prints them.

A broken plugin, a wrong registry row or a version conflict is one row with its remedy, while the rest of
foveate keeps working.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

from foveate.errors import FoveateError
from foveate.plugins.discovery import OWN
from foveate.plugins.findings import Finding
from foveate.plugins.manager import Manager, Record, plugin_manager
from foveate.plugins.registry import registry

WATCHED = ("torch", "numpy")
"""Packages that others' version demands are checked against, besides foveate's own dependencies."""
SECTIONS = ("environment", "dependencies", "extras", "plugins", "targets", "registry", "checks")


def examine(*, deep: bool = False) -> list[Finding]:
    """Every finding, in the order of :data:`SECTIONS`. Imports torch (to see its devices).

    ``deep`` also imports every class that a plugin declares, which takes seconds.
    """
    manager = plugin_manager()
    return [
        *environment(),
        *dependencies(),
        *extras(),
        *plugins(manager),
        *(targets(manager) if deep else ()),
        *models(manager),
        *plugin_checks(manager),
    ]


def environment() -> Iterator[Finding]:
    """Versions of Python, foveate and torch, and the devices that torch sees."""
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    old = sys.version_info < (3, 11)
    yield Finding("environment", "python", "fail" if old else "ok", here, "Python 3.11 or newer" if old else "")
    yield Finding("environment", "foveate", "ok", metadata.version(OWN))
    try:
        yield from _torch()
    except Exception as error:  # a broken torch fails in many ways: OSError of a library, AttributeError, ...
        yield Finding("environment", "torch", "fail", f"{type(error).__name__}: {error}", "pip install torch")


def dependencies() -> Iterator[Finding]:
    """Whether what is installed satisfies foveate, and whether others disagree about shared packages."""
    conflicts = list(_conflicts())
    yield from conflicts
    if not any(finding.status == "fail" for finding in conflicts):
        yield Finding("dependencies", OWN, "ok", "every requirement is met")


def extras() -> Iterator[Finding]:
    """Optional packages that are not installed, by extra."""
    absent: dict[str, list[str]] = {}
    for requirement in _requirements(OWN):
        for extra in metadata.metadata(OWN).get_all("Provides-Extra") or ():
            wanted = requirement.marker is not None and requirement.marker.evaluate({"extra": extra})
            if wanted and not _met(requirement) and requirement.name != OWN:
                absent.setdefault(extra, []).append(str(requirement.name))
    for extra, names in absent.items():
        yield Finding(
            "extras", extra, "info", f"not installed: {', '.join(names)}", f'pip install "foveate[{extra}]"'
        )


def plugins(manager: Manager) -> Iterator[Finding]:
    """One row a plugin, and one for each declared class whose packages are absent."""
    for record in manager.records:
        yield _plugin(record)
        for specs in record.offers.values():
            for spec in specs:
                if absent := spec.missing():
                    remedy = spec.remedy or f"pip install {' '.join(absent)}"
                    name = f"{record.plugin.title} {spec.kind} {spec.name}"
                    yield Finding("plugins", name, "info", f"needs {', '.join(absent)}", remedy)


def targets(manager: Manager) -> Iterator[Finding]:
    """Whether every declared class imports and keeps its contract. Imports all of them."""
    for record in manager.records:
        specs = [spec for offered in record.offers.values() for spec in offered if not spec.missing()]
        broken = 0
        for spec in specs:
            try:
                spec.load()
            except FoveateError as error:
                broken += 1
                name = f"{record.plugin.title} {spec.kind} {spec.name}"
                yield Finding("targets", name, "fail", error.message, f"upgrade {record.plugin.distribution}")
        if specs and not broken:
            yield Finding("targets", record.plugin.title, "ok", f"{len(specs)} declared classes load")


def models(manager: Manager) -> Iterator[Finding]:
    """Problems of registry fragments, families without an adapter, shipped weights that are not there."""
    known = registry()
    for problem in known.problems:
        yield Finding("registry", problem.owner, "fail", problem.message, f"correct {problem.path}")
    sources = {spec.name for spec in manager.specs("source")}
    for family in known.families.values():
        if family.source not in sources:
            detail = f"no plugin offers its source {family.source!r}"
            yield Finding("registry", f"family {family.id}", "fail", detail, f"install or mend {family.owner}")
    for row in known.models.values():
        if row.weights is not None and not row.weights.exists():
            yield Finding(
                "registry", row.id, "fail", f"weights are not there: {row.weights}", f"reinstall {row.owner}"
            )
    yield Finding("registry", "models", "ok", f"{len(known.models)} models of {len(known.families)} families")


def plugin_checks(manager: Manager) -> Iterator[Finding]:
    """What plugins' own checks say; a check that raises is a finding itself."""
    for spec in manager.specs("check"):
        try:
            found = list(spec.load()())
            if not all(isinstance(finding, Finding) for finding in found):
                raise TypeError(f"a check must return Finding rows, got {found!r}")
        except Exception as error:
            owner = manager.owner("check", spec.name).title
            found = [Finding("checks", spec.name, "fail", f"{type(error).__name__}: {error}", f"upgrade {owner}")]
        yield from found


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("environment", "torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    yield Finding("environment", "devices", "ok", ", ".join(["cpu", *devices]))


def _plugin(record: Record) -> Finding:
    title = f"{record.plugin.title} {record.plugin.version}"
    if record.state == "disabled":
        return Finding("plugins", title, "info", "left out by FOVEATE_PLUGINS")
    if record.state != "loaded":
        return Finding("plugins", title, "fail", record.error, record.remedy)
    if record.heavy:
        return Finding(
            "plugins",
            title,
            "warn",
            f"imports {', '.join(record.heavy)} when registering ({record.seconds * 1000:.0f} ms)",
            "import heavy packages in the classes that the declarations name",
        )
    offers = "; ".join(f"{len(specs)} {kind}" for kind, specs in record.offers.items() if specs)
    return Finding("plugins", title, "ok", offers or "offers nothing")


def _conflicts() -> Iterator[Finding]:
    """Installed versions that violate what foveate, or anybody who shares its packages, asks for."""
    mine = [requirement for requirement in _requirements(OWN) if _applies(requirement)]
    for requirement in mine:
        if not _met(requirement):
            yield _conflict(OWN, requirement, "fail")
    shared = {_plain(requirement.name) for requirement in mine} | set(WATCHED)
    for owner in sorted({found.name for found in metadata.distributions() if found.name}):
        for requirement in _requirements(owner) if owner != OWN else ():
            if _plain(requirement.name) in shared and _applies(requirement) and not _met(requirement):
                yield _conflict(owner, requirement, "warn")


def _conflict(owner: str, requirement: Any, status: Any) -> Finding:
    have = _version(requirement.name) or "nothing"
    detail = f"{owner} wants {requirement.name}{requirement.specifier}, installed is {have}"
    name = OWN if owner == OWN else f"{owner} and {requirement.name}"
    asked = f'pip install "{requirement.name}{requirement.specifier}"'
    return Finding("dependencies", name, status, detail, asked if owner == OWN else f"another version of {owner}")


def _requirements(distribution: str) -> Iterable[Any]:
    from packaging.requirements import InvalidRequirement, Requirement

    try:
        lines = metadata.requires(distribution) or ()
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(Requirement(line))
        except InvalidRequirement:  # an old package's metadata; not ours to judge
            continue
    return found


def _applies(requirement: Any) -> bool:
    return requirement.marker is None or bool(requirement.marker.evaluate({"extra": ""}))


def _met(requirement: Any) -> bool:
    have = _version(requirement.name)
    return have is not None and bool(requirement.specifier.contains(have, prereleases=True))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
