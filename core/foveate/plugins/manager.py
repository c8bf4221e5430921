"""Load each plugin by itself; a failure becomes a record, never a crash.

pluggy's own ``load_setuptools_entrypoints`` stops at the first plugin that does not import and accepts a
misspelt hook in silence, so plugins are imported, registered and asked here one at a time. A plugin either
loads whole or offers nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

import pluggy

from foveate.errors import PluginError, UsageError
from foveate.plugins import hooks
from foveate.plugins.discovery import Installed, installed
from foveate.plugins.specs import SPEC_TYPES, Spec

State = Literal["loaded", "failed", "shadowed", "disabled"]
STRICT = "FOVEATE_STRICT"
"""Environment variable: ``1`` raises the first plugin failure, for plugin authors."""
HEAVY = (
    "torch",
    "numpy",
    "pandas",
    "xarray",
    "zarr",
    "matplotlib",
    "scipy",
    "transformers",
    "captum",
    "detectron2",
)
"""Packages that a declaration must not import: together they cost seconds at every start."""


@dataclass
class Record:
    """What happened to one plugin.

    ``shadowed``: it loaded, but some of its names were taken before; those are in ``error``.
    ``heavy`` lists packages that were imported by merely registering.
    """

    plugin: Installed
    state: State = "loaded"
    error: str = ""
    remedy: str = ""
    traceback: str = ""
    seconds: float = 0.0
    heavy: tuple[str, ...] = ()
    offers: dict[str, tuple[Spec, ...]] = field(default_factory=dict)

    def fail(self, error: BaseException) -> None:
        """Record why it does not work; it then offers nothing."""
        self.state, self.offers = "failed", {}
        self.error = _in_words(error)
        self.remedy = getattr(error, "remedy", "") or _remedy(error, self.plugin)
        self.traceback = "".join(traceback.format_exception(error))


class Manager:
    """All plugins, loaded in order (foveate's own first), and what they offer."""

    def __init__(self, plugins: Iterable[Installed] | None = None) -> None:
        self._hooks = pluggy.PluginManager(hooks.PROJECT)
        self._hooks.add_hookspecs(hooks)
        self._owners: dict[tuple[str, str], tuple[Spec, Installed]] = {}
        self.records = [self._load(plugin) for plugin in (installed() if plugins is None else plugins)]

    def specs(self, kind: str) -> list[Spec]:
        """Everything offered of one kind: ``source``, ``attribution``, ``metric``, ``renderer`` or ``check``."""
        wanted = _singular(kind)
        return [spec for (owned, _), (spec, _) in self._owners.items() if owned == wanted]

    def spec(self, kind: str, name: str) -> Spec:
        """One offer by name. Raises UsageError with the close matches and the plugins that failed."""
        wanted = _singular(kind)
        if (wanted, name) in self._owners:
            return self._owners[wanted, name][0]
        known = [spec.name for spec in self.specs(wanted)]
        close = get_close_matches(name, known, 3) or sorted(known)
        broken = [record.plugin.title for record in self.records if record.state == "failed"]
        raise UsageError(
            f"no {wanted} named {name!r}"
            + (f"; {len(broken)} plugin(s) failed to load: {', '.join(broken)}" if broken else ""),
            remedy=(f"use one of: {', '.join(close)}" if close else "install a plugin that offers it")
            + ("; see foveate doctor" if broken else ""),
        )

    def owner(self, kind: str, name: str) -> Installed:
        """The plugin that offers this name. Raises UsageError as :meth:`spec` does."""
        self.spec(kind, name)
        return self._owners[_singular(kind), name][1]

    def _load(self, plugin: Installed) -> Record:
        record = Record(plugin)
        if not plugin.allowed:
            record.state = "disabled"
            return record
        before, start = set(sys.modules), time.perf_counter()
        try:
            # A plugin that prints while it is imported must not spoil --json on stdout.
            with contextlib.redirect_stdout(sys.stderr):
                record.offers = self._ask(import_module(plugin.module), plugin)
        except (Exception, SystemExit) as error:
            record.fail(error)
        record.seconds = time.perf_counter() - start
        record.heavy = tuple(name for name in HEAVY if name in sys.modules and name not in before)
        self._claim(record)
        if record.state != "loaded" and os.environ.get(STRICT) == "1":
            raise PluginError(f"plugin {plugin.title}: {record.error}", remedy=record.remedy)
        return record

    def _ask(self, module: ModuleType, plugin: Installed) -> dict[str, tuple[Spec, ...]]:
        """Register one module and call each of its hooks by itself."""
        _check_api(module)
        _check_marked(module)
        self._hooks.register(module, name=plugin.title)
        try:
            return {hooks.HOOKS[name]: _collect(name, call) for name, call in self._implementations(module)}
        except BaseException:
            self._hooks.unregister(module)
            raise

    def _implementations(self, module: ModuleType) -> Iterator[tuple[str, pluggy.HookImpl]]:
        for caller in self._hooks.get_hookcallers(module) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin is not module:
                    continue
                if caller.has_spec():
                    yield caller.name, implementation
                elif not implementation.optionalhook:
                    raise PluginError(_unknown_hook(caller.name))

    def _claim(self, record: Record) -> None:
        """Enter what a plugin offers; the first owner of a name keeps it."""
        refused = []
        for kind, specs in record.offers.items():
            kept = []
            for spec in specs:
                _, owner = self._owners.setdefault((kind, spec.name), (spec, record.plugin))
                if self._owners[kind, spec.name][0] is spec:
                    kept.append(spec)
                else:
                    refused.append(
                        f"{kind} {spec.name!r} of {record.plugin.title} is already taken by {owner.title}"
                    )
            record.offers[kind] = tuple(kept)
        if refused:
            record.state, record.error = "shadowed", "; ".join(refused)
            record.remedy = "rename it in the plugin, or uninstall one of the two"


@cache
def plugin_manager() -> Manager:
    """The manager of this process; plugins are loaded on the first call."""
    return Manager()


def _collect(hook: str, implementation: pluggy.HookImpl) -> tuple[Spec, ...]:
    wanted = SPEC_TYPES[hooks.HOOKS[hook]]
    answer = implementation.function()
    if answer is None or isinstance(answer, str | bytes) or not isinstance(answer, Iterable):
        raise PluginError(f"{hook} must return a list of {wanted.__name__}, got {answer!r}")
    specs = tuple(answer)
    for spec in specs:
        if not isinstance(spec, wanted):
            raise PluginError(f"{hook} must return {wanted.__name__} objects, got {spec!r}")
    return specs


def _check_api(module: ModuleType) -> None:
    ours = hooks.API_VERSION
    wanted = getattr(module, "FOVEATE_API", (ours[0], 0))
    if not (isinstance(wanted, tuple) and len(wanted) == 2 and all(isinstance(part, int) for part in wanted)):
        raise PluginError(f"FOVEATE_API must be two integers such as {ours}, got {wanted!r}")
    if wanted[0] != ours[0] or wanted[1] > ours[1]:
        raise PluginError(
            f"written for plugin API {wanted[0]}.{wanted[1]}; this foveate has {ours[0]}.{ours[1]}",
            remedy="pip install --upgrade foveate" if wanted > ours else "ask its authors for a newer release",
        )


def _check_marked(module: ModuleType) -> None:
    """A function named like a hook but without ``@hookimpl`` would be ignored in silence."""
    for name, value in vars(module).items():
        ours = name.startswith(f"{hooks.PROJECT}_") and inspect.isfunction(value)
        if ours and value.__module__ == module.__name__ and not hasattr(value, f"{hooks.PROJECT}_impl"):
            raise PluginError(
                f"{name} is not marked as a hook",
                remedy="from foveate.plugins.hooks import hookimpl, and put @hookimpl above it",
            )


def _unknown_hook(name: str) -> str:
    close = get_close_matches(name, hooks.HOOKS, 1)
    meant = f" (did you mean {close[0]!r}?)" if close else ""
    return f"implements unknown hook {name!r}{meant}; known hooks: {', '.join(hooks.HOOKS)}"


def _singular(kind: str) -> str:
    wanted = kind.removesuffix("s")
    if wanted not in SPEC_TYPES:
        raise UsageError(f"no kind of plugin named {kind!r}", remedy=f"use one of: {', '.join(SPEC_TYPES)}")
    return wanted


def _in_words(error: BaseException) -> str:
    if isinstance(error, PluginError):
        return error.message
    if isinstance(error, SystemExit):
        return f"SystemExit: called sys.exit({error.code!r}) while being imported"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _remedy(error: BaseException, plugin: Installed) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        if package == plugin.module.partition(".")[0]:
            return f"reinstall {plugin.distribution}: a part of it is not there"
        return f"pip install {package}, or uninstall {plugin.distribution}"
    return f"upgrade or uninstall {plugin.distribution}, or leave it out through FOVEATE_PLUGINS"
