"""From a registry row or a folder to a swimmer in eval mode with its card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import ModelError
from foveate.interfaces import ModelCard
from foveate.pretrained.loading import torch_dtype
from foveate.pretrained.weights import check_finite, check_hash, check_keys, read_state, sha256_of, weight_files
from foveate_dvis.swimmer_network import MODEL_TYPE, Swimmer, SwimmerConfig

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"


@dataclass(frozen=True, eq=False)
class OpenedSwimmer:
    """A network on its device, in eval mode, and what it is."""

    model: Swimmer
    card: ModelCard


def open_swimmer(
    row: Any,
    *,
    adapter: str,
    weights: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> OpenedSwimmer:
    """Weights of a folder or a safetensors file with ``config.json`` beside it, or "random".

    Random weights take ``config``, else that of the row's own files. Raises ModelError where there are no weights,
    where they do not fit, or where a number in them is not finite.
    """
    own = getattr(row, "weights", None)
    place = str(weights if weights is not None else own if own is not None else row.id)
    if place == "random":
        torch.manual_seed(seed)
        model, hashed = Swimmer(_config(config, own)), f"random:Swimmer:{seed}"
    else:
        file = _file(Path(place), row.id)
        model, hashed = Swimmer(_config(config, file.parent)), sha256_of([file])
        check_hash(row.id, getattr(row, "sha256", None), hashed)
        _fill(model, file, row.id)
    model = model.to(device=device, dtype=torch_dtype(dtype)).eval().requires_grad_(False)
    return OpenedSwimmer(model, _card(row, place, adapter, hashed))


def _file(place: Path, name: str) -> Path:
    found = weight_files(place) if place.is_dir() else [place] if place.is_file() else []
    if len(found) != 1:
        raise ModelError(
            f"{name}: expected one file of weights at {place}, found {len(found)}",
            remedy="give the folder that holds config.json and model.safetensors",
        )
    return found[0]


def _config(given: Mapping[str, Any] | None, folder: Path | None) -> SwimmerConfig:
    """The configuration given, else the one in ``folder``."""
    kept: Any = given
    if kept is None:
        path = Path(folder) / CONFIG if folder is not None else None
        if path is None or not path.is_file():
            raise ModelError(f"a swimmer without {CONFIG}", remedy="give config={'classes': [...], ...}")
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(kept, Mapping) or kept.get("model_type", MODEL_TYPE) != MODEL_TYPE:
        raise ModelError(f"not the configuration of a {MODEL_TYPE}: {kept!r}")
    try:
        return SwimmerConfig.from_dict(dict(kept))
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(f"the configuration of a {MODEL_TYPE} does not fit: {error}") from error


def _fill(model: nn.Module, file: Path, name: str) -> None:
    """Load float16 or float32 weights into a float32 network, every one of them."""
    state = {key: value.float() for key, value in read_state(file).items()}
    wanted = model.state_dict()
    shapes = [key for key in state if key in wanted and state[key].shape != wanted[key].shape]
    check_keys(name, [*(wanted.keys() - state.keys()), *(state.keys() - wanted.keys())], shapes)
    check_finite(name, state.items())
    model.load_state_dict(state)


def _card(row: Any, place: str, adapter: str, hashed: str) -> ModelCard:
    return ModelCard(
        id=row.id,
        source=place,
        adapter=adapter,
        revision=str(getattr(row, "revision", "") or ""),
        weights_sha256=hashed,
        licence=getattr(row, "licence", "unverified") or "unverified",
        family=row.family.id,
        provenance=getattr(row, "provenance", "") or "",
        versions={"torch": version("torch")},
        notes=("random weights: attention means nothing here",) if place == "random" else (),
    )
