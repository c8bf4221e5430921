"""The whole zoo."""

from __future__ import annotations

from zoo.catalogue import dense, detection, fusion, hierarchical, packed, parts, plain, video
from zoo.species import Species

ZOO: tuple[Species, ...] = (
    *plain.SPECIES,
    *hierarchical.SPECIES,
    *video.SPECIES,
    *detection.SPECIES,
    *dense.SPECIES,
    *fusion.SPECIES,
    *packed.SPECIES,
    *parts.SPECIES,
)
