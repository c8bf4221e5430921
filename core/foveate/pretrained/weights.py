"""Reading weights: checked files, hashes, and no pickle that could run code.

Random numbers standing in for missing weights, NaN, or a checkpoint of another shape give beautiful and
meaningless maps, so each is an error here rather than a warning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import nn

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_BLOCK = 1 << 22


def convert_command(path: Path | str) -> str:
    """The command that turns a pickled checkpoint into safetensors (it runs the pickle: trust it first)."""
    target = Path(path).with_name("model.safetensors") if Path(path).suffix else Path(path) / "model.safetensors"
    return f"python -m foveate_vit.convert --trust-this-file {path} {target}"


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, safetensors or a pickle that holds nothing but tensors.

    Raises ModelError where the file is unreadable, or where ``torch.load(weights_only=True)`` refuses it.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"weights {path}: not a readable safetensors file: {error}") from error
    return _read_pickle(path)


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    import pickle

    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise refused_pickle(path, error) from error
    nested = next((loaded[key] for key in ("state_dict", "model") if key in loaded), loaded)
    return {name: value for name, value in nested.items() if isinstance(value, torch.Tensor)}


def refused_pickle(path: Path | str, error: BaseException) -> ModelError:
    """The error for a checkpoint that could run code (or is broken), with the way out."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return ModelError(
        f"weights {path}: refused by torch.load(weights_only=True): {first[:200]}",
        remedy=f"a pickle can run any code; if you trust its author, convert it once: {convert_command(path)}",
    )


def check_keys(
    name: str, missing: Iterable[str], mismatched: Iterable[Any], tolerated: Iterable[str] = ()
) -> None:
    """Raise ModelError where parameters kept random values because the checkpoint lacks them.

    ``tolerated`` are name parts of parameters that nothing here reads (the unused pooler of a ViT).
    """
    absent = [key for key in missing if not any(part in key for part in tolerated)]
    wrong = [str(entry) for entry in mismatched]
    if absent or wrong:
        what = f"{len(absent)} parameters are missing" if absent else f"{len(wrong)} have another shape"
        shown = ", ".join((absent or wrong)[:4])
        raise ModelError(
            f"weights of {name}: {what} ({shown}{', ...' if len(absent or wrong) > 4 else ''})",
            remedy="check that weights and config.json belong together, or name the right architecture=...",
        )


def check_finite(name: str, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raise ModelError where any weight is NaN or infinite."""
    for key, value in tensors:
        if value.is_floating_point() and not bool(value.isfinite().all()):
            bad = int((~value.isfinite()).sum())
            raise ModelError(
                f"weights of {name}: {bad} of {value.numel()} numbers in {key!r} are NaN or infinite",
                remedy="download or convert the checkpoint again; a half-written or overflowed file looks so",
            )


def all_tensors(module: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    """Parameters and buffers by name."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def weight_files(folder: Path) -> list[Path]:
    """Files that hold weights in a model folder: the safetensors, else the pickles."""
    safe = sorted(folder.glob("*.safetensors"))
    return safe or sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)


def sha256_of(files: Iterable[Path]) -> str:
    """Hash of one file; for several, the hash over their hashes in name order. Empty without files."""
    hashes = [_hash(path) for path in sorted(files)]
    if len(hashes) < 2:
        return "".join(hashes)
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _hash(path: Path) -> str:
    real = path.resolve()
    if len(real.name) == 64 and real.parent.name == "blobs":  # the hub cache names large files by their hash
        return real.name
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def check_hash(name: str, expected: Mapping[str, str] | str | None, found: str) -> None:
    """Raise ModelError where the registry knows another hash. Nothing is compared where either is unknown."""
    if isinstance(expected, str) and expected and found and expected != found:
        raise ModelError(
            f"weights of {name}: sha256 {found[:16]}... but the registry expects {expected[:16]}...",
            remedy="download the weights again, or correct sha256 in the registry row if they changed on purpose",
        )
