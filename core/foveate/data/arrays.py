"""Filling a run: preallocated zarr v3 arrays, written one whole commit at a time.

Only whole shards are written, behind our own check: appending and partial shard writes lose data without a word
when a writer dies or two of them meet. A commit is a batch of samples or, of long clips, a block of frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from foveate.data.layout import ArraySpec, batches
from foveate.data.ledger import Ledger
from foveate.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRING = np.dtypes.StringDType()


class BatchedArrays:
    """Preallocated arrays of one store that share a commit batch and a ledger.

    ``specs`` name arrays by their path in the store; ``batch`` is the number of samples of a commit batch.
    ``frames`` is the number of frames of a commit, where long clips are written a block at a time.
    """

    def __init__(
        self, store: Path, specs: Iterable[ArraySpec], batch: int, ledger: Ledger, frames: int | None = None
    ) -> None:
        self.store, self.batch, self.ledger, self.frames = Path(store), batch, ledger, frames
        self.specs = {spec.name: spec for spec in specs}
        # An array keeps the setting it was opened under: without it, testing for empty chunks costs more
        # than compressing them, and a batch of failed samples would leave no file.
        with zarr.config.set({"array.write_empty_chunks": True}):
            root = zarr.open_group(self.store, mode="r+", use_consolidated=False)
            self.arrays = {name: _array(root, name) for name in self.specs}
        self.samples = next(iter(self.arrays.values())).shape[0]

    @property
    def batches(self) -> list[slice]:
        """All commit batches."""
        return batches(self.samples, self.batch)

    def write(self, number: int, blocks: Mapping[str, NDArray[Any]], entry: Mapping[str, Any]) -> None:
        """Write batch ``number`` of every array, flush it, and record it in the ledger with ``entry``.

        Each block is ``(samples of the batch, ...)``. Raises StoreError where it is not the whole batch.
        """
        part = self.batches[number]
        for name, spec in self.specs.items():
            _check_whole(spec, self.batch, part, blocks.get(name))
        for name, array in self.arrays.items():
            array[part] = _as_stored(blocks[name], self.specs[name].dtype)
        files = [path for name in self.specs for path in self.files(name, number)]
        self.ledger.commit(number, files, {"start": part.start, "stop": part.stop, **entry})

    def write_block(
        self, number: int, block: int, parts: Mapping[str, NDArray[Any]], entry: Mapping[str, Any]
    ) -> None:
        """Write one block of frames of sample ``number`` of the arrays in ``parts``, flush it, record it.

        Each part is ``(1, ...)`` with the frames of the block, of which the last may have fewer.
        """
        files = [path for name, part in parts.items() for path in self._put(name, number, block, part)]
        self.ledger.commit(number, files, entry, block=block)

    def finish(
        self,
        number: int,
        whole: Mapping[str, NDArray[Any]],
        blocks: Iterable[tuple[int, Mapping[str, NDArray[Any]]]],
        entry: Mapping[str, Any],
    ) -> None:
        """Write what a clip has once, and ``blocks`` (number, parts) that are known at its end only; record it."""
        files = [path for name, part in whole.items() for path in self._put(name, number, None, part)]
        for block, parts in blocks:
            files += [path for name, part in parts.items() for path in self._put(name, number, block, part)]
        self.ledger.commit(number, files, {"start": number, "stop": number + 1, **entry})

    def erase(self, number: int) -> None:
        """Forget one batch and remove its files, so that its values are those of an empty array again."""
        self.ledger.forget(number)
        for name in self.specs:
            for path in self.files(name, number):
                path.unlink(missing_ok=True)

    def _put(self, name: str, number: int, block: int | None, part: NDArray[Any]) -> list[Path]:
        """Write whole files of one array: a sample, or the frames of one block of it."""
        spec, length = self.specs[name], 1
        index: list[slice] = [slice(number, number + 1), *(slice(None) for _ in spec.shape[1:])]
        shape = [1, *spec.shape[1:]]
        if block is not None and self.frames is not None:
            i = spec.dims.index("frame")
            start, stop = block * self.frames, min((block + 1) * self.frames, spec.shape[i])
            index[i], shape[i], length = slice(start, stop), stop - start, part.shape[i]
        if self.batch != 1 or part.ndim != len(shape) or (block is None and tuple(part.shape) != tuple(shape)):
            raise StoreError(f"array {name}: expected a whole sample of shape {tuple(shape)}, got {part.shape}")
        if block is not None and length < shape[i]:
            # The end of a clip: a file is written whole, and frames that do not exist hold the fill value.
            margin = [(0, want - have) for want, have in zip(shape, part.shape, strict=True)]
            part = np.pad(part, margin, constant_values=fill_value(spec.dtype))
        self.arrays[name][tuple(index)] = _as_stored(part, spec.dtype)
        return self.files(name, number, block)

    def read(self, number: int) -> dict[str, NDArray[Any]]:
        """Batch ``number`` of every array, as it is on disk."""
        return {name: np.asarray(array[self.batches[number]]) for name, array in self.arrays.items()}

    def files(self, name: str, number: int, block: int | None = None) -> list[Path]:
        """The files that hold batch ``number`` of one array, or one block of its frames."""
        array = self.arrays[name]
        sides = array.shards or array.chunks
        counts = [range(-(-n // side)) for n, side in zip(array.shape[1:], sides[1:], strict=True)]
        if block is not None:
            counts[self.specs[name].dims.index("frame") - 1] = range(block, block + 1)
        keys = product([number], *counts)
        return [self.store / name / array.metadata.encode_chunk_key(key) for key in keys]


def _array(root: zarr.Group, name: str) -> Any:
    array = root.get(name)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"array {name}: not in the store", remedy="the store is damaged: capture into a new path")
    return array


def _check_whole(spec: ArraySpec, batch: int, part: slice, block: NDArray[Any] | None) -> None:
    """The rule that keeps data: a write covers every sample of its commit batch, of the allocated shape."""
    whole = (part.stop - part.start, *spec.shape[1:])
    if part.start % batch or block is None or tuple(block.shape) != whole:
        got = "nothing" if block is None else f"shape {tuple(block.shape)}"
        raise StoreError(
            f"array {spec.name}: samples {part.start} to {part.stop} are one commit batch and are written whole:"
            f" expected shape {whole}, got {got}",
            remedy="gather the batch first (rows that are not known stay NaN)",
        )


def _as_stored(block: NDArray[Any], dtype: str) -> NDArray[Any]:
    return np.asarray(block).astype(STRING if dtype == "string" else dtype)


def stored_specs(store: Path, names: Iterable[str]) -> list[ArraySpec]:
    """The arrays of a store as they were allocated."""
    root = zarr.open_group(store, mode="r", use_consolidated=False)
    return [_stored_spec(name, _array(root, name)) for name in names]


def _stored_spec(name: str, array: Any) -> ArraySpec:
    dtype = "string" if np.dtype(array.dtype).kind in "TO" else str(np.dtype(array.dtype).name)
    return ArraySpec(name, tuple(array.metadata.dimension_names), tuple(array.shape), dtype)


def empty_block(spec: ArraySpec, count: int) -> NDArray[Any]:
    """``count`` samples of one array where nothing is known: NaN, -1 (indices), False or an empty string."""
    dtype: Any = object if spec.dtype == "string" else spec.dtype
    return np.full((count, *spec.shape[1:]), fill_value(spec.dtype), dtype=dtype)


def fill_value(dtype: str) -> Any:
    """What stands for "not captured": NaN, -1, 0 (unsigned), False or an empty string."""
    if dtype == "string":
        return ""
    kind = np.dtype(dtype).kind
    return {"f": np.nan, "i": -1, "u": 0, "b": False}[kind]
