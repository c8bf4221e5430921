"""Opening detectors: the shared way of :mod:`foveate_vit.loading`, with what is particular to detectors.

Configurations that name a timm backbone are rewritten to transformers' own ResNet where it is one; the
weights follow by a key map (:mod:`foveate_detr.backbones`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from foveate_detr.backbones import names_timm, read_renamed, without_timm
from foveate_vit.loading import Loaded, load_model


def load_detector(
    row: Any,
    *,
    adapter: str,
    weights: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    architecture: str | None = None,
    config: Mapping[str, Any] | Path | str | None = None,
    seed: int = 0,
) -> Loaded:
    """Open ``row`` as :func:`foveate_vit.loading.load_model` does. Raises ModelError, MissingDependencyError."""
    return load_model(
        row,
        adapter=adapter,
        weights=weights,
        device=device,
        dtype=dtype,
        architecture=architecture,
        config=config,
        seed=seed,
        attention=None,  # an explicit "sdpa" is refused because of the ResNet; the default takes it
        adapt=_adapt,
    )


def _adapt(config: Any, place: str, row: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """A configuration without timm and, where that renames anything, the checkpoint's tensors."""
    if not names_timm(config):
        return config, None
    config = without_timm(config, row.id)
    if names_timm(config) or place == "random":
        return config, None
    return config, read_renamed(place, getattr(row, "revision", "") or "")
