"""What is installed, from package metadata alone: nothing is imported, so nothing can break or be slow.

(Scanning the entry points of 230 distributions takes 12 ms; a cache would cost more than it saves.)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

PLUGINS = "foveate"
"""Entry-point group of plugins: name -> light module that implements hooks."""
REGISTRIES = "foveate.registry"
"""Entry-point group of registry fragments: name -> package that holds a ``registry.toml``."""
OWN = "foveate"
ALLOW = "FOVEATE_PLUGINS"
"""Environment variable: comma-separated third-party plugins to load; set but empty: none. Unset: all."""


@dataclass(frozen=True)
class Installed:
    """One entry point of one distribution."""

    name: str
    module: str
    distribution: str
    version: str

    @property
    def own(self) -> bool:
        """Whether foveate itself brings it."""
        return self.distribution == OWN

    @property
    def title(self) -> str:
        """Name and owner, unique among what is installed."""
        return f"{self.distribution}:{self.name}"

    @property
    def allowed(self) -> bool:
        """Whether :data:`ALLOW` lets it load. foveate's own plugins always do."""
        listed = os.environ.get(ALLOW)
        return self.own or listed is None or self.name in {name.strip() for name in listed.split(",")}


def installed(group: str = PLUGINS) -> list[Installed]:
    """Every entry point of a group: foveate's own first, then by distribution and name.

    One distribution seen twice on the path (an editable install beside its build folder) counts once.
    """
    found = {_describe(entry) for entry in entry_points(group=group)}
    return sorted(found, key=lambda plugin: (not plugin.own, plugin.distribution, plugin.name))


def _describe(entry: EntryPoint) -> Installed:
    owner = entry.dist
    return Installed(
        entry.name,
        entry.value,
        (owner.name if owner else "") or "unknown",
        (owner.version if owner else "") or "unknown",
    )
