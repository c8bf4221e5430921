"""From a registry row and options to a DVIS-DAQ in eval mode with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError, UsageError
from foveate.interfaces import ModelCard
from foveate.pretrained.loading import torch_dtype
from foveate.pretrained.weights import check_hash, sha256_of
from foveate_dvis.daq.config import MODES, DaqConfig, Mode
from foveate_dvis.daq.loading import load_daq, random_daq

if TYPE_CHECKING:
    from foveate_dvis.daq.network import DvisDaq

Settings = DaqConfig | Mapping[str, Any] | Path | str


@dataclass(frozen=True, eq=False)
class OpenedDaq:
    """A model on its device, in eval mode, and what it is."""

    model: DvisDaq
    card: ModelCard


def open_daq(
    row: Any,
    *,
    adapter: str,
    weights: Path | str | None,
    device: str,
    dtype: str,
    config: Settings | None,
    dataset: str,
    mode: str | None,
    rule: str | None,
    seed: int,
    upstream_exact: bool,
) -> OpenedDaq:
    """Weights of a file or folder, or "random"; see :class:`~foveate_dvis.daq_source.DaqSource`.

    Raises ModelError where there are no weights or they do not fit, UsageError for unknown options.
    """
    place = weights or getattr(row, "weights", None)
    settings = None if config is None else read_config(config)
    if mode is not None and mode not in MODES:
        raise UsageError(f"mode {mode!r} is not known", remedy=f"one of {', '.join(MODES)}")
    wanted: Mode | None = mode
    if place is None and Path(str(row.id)).exists():
        place = str(row.id)
    if place is None:
        raise ModelError(
            f"{row.id}: the authors publish weights of DVIS-DAQ as files, not on a hub",
            remedy='give the file or its folder: weights="dvis_daq_ovis_r50.pth", or weights="random"',
        )
    if str(place) == "random":
        made = settings or DaqConfig.preset(dataset, mode=wanted or "online")
        model = random_daq(_ruled(_in_mode(made, wanted), rule), seed=seed, upstream_exact=upstream_exact)
        hashed = f"random:DVIS-DAQ:{seed}"
    else:
        loaded = load_daq(place, config=settings, dataset=dataset, mode=wanted, upstream_exact=upstream_exact)
        model, hashed = loaded.model, sha256_of([loaded.weights])
        model.config = _ruled(loaded.config, rule)
        check_hash(row.id, getattr(row, "sha256", None), hashed)
    model = model.to(device=device, dtype=torch_dtype(dtype)).eval().requires_grad_(False)
    return OpenedDaq(model, _card(row, place, adapter, hashed))


def read_config(config: Settings) -> DaqConfig:
    """A configuration given as such, as a mapping, or as a JSON file or the folder that holds one."""
    if isinstance(config, DaqConfig):
        return config
    if isinstance(config, Mapping):
        return DaqConfig.from_json(config)
    path = Path(config)
    if path.is_dir():
        return DaqConfig.from_folder(path)
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(read).__name__}")
    return DaqConfig.from_json(read)


def _in_mode(config: DaqConfig, mode: Mode | None) -> DaqConfig:
    if mode == "offline" and config.refiner is None:
        raise ModelError("the configuration has no refiner: the offline mode needs one", remedy="mode='online'")
    return config.online() if mode == "online" else config


def _ruled(config: DaqConfig, rule: str | None) -> DaqConfig:
    """The configuration under another keep rule; None leaves its own."""
    if rule is None:
        return config
    if rule not in ("ovis", "ytvis"):
        raise UsageError(f"rule {rule!r} is not known", remedy="ovis or ytvis")
    return replace(config, tracker=replace(config.tracker, ovis_rule=rule == "ovis"))


def _card(row: Any, place: Path | str, adapter: str, hashed: str) -> ModelCard:
    random = str(place) == "random"
    return ModelCard(
        id=row.id,
        source=str(place),
        adapter=adapter,
        revision=str(getattr(row, "revision", "") or ""),
        weights_sha256=hashed,
        licence=getattr(row, "licence", "unverified") or "unverified",
        family=row.family.id,
        provenance=getattr(row, "provenance", "") or "",
        versions={name: version(name) for name in ("torch", "transformers")},
        notes=("random weights: attention means nothing here",) if random else (),
    )
