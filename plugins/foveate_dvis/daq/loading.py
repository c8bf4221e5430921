"""Opening DVIS-DAQ from published weights: a file or a folder, with or without a configuration beside it.

Where there is none, sizes are read off the tensors' shapes; rules and thresholds, which no tensor shows, come
from the data set's preset. Pickles are read as tensors only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from foveate.errors import ModelError
from foveate.pretrained.weights import check_finite, read_state, weight_files
from foveate_dvis.daq.config import CONFIG_NAMES, MODES, DaqConfig, Mode, RefinerConfig
from foveate_dvis.daq.infer import infer_config
from foveate_dvis.daq.keys import IGNORED_HERE, translate
from foveate_dvis.daq.network import DvisDaq

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 6


@dataclass(frozen=True)
class LoadedDaq:
    """A model in eval mode without gradients to its weights; ``weights``: the file they came from."""

    model: DvisDaq
    weights: Path
    config: DaqConfig


def load_daq(
    place: Path | str,
    *,
    config: DaqConfig | None = None,
    dataset: str = "ovis",
    mode: Mode | None = None,
    upstream_exact: bool = False,
) -> LoadedDaq:
    """Open weights with published names: a safetensors or ``.pth`` file, or a folder that holds one.

    The configuration is ``config``, else the JSON file beside the weights, else inferred with ``dataset``'s rules
    (its class count comes from the weights). ``mode``: "online" leaves a refiner out; "offline" demands one;
    None takes what the configuration says.

    Raises ModelError: no or several weight files, a refused pickle (with the command that converts it), missing
    or unknown tensors, other shapes, NaN.
    """
    weights = find_weights(place)
    state = unwrapped(read_state(weights))
    settings = config or _beside(weights) or infer_config(state, dataset=dataset, mode=mode)
    settings = in_mode(settings, mode, state)
    model = DvisDaq(settings, upstream_exact=upstream_exact)
    load_state(model, state, name=str(weights))
    return LoadedDaq(model.eval().requires_grad_(False), weights, settings)


def random_daq(config: DaqConfig, *, seed: int = 0, upstream_exact: bool = False) -> DvisDaq:
    """A model of random weights, the same for the same ``seed``; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DvisDaq(config, upstream_exact=upstream_exact)
    return model.eval().requires_grad_(False)


def find_weights(place: Path | str) -> Path:
    """The one file of weights at ``place``. Raises ModelError for none or several."""
    path = Path(place)
    if path.is_file():
        return path
    found = weight_files(path) if path.is_dir() else []
    if len(found) != 1:
        what = f"holds {len(found)} files of weights" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {what}: expected one", remedy="name the .safetensors or .pth file itself")
    return found[0]


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the ``module.`` that data-parallel training puts before every name. Raises ModelError if empty."""
    if not state:
        raise ModelError(
            "the checkpoint holds no tensors",
            remedy='expected a state dict, flat or under "model"; other layouts are not read',
        )
    if all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)


def load_state(model: DvisDaq, state: Mapping[str, Tensor], *, name: str = "the checkpoint") -> None:
    """Put a published state dict into ``model``.

    An online model ignores ``refiner.*``. Raises ModelError that lists missing, unknown and misshapen tensors.
    """
    check_finite(name, state.items())
    ours, unknown = translate(state)
    if model.refiner is None:
        ours = {key: tensor for key, tensor in ours.items() if not key.startswith("refiner.")}
    have = model.state_dict()
    unknown += [key for key in ours if key not in have]
    missing = [key for key in have if key not in ours and not any(part in key for part in IGNORED_HERE)]
    shapes = [
        f"{key} {tuple(ours[key].shape)} for {tuple(have[key].shape)}"
        for key in ours
        if key in have and ours[key].shape != have[key].shape
    ]
    problems = [
        f"{len(found)} {what}: {_some(found)}"
        for what, found in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if found
    ]
    if problems:
        raise ModelError(
            f"weights of {name} do not fit a {model.config.mode} DVIS-DAQ: {'; '.join(problems)}",
            remedy=f"check that weights and configuration ({' or '.join(CONFIG_NAMES)}) belong together",
        )
    model.load_state_dict(ours, strict=False)


def in_mode(config: DaqConfig, mode: Mode | None, state: Mapping[str, Tensor]) -> DaqConfig:
    """``config`` as asked for. Raises ModelError where the weights have no refiner for the offline mode."""
    if mode is None or mode == config.mode:
        return config
    if mode not in MODES:
        raise ModelError(f"mode {mode!r} is not known", remedy="online or offline")
    if mode == "online":
        return config.online()
    inferred = infer_config(state, mode="offline")
    return replace(config, refiner=inferred.refiner or RefinerConfig())


def _beside(weights: Path) -> DaqConfig | None:
    if any((weights.parent / name).is_file() for name in CONFIG_NAMES):
        return DaqConfig.from_folder(weights.parent)
    return None


def _some(names: list[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
