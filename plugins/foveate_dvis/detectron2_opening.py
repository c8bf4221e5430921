"""A detectron2 model from its configuration file and weights, without unpickling.

detectron2 is the user's own installation and optional; so are the projects that a configuration builds on
(Mask2Former and others), which register themselves when they are imported. Nothing here imports them before a
model is opened.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependencyError, ModelError, UsageError
from foveate.pretrained.weights import read_state

if TYPE_CHECKING:
    from torch import nn

INSTALL = (
    "install detectron2 from its repository, facebookresearch/detectron2, with the torchvision of your torch: it "
    "is on no package index. If the model runs elsewhere, record it there: python -m foveate_dvis.exporter"
)
_DEFAULTS = ("add_deeplab_config", "add_maskformer2_config", "add_maskformer2_video_config")


def require_detectron2() -> None:
    """Raises MissingDependencyError that says what is missing and how it is had."""
    missing = [name for name in ("detectron2", "torchvision", "fvcore") if find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"source 'detectron2' needs {', '.join(missing)}", remedy=INSTALL)
    try:
        import_module("detectron2.modeling")
    except (ImportError, RuntimeError) as error:  # no compiled part, or a torchvision of another torch
        raise MissingDependencyError(
            f"detectron2 is there but cannot be imported: {error}", remedy=INSTALL
        ) from error


def build(config: Path, imports: Sequence[str], overrides: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The model of a ``.yaml`` or lazy ``.py`` configuration on the CPU, random weights, and the configuration.

    ``imports``: modules that register what it builds on. ``overrides``: dotted names and values.
    """
    require_detectron2()
    if not config.is_file():
        raise ModelError(f"configuration {config}: no such file", remedy="give a .yaml or .py file of detectron2")
    projects = [_project(name) for name in imports]
    try:
        if config.suffix == ".py":
            return _lazy(config, overrides)
        return _yaml(config, projects, overrides)
    except (KeyError, AttributeError, ImportError, AssertionError) as error:
        raise ModelError(
            f"configuration {config}: {type(error).__name__}: {error}",
            remedy="name the project that it is of: imports=['mask2former'] (its folder must be importable)",
        ) from error


def _project(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"imports={name!r}: {error}",
            remedy="put the project's folder on PYTHONPATH, and install what it needs",
        ) from error


def _yaml(path: Path, projects: Sequence[Any], overrides: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """A configuration with defaults: those of detectron2, then whatever each project adds (``add_..._config``)."""
    config = import_module("detectron2.config").get_cfg()
    found = [import_module("detectron2.projects.deeplab"), *projects] if projects else []
    for project in found:
        adders = [name for name in dir(project) if name.startswith("add_") and name.endswith("_config")]
        for name in sorted(adders, key=lambda one: (one not in _DEFAULTS, one)):
            getattr(project, name)(config)
    config.merge_from_file(str(path))
    config.merge_from_list([part for pair in overrides.items() for part in pair])
    config.MODEL.DEVICE, config.MODEL.WEIGHTS = "cpu", ""
    return import_module("detectron2.modeling").build_model(config), config


def _lazy(path: Path, overrides: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    module = import_module("detectron2.config")
    config = module.LazyConfig.load(str(path))
    config = module.LazyConfig.apply_overrides(config, [f"{name}={value}" for name, value in overrides.items()])
    return module.instantiate(config.model), config


def load(model: nn.Module, weights: Path) -> None:
    """Weights of a safetensors file or a ``.pth`` of tensors. Raises ModelError that lists what does not fit."""
    state = read_state(weights)
    have = model.state_dict()
    misshapen = [name for name, value in state.items() if name in have and value.shape != have[name].shape]
    missing = [name for name in have if name not in state and name.rpartition(".")[2] not in _MAY_LACK]
    unknown = [name for name in state if name not in have]
    if misshapen or missing:
        parts = {"missing": missing, "of another shape": misshapen, "unknown": unknown}
        told = "; ".join(f"{len(names)} {what}: {', '.join(names[:4])}" for what, names in parts.items() if names)
        raise ModelError(
            f"weights {weights} do not fit the configuration: {told}", remedy="check that they belong together"
        )
    whole = OrderedDict(state)
    # Modules of some projects rename keys of checkpoints that state no version. These have today's names.
    setattr(whole, "_metadata", getattr(have, "_metadata", {}))  # noqa: B010
    model.load_state_dict(whole, strict=False)


_MAY_LACK = ("pixel_mean", "pixel_std", "empty_weight", "num_batches_tracked")


def resizing(config: Any) -> tuple[int, int] | None:
    """(shortest edge, longest at most) of a configuration's test images, None where it does not say."""
    given = getattr(config, "INPUT", None)
    if given is None:
        return None
    return int(given.MIN_SIZE_TEST), int(given.MAX_SIZE_TEST)


def class_names(model: nn.Module, count: int, labels: Sequence[str]) -> list[str]:
    """The user's, else detectron2's metadata, else numbers. Raises UsageError for a wrong count."""
    if labels and len(labels) != count:
        raise UsageError(f"{len(labels)} labels for {count} classes")
    told = getattr(getattr(model, "metadata", None), "thing_classes", None)
    names = list(labels) or (list(told) if told and len(told) == count else [])
    return [str(name) for name in names] or [f"class {i}" for i in range(count)]
