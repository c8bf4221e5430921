"""What a plugin offers, declared by import string so that listing it imports nothing.

A spec names a class ``"package.module:Class"``; :meth:`Spec.load` imports it only when somebody uses it,
and only then is the class held against its contract in :mod:`foveate.interfaces`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

from foveate.errors import FoveateError, MissingDependencyError, PluginError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+\-]*")
_TARGET = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@dataclass(frozen=True)
class Spec:
    """One offer of a plugin. Use the subclass of its kind.

    ``target`` is ``"package.module:Class"``. ``requires`` lists *import* names that must be installed
    (looked up, never imported); ``remedy`` is the command that installs them. ``capabilities`` are free
    words that a user can filter by, such as ``gradients``, ``text``, ``objects``, ``temporal``.

    Raises PluginError where the name or the target is malformed.
    """

    name: str
    target: str
    summary: str
    requires: tuple[str, ...] = ()
    remedy: str = ""
    capabilities: frozenset[str] = frozenset()

    kind: ClassVar[str] = ""
    contract: ClassVar[str] = ""
    """Import string of the class that the target must subclass; empty for a plain callable."""

    def __post_init__(self) -> None:
        for label, value, pattern, example in (
            ("name", self.name, _NAME, "top_mass"),
            ("target", self.target, _TARGET, "package.module:Class"),
        ):
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise PluginError(
                    f"{type(self).__name__}: {label} must look like {example!r}, not {value!r}",
                    remedy="correct the declaration in the plugin's declare module",
                )
        for label in ("requires", "capabilities"):
            if isinstance(getattr(self, label), str):
                raise PluginError(
                    f"{type(self).__name__} {self.name!r}: {label} must be a collection, not a string"
                )
        object.__setattr__(self, "requires", tuple(self.requires))
        object.__setattr__(self, "capabilities", frozenset(self.capabilities))

    def missing(self) -> tuple[str, ...]:
        """Required packages that are not installed. Imports nothing."""
        return tuple(name for name in self.requires if not is_installed(name))

    def load(self) -> Any:
        """Import the target and check it against its contract.

        Raises MissingDependencyError where a required package is absent, PluginError where the target
        does not import or is not what its kind promises.
        """
        if absent := self.missing():
            raise MissingDependencyError(
                f"{self.kind} {self.name!r} needs {', '.join(absent)}, which is not installed",
                remedy=self.remedy or f"pip install {' '.join(absent)}",
            )
        loaded = _import_target(self)
        if not _keeps(loaded, self.contract):
            raise PluginError(
                f"{self.kind} {self.name!r}: {self.target} must be a subclass of "
                f"{self.contract.replace(':', '.')}, got {loaded!r}"
                if self.contract
                else f"{self.kind} {self.name!r}: {self.target} must be callable, got {loaded!r}"
            )
        return loaded

    def create(self, **options: Any) -> Any:
        """An instance: the loaded class called with ``options`` (an instance is returned as it is)."""
        loaded = self.load()
        return loaded(**options) if isinstance(loaded, type) else loaded


@dataclass(frozen=True)
class SourceSpec(Spec):
    """An adapter that opens models."""

    kind: ClassVar[str] = "source"
    contract: ClassVar[str] = "foveate.interfaces:AttentionSource"


@dataclass(frozen=True)
class AttributionSpec(Spec):
    """A way of explaining."""

    kind: ClassVar[str] = "attribution"
    contract: ClassVar[str] = "foveate.interfaces:Attribution"


@dataclass(frozen=True)
class MetricSpec(Spec):
    """A number about attention rows."""

    kind: ClassVar[str] = "metric"
    contract: ClassVar[str] = "foveate.interfaces:Metric"


@dataclass(frozen=True)
class RendererSpec(Spec):
    """A kind of picture."""

    kind: ClassVar[str] = "renderer"
    contract: ClassVar[str] = "foveate.interfaces:Renderer"


@dataclass(frozen=True)
class CheckSpec(Spec):
    """A health check: a callable without arguments that returns :class:`foveate.plugins.findings.Finding` rows."""

    kind: ClassVar[str] = "check"


SPEC_TYPES: dict[str, type[Spec]] = {
    spec.kind: spec for spec in (SourceSpec, AttributionSpec, MetricSpec, RendererSpec, CheckSpec)
}
"""Kind (singular, as in ``manager.specs("metric")``) -> its spec class."""


def is_installed(module: str) -> bool:
    """Whether a module could be imported. A dotted name imports its parents; plain names import nothing."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _import_target(spec: Spec) -> Any:
    module, _, path = spec.target.partition(":")
    try:
        found: Any = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except FoveateError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{spec.kind} {spec.name!r}: cannot import {spec.target}: {type(error).__name__}: {error}",
            remedy="foveate doctor",
        ) from error
    return found


def _keeps(loaded: Any, contract: str) -> bool:
    if not contract:
        return callable(loaded)
    module, _, name = contract.partition(":")
    promised = getattr(import_module(module), name)
    return issubclass(loaded, promised) if isinstance(loaded, type) else isinstance(loaded, promised)
