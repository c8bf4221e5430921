"""The whole zoo."""

from __future__ import annotations

from zoo.catalogue import detection, hierarchical, plain, video
from zoo.species import Species

ZOO: tuple[Species, ...] = (*plain.SPECIES, *hierarchical.SPECIES, *video.SPECIES, *detection.SPECIES)
