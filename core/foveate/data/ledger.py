"""Which commit batches are safely on disk: small JSON files beside the store, written after the data.

``run.zarr.ledger/000003.json`` exists if and only if every shard of batch 3 was written and flushed before.
A killed job therefore resumes from the ledger alone, and nothing is lost or written twice. (Inside the
zarr root such files would make every reader complain.) A clip that is written a block of frames at a time has
an entry for each block, ``000003.000012.json``, and one for itself when it is complete.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from foveate.errors import StoreError


class Ledger:
    """The entries of one product (the capture itself: ``product=""``) of one store."""

    def __init__(self, store: Path, product: str = "") -> None:
        self.store = Path(store)
        self.folder = ledger_folder(self.store) / product if product else ledger_folder(self.store)

    def entries(self) -> dict[int, dict[str, Any]]:
        """Batch number -> entry. Raises StoreError where one cannot be read."""
        whole = [path for path in sorted(self.folder.glob("[0-9]*.json")) if "." not in path.stem]
        return {int(path.stem): _read(path) for path in whole}

    def blocks(self) -> dict[tuple[int, int], dict[str, Any]]:
        """(batch, block of frames) -> entry, of batches that are written a block at a time."""
        parts = sorted(self.folder.glob("[0-9]*.[0-9]*.json"))
        keys = [tuple(map(int, path.stem.split("."))) for path in parts]
        return {(key[0], key[1]): _read(path) for key, path in zip(keys, parts, strict=True)}

    def commit(
        self, number: int, files: Iterable[Path], entry: Mapping[str, Any], *, block: int | None = None
    ) -> None:
        """Flush ``files`` to disk, then record the batch (or one block of it) with their sizes and checksums."""
        sums = {}
        folders = set()
        for path in files:
            sums[path.relative_to(self.store).as_posix()] = flush(path)
            folders.add(path.parent)
        for folder in folders:
            _flush_folder(folder)
        where = {"batch": number} if block is None else {"batch": number, "block": block}
        name = f"{number:06d}.json" if block is None else f"{number:06d}.{block:06d}.json"
        write_json(self.folder / name, {**where, **entry, "files": sums})

    def forget(self, number: int) -> None:
        """Drop the entries of one batch, before it is written again."""
        (self.folder / f"{number:06d}.json").unlink(missing_ok=True)
        for part in self.folder.glob(f"{number:06d}.[0-9]*.json"):
            part.unlink()

    def clear(self) -> None:
        """Forget every entry of this product."""
        for path in self.folder.glob("[0-9]*.json"):
            path.unlink()


def _read(path: Path) -> dict[str, Any]:
    try:
        entry: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(
            f"ledger {path}: not readable ({error})", remedy="delete that file and resume: it is redone"
        ) from None
    return entry


def ledger_folder(store: Path) -> Path:
    """The folder beside a store that holds its ledger."""
    return store.with_name(store.name + ".ledger")


def checksum(path: Path) -> dict[str, int]:
    """Size and CRC-32 of a file."""
    crc = size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return {"size": size, "crc32": crc}


def flush(path: Path) -> dict[str, int]:
    """Force a file to disk (zarr replaces atomically but does not) and return its size and CRC-32."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return checksum(path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is either there whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".tmp")
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps(content, ensure_ascii=False, separators=(",", ":")))
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    _flush_folder(path.parent)


def sweep(store: Path) -> int:
    """Remove what a killed writer left half-written; returns how many files."""
    left = [*store.rglob("*.partial"), *ledger_folder(store).rglob("*.tmp")]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # directories cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
