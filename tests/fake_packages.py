"""Distributions that exist only for one test: a module and its metadata in a temporary folder."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from textwrap import dedent

import pytest

from foveate.plugins.manager import Manager, Record, plugin_manager
from foveate.plugins.registry import registry

HEADER = "from foveate.plugins.hooks import hookimpl\nfrom foveate.plugins.specs import *\n"
GOOD = """
@hookimpl
def foveate_metrics():
    return [MetricSpec("{name}", "json:JSONDecoder", "for tests")]
"""
Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install("dist", code)`` makes a distribution with one plugin module and returns its folder."""
    before = set(sys.modules)
    plugin_manager.cache_clear()
    registry.cache_clear()

    def make(
        name: str,
        code: str = "",
        *,
        version: str = "0.1",
        groups: Mapping[str, Mapping[str, str]] | None = None,
        requires: tuple[str, ...] = (),
        files: Mapping[str, str] | None = None,
    ) -> Path:
        module = f"plugin_{name.replace('-', '_')}"
        folder = tmp_path / name
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        wanted = "".join(f"Requires-Dist: {line}\n" for line in requires)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wanted}")
        entries = {"foveate": {name: module}} if groups is None else groups
        lines = [
            f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in rows.items()) for group, rows in entries.items()
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        (folder / f"{module}.py").write_text(HEADER + dedent(code))
        for path, text in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        importlib.invalidate_caches()
        return folder

    yield make
    for fresh in set(sys.modules) - before:
        if fresh.startswith(("plugin_", "package_")):
            del sys.modules[fresh]
    plugin_manager.cache_clear()
    registry.cache_clear()


def record_of(manager: Manager, distribution: str) -> Record:
    """The record of a distribution's only plugin."""
    (record,) = [record for record in manager.records if record.plugin.distribution == distribution]
    return record
