"""From a registry row to a model of transformers: hub id, local folder, one file, or random weights.

``trust_remote_code`` stays off, pickles are read as tensors only, and nothing is filled in silently: the
configuration comes from the model's own ``config.json`` (or from ``config=`` for random weights), never
from what the registry expects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import MissingDependencyError, ModelError
from foveate.interfaces import ModelCard
from foveate.plugins import hub
from foveate.pretrained import weights as files

if TYPE_CHECKING:
    import torch
    from torch import nn

Adapt = Callable[[Any, str, Any], tuple[Any, Mapping[str, Any] | None]]
"""Takes configuration, place of the weights and registry row; gives a configuration and its tensors, or None."""
_UNREAD = ("pooler.",)
"""Parameters that no readout here uses: checkpoints without a ViT pooler are complete."""
_NOT_OURS = ("Backbone", "ForMaskedImageModeling", "ForPreTraining")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model in eval mode, where it came from, and the files beside it.

    ``beside`` is the folder, file or hub id whose preprocessor and tokenizer belong to the model: for random
    weights that of the trained twin, if there is one, so that both see the same pixels.
    """

    model: nn.Module
    place: str
    card: ModelCard
    beside: str | None

    def side_file(self, name: str) -> Mapping[str, Any] | None:
        """A JSON file beside the weights (``preprocessor_config.json``), or None where there is none."""
        return None if self.beside is None else read_side_file(self.beside, name, self.card.revision)


def load_model(
    row: Any,
    *,
    adapter: str,
    weights: Path | str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    architecture: str | None = None,
    config: Mapping[str, Any] | Path | str | None = None,
    seed: int = 0,
    attention: str | None = "sdpa",
    adapt: Adapt | None = None,
) -> Loaded:
    """Open ``row`` as ``architecture`` (a class of transformers; by default what its config.json names).

    ``config`` is a mapping, a folder or a JSON file for weights that bring no config.json of their own:
    random ones (``seed`` fixes them) and single files. ``attention`` is the implementation to ask for, None
    leaves the choice to transformers. ``adapt`` may change the configuration and bring the tensors that fit it.
    Raises ModelError, MissingDependencyError.
    """
    transformers = import_transformers()
    place = str(weights or getattr(row, "weights", None) or row.id)
    beside = place if place != "random" else _trained_twin(row, config)
    with _quiet(transformers, local=place == "random" or Path(place).exists()):
        settings = _config(row, beside, config)
        _check_family(row, settings)
        cls = _architecture(transformers, row, settings, architecture)
        settings, tensors = (adapt or _unchanged)(_part_for(cls, settings), place, row)
        if place == "random":
            model = _random(cls, settings, seed)
        else:
            model = _pretrained(cls, settings, place, row, attention, tensors)
    model = model.to(device=device, dtype=torch_dtype(dtype)).eval().requires_grad_(False)
    files.check_finite(row.id, files.all_tensors(model))
    return Loaded(model, place, _card(row, place, adapter, seed, model), beside)


@contextmanager
def _quiet(transformers: Any, *, local: bool) -> Iterator[None]:
    """No advice about configurations, and no progress bars for what is on disk (downloads keep theirs)."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    if local:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def import_transformers() -> Any:
    """The transformers library. Raises MissingDependencyError with the install command."""
    try:
        import transformers
    except ImportError as error:
        raise MissingDependencyError(
            "vision transformers are opened with the transformers library, which is not installed",
            remedy='pip install "foveate[vit]"',
        ) from error
    return transformers


def torch_dtype(name: str) -> torch.dtype:
    """``float32``, ``float16``, ``bfloat16`` or ``float64``. Raises ModelError for anything else."""
    import torch

    if name not in ("float32", "float16", "bfloat16", "float64"):
        raise ModelError(f"dtype {name!r} is not known", remedy="float32, float16, bfloat16 or float64")
    found: torch.dtype = getattr(torch, name)
    return found


def read_side_file(place: str, name: str, revision: str = "") -> Mapping[str, Any] | None:
    """Parsed JSON beside a model, in a folder or on the hub; None where it does not exist."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent if Path(place).is_file() else None
    if folder is not None:
        return _read_json(folder / name) if (folder / name).is_file() else None
    from transformers.utils import cached_file

    found = cached_file(
        place,
        name,
        revision=revision or None,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return _read_json(Path(found)) if found else None


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


# ------------------------------------------------------------------------------- configuration


def _trained_twin(row: Any, config: Mapping[str, Any] | Path | str | None) -> str | None:
    """Where the files of random weights' trained twin are, or None where ``config`` says what to build.

    The row's own ``config`` is a stand-in for machines that never saw the checkpoint: it yields to the
    checkpoint's files, and only a config that the user gives overrules them.
    """
    shipped = getattr(row, "weights", None)
    stand_in = (getattr(row, "options", None) or {}).get("config")
    if config is not None and config is not stand_in:
        return None
    if shipped is not None or Path(row.id).is_dir():
        return str(shipped or row.id)
    if row.id in (row.family.id, row.family.source):
        return None
    return row.id if stand_in is None or _is_cached(row) else None


def _is_cached(row: Any) -> bool:
    from transformers.utils import cached_file

    found = cached_file(
        row.id,
        "config.json",
        revision=getattr(row, "revision", None) or None,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found is not None


def _config(row: Any, beside: str | None, given: Mapping[str, Any] | Path | str | None) -> Any:
    """The config.json that belongs to the weights; ``given`` only where they bring none."""
    if beside is None:  # random weights of no checkpoint: as given, or the default of a bare family
        return _config_at(row, given if given is not None else {})
    own = Path(beside).parent if Path(beside).is_file() else Path(beside)
    if (own / "config.json").is_file():
        return _config_at(row, own)
    if not own.exists():
        return _config_from_hub(row, beside)
    if given is None:
        raise ModelError(f"{own}: no config.json", remedy="give a folder saved by save_pretrained, or config=...")
    return _config_at(row, given)


def _config_at(row: Any, given: Mapping[str, Any] | Path | str) -> Any:
    if isinstance(given, Mapping):
        return _config_from_mapping(row, given)
    path = Path(given)
    if path.is_dir():
        return _config_from_hub(row, str(path))  # from_pretrained reads folders too
    return _config_from_mapping(row, _read_json(path))


def _config_from_mapping(row: Any, values: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    fields = dict(values)
    kind = fields.pop("model_type", None) or next(iter(row.family.model_types), None)
    if kind is None:
        raise ModelError(f"config of {row.id}: model_type is missing", remedy="for instance model_type = 'clip'")
    try:
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"config of {row.id}: {error}", remedy="check model_type and its fields") from error


def _config_from_hub(row: Any, place: str) -> Any:
    from transformers import AutoConfig

    revision = getattr(row, "revision", None) or None
    try:
        if not Path(place).exists():
            hub.ask(place, revision=revision)
        return AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unreachable(place, error) from error


def _unreachable(place: str, error: BaseException) -> ModelError:
    first = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
    return ModelError(
        f"cannot open {place!r}: {first}",
        remedy=f"where there is a network: hf download {place} --local-dir DIR; then use DIR as the model. "
        'For random weights: weights="random" with config={...}',
    )


def _check_family(row: Any, config: Any) -> None:
    known = tuple(row.family.model_types)
    if known and config.model_type not in known:
        raise ModelError(
            f"{row.id}: config.json says model_type {config.model_type!r}, "
            f"but family {row.family.id!r} opens {', '.join(known)}",
            remedy="foveate models lists the families; name another source=...",
        )


def _architecture(transformers: Any, row: Any, config: Any, wanted: str | None) -> Any:
    """The class to build: the option, what config.json names, or the family's default for this model type."""
    named = [n for n in (getattr(config, "architectures", None) or []) if not n.endswith(_NOT_OURS)]
    default = dict(row.family.layout.get("architectures", {})).get(config.model_type)
    name = wanted or next(iter(named), None) or default
    found = getattr(transformers, name, None) if name else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ModelError(
            f"{row.id}: transformers {transformers.__version__} has no architecture {name!r}",
            remedy="name one with architecture=..., or install a newer transformers",
        )
    return found


def _part_for(cls: Any, config: Any) -> Any:
    """A tower alone takes its own part of the whole model's configuration."""
    wanted = cls.config_class
    if isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in ("vision_config", "text_config"))
    found = next((part for part in parts if isinstance(part, wanted)), None)
    if found is None:
        raise ModelError(f"{cls.__name__} takes {wanted.__name__}, but config.json is {type(config).__name__}")
    return found


# ------------------------------------------------------------------------------- weights


def _random(cls: Any, config: Any, seed: int) -> nn.Module:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built: nn.Module = cls(config)
    return built


def _unchanged(config: Any, place: str, row: Any) -> tuple[Any, None]:
    return config, None


def _pretrained(
    cls: Any,
    config: Any,
    place: str,
    row: Any,
    attention: str | None,
    tensors: Mapping[str, torch.Tensor] | None,
) -> nn.Module:
    path = Path(place)
    if tensors is None and path.is_file():
        tensors = files.read_state(path)
    try:
        model, info = cls.from_pretrained(
            None if tensors is not None else place,
            config=config,
            state_dict=tensors,
            revision=getattr(row, "revision", None) or "main",
            trust_remote_code=False,
            output_loading_info=True,
            dtype="float32",
            **({} if attention is None else {"attn_implementation": attention}),
        )
    except Exception as error:  # transformers raises plain OSError, ValueError, RuntimeError, UnpicklingError ...
        raise _cannot_load(place, error) from error
    files.check_keys(row.id, info["missing_keys"], info["mismatched_keys"], tolerated=_UNREAD)
    loaded: nn.Module = model
    return loaded


def _cannot_load(place: str, error: Exception) -> ModelError:
    text = f"{type(error).__name__} {error}"
    if any(word in text for word in ("weights_only", "Unpickling", "WeightsUnpickler")):
        folder = Path(place)
        pickles = files.weight_files(folder) if folder.is_dir() else [folder]
        return files.refused_pickle(pickles[0] if pickles else folder, error)
    return _unreachable(place, error)


def _card(row: Any, place: str, adapter: str, seed: int, model: nn.Module) -> ModelCard:
    from importlib.metadata import version

    found = _hash_of_place(place, getattr(row, "revision", "") or "")
    files.check_hash(row.id, getattr(row, "sha256", None), found)
    return ModelCard(
        id=row.id,
        source=place,
        adapter=adapter,
        revision=str(getattr(row, "revision", "") or getattr(model.config, "_commit_hash", None) or ""),
        weights_sha256=found or f"random:{type(model).__name__}:{seed}",
        licence=getattr(row, "licence", "unverified") or "unverified",
        family=row.family.id,
        provenance=getattr(row, "provenance", "") or "",
        versions={name: version(name) for name in ("torch", "transformers")},
        notes=("random weights: attention means nothing here",) if place == "random" else (),
    )


def _hash_of_place(place: str, revision: str) -> str:
    path = Path(place)
    if place == "random":
        return ""
    if path.is_file():
        return files.sha256_of([path])
    if path.is_dir():
        return files.sha256_of(files.weight_files(path))
    from transformers.utils import cached_file

    found = cached_file(
        place,
        "model.safetensors",
        revision=revision or None,
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return files.sha256_of([Path(found)]) if found else ""
