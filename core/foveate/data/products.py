"""Adding to a run: metrics, attributions, scores. Each product has its own identity and its own ledger.

A long job writes as it goes: blocks may come in any size and order, are gathered into whole commit batches,
and a job that was killed finds out with :meth:`ProductWriter.pending` what is left to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import zarr

from foveate.data.arrays import BatchedArrays, empty_block
from foveate.data.labels import Coordinate
from foveate.data.layout import ArraySpec, commit_batch
from foveate.data.ledger import Ledger
from foveate.data.schema import digest
from foveate.data.store import (
    allocate,
    building,
    consolidate,
    write_coordinates,
)
from foveate.errors import StoreError, UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

OWN = ("samples", "predictions", "sites", "tracks")
"""Groups of the capture itself."""


def check_name(name: str) -> None:
    """Raise UsageError where ``name`` cannot be a product's place in a run."""
    parts = name.split("/")
    if parts[0] in OWN or any(not part or part.startswith(".") for part in parts):
        raise UsageError(
            f"product {name!r}: not a name for a product", remedy="for instance 'attributions/rollout'"
        )


class ProductWriter:
    """A context manager that fills one preallocated product of a run.

    ``specs`` are relative to the product's group. An existing product of the same identity (specs,
    attributes, coordinates, run) is continued; any other stands in the way unless ``overwrite``.
    """

    def __init__(
        self,
        store: Path,
        name: str,
        specs: Sequence[ArraySpec],
        coordinates: Mapping[str, Coordinate],
        attrs: Mapping[str, Any],
        *,
        overwrite: bool = False,
    ) -> None:
        check_name(name)
        self.store, self.name = Path(store), name
        self._specs = tuple(specs)
        self._ledger = Ledger(self.store, name)
        self._start(coordinates, attrs, overwrite)
        self.written = self._already_written()
        """Which samples are stored, bool ``(sample,)``."""
        self._open: dict[int, dict[str, NDArray[Any]]] = {}
        self._fresh: dict[int, set[int]] = {}

    def pending(self, positions: Sequence[int] | NDArray[np.integer[Any]]) -> NDArray[np.intp]:
        """Those of ``positions`` that are not stored yet."""
        wanted = np.asarray(positions, dtype=np.intp)
        return wanted[~self.written[wanted]]

    def restart(self) -> None:
        """Take every sample as not stored, for values that are to be computed anew; cut off, it is continued."""
        self._ledger.clear()
        self.written[:] = False

    def write(
        self, at: int | Sequence[int] | NDArray[np.integer[Any]], blocks: Mapping[str, NDArray[Any]]
    ) -> None:
        """Give values for samples: ``at`` is the first position of a run of them, or all positions.

        Each block is ``(samples given, ...)``. Raises UsageError where names or shapes do not fit.
        """
        positions = self._positions(at, blocks)
        for row, position in enumerate(positions):
            number = position // self._arrays.batch
            buffer = self._buffer(number)
            for spec in self._specs:
                buffer[self._path(spec)][position % self._arrays.batch] = np.asarray(blocks[spec.name])[row]
            self._fresh[number].add(position)
        for number in list(self._open):
            if self._is_full(number) or number != positions[-1] // self._arrays.batch:
                self._flush(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number in list(self._open):
            self._flush(number)
        consolidate(self.store)

    # ------------------------------------------------------------------------------------ internals

    def _start(self, coordinates: Mapping[str, Coordinate], attrs: Mapping[str, Any], overwrite: bool) -> None:
        root = zarr.open_group(self.store, mode="r", use_consolidated=False)
        identity = digest(
            {
                "run": root.attrs["config_hash"],
                "arrays": [(s.name, s.dims, s.shape, s.dtype) for s in self._specs],
                "attrs": attrs,
                "coordinates": {name: (c.dims, np.asarray(c.values)) for name, c in coordinates.items()},
            }
        )
        there = root.get(self.name)
        same = isinstance(there, zarr.Group) and there.attrs.get("product_hash") == identity
        if there is not None and not same and not overwrite:
            raise StoreError(
                f"{self.store}: {self.name} is there already, made with other settings",
                remedy="write it under another name, or ask for it to be overwritten",
            )
        if same and isinstance(there, zarr.Group):
            batch = int(str(there.attrs["commit_batch"]))
        else:
            batch = commit_batch(self._specs, self._specs[0].shape[0])
            self._build(coordinates, {**attrs, "product_hash": identity, "commit_batch": batch}, batch)
        placed = [ArraySpec(self._path(s), s.dims, s.shape, s.dtype, s.attrs) for s in self._specs]
        self._arrays = BatchedArrays(self.store, placed, batch, self._ledger)

    def _build(self, coordinates: Mapping[str, Coordinate], attrs: Mapping[str, Any], batch: int) -> None:
        self._ledger.clear()
        with building(self.store, self.name) as scratch:
            group = zarr.open_group(scratch, mode="r+").require_group(self.name)
            write_coordinates(group, coordinates)
            group.attrs.update(attrs)
            for spec in self._specs:
                allocate(group, spec, batch)

    def _already_written(self) -> NDArray[np.bool_]:
        written = np.zeros(self._arrays.samples, bool)
        for entry in self._ledger.entries().values():
            written[entry["written"]] = True
        return written

    def _positions(self, at: Any, blocks: Mapping[str, NDArray[Any]]) -> list[int]:
        if set(blocks) != {spec.name for spec in self._specs}:
            raise UsageError(
                f"product {self.name}: expected blocks {sorted(s.name for s in self._specs)}, got {sorted(blocks)}"
            )
        count = len(np.asarray(next(iter(blocks.values()))))
        positions = list(range(at, at + count)) if isinstance(at, (int, np.integer)) else [int(i) for i in at]
        if not all(0 <= p < self._arrays.samples for p in positions):
            raise UsageError(f"product {self.name}: positions {positions} are not within {self._arrays.samples}")
        for spec in self._specs:
            expected, got = (len(positions), *spec.shape[1:]), np.asarray(blocks[spec.name]).shape
            if got != expected:
                raise UsageError(f"product {self.name}, {spec.name}: expected shape {expected}, got {got}")
        return positions

    def _path(self, spec: ArraySpec) -> str:
        return f"{self.name}/{spec.name}"

    def _buffer(self, number: int) -> dict[str, NDArray[Any]]:
        if number not in self._open:
            part = self._arrays.batches[number]
            stored = self.written[part].any()
            self._open[number] = (
                self._arrays.read(number)
                if stored
                else {self._path(s): empty_block(s, part.stop - part.start) for s in self._specs}
            )
            self._fresh[number] = set()
        return self._open[number]

    def _is_full(self, number: int) -> bool:
        part = self._arrays.batches[number]
        return all(self.written[p] or p in self._fresh[number] for p in range(part.start, part.stop))

    def _flush(self, number: int) -> None:
        self.written[list(self._fresh.pop(number))] = True
        part = self._arrays.batches[number]
        known = [p for p in range(part.start, part.stop) if self.written[p]]
        # An older entry would vouch for shards that are about to change.
        self._ledger.forget(number)
        self._arrays.write(number, self._open.pop(number), {"written": known})


def as_coordinate(name: str, value: Any) -> Coordinate:
    """A coordinate from a Coordinate, ``(dims, values[, attrs])``, an xarray object or values along ``name``."""
    if isinstance(value, Coordinate):
        return value
    if hasattr(value, "dims") and hasattr(value, "attrs"):
        return Coordinate(tuple(map(str, value.dims)), np.asarray(value), dict(value.attrs))
    if isinstance(value, tuple) and len(value) in (2, 3) and isinstance(value[0], (str, tuple, list)):
        dims = (value[0],) if isinstance(value[0], str) else tuple(value[0])
        return Coordinate(dims, np.asarray(value[1]), dict(value[2]) if len(value) == 3 else {})
    return Coordinate((name,), np.asarray(value))
