"""The whole zoo."""

from __future__ import annotations

from zoo.catalogue import plain
from zoo.species import Species

ZOO: tuple[Species, ...] = (*plain.SPECIES,)
