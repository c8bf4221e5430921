"""Writing a run: preallocated zarr v3 arrays, filled one whole commit batch at a time.

Every array is allocated at its full size before the first sample is computed, and only whole shards are
written, behind our own check: appending and partial shard writes lose data without a word when a writer dies
or two of them meet. Groups are built beside the store and moved into place, so that none is half there.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import BloscCodec

from foveate.data.labels import Coordinate
from foveate.data.layout import ArraySpec, Cut, batches, cut
from foveate.data.ledger import Ledger, ledger_folder, sweep, write_json
from foveate.data.schema import check_version, plain
from foveate.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRING = np.dtypes.StringDType()


class BatchedArrays:
    """Preallocated arrays of one store that share a commit batch and a ledger.

    ``specs`` name arrays by their path in the store; ``batch`` is the number of samples of a commit batch.
    """

    def __init__(self, store: Path, specs: Iterable[ArraySpec], batch: int, ledger: Ledger) -> None:
        self.store, self.batch, self.ledger = Path(store), batch, ledger
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

    def read(self, number: int) -> dict[str, NDArray[Any]]:
        """Batch ``number`` of every array, as it is on disk."""
        return {name: np.asarray(array[self.batches[number]]) for name, array in self.arrays.items()}

    def files(self, name: str, number: int) -> list[Path]:
        """The files that hold batch ``number`` of one array."""
        array = self.arrays[name]
        sides = array.shards or array.chunks
        counts = [-(-n // side) for n, side in zip(array.shape[1:], sides[1:], strict=True)]
        keys = product([number], *(range(count) for count in counts))
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


# ------------------------------------------------------------------------------------- building groups


def allocate(group: zarr.Group, spec: ArraySpec, batch: int) -> None:
    """Create one preallocated array below ``group``."""
    layout: Cut = cut(spec, batch)
    text = spec.dtype == "string"
    group.create_array(
        spec.name,
        shape=spec.shape,
        chunks=layout.chunks,
        shards=layout.shards,
        dtype=STRING if text else spec.dtype,
        fill_value=fill_value(spec.dtype),
        # Fastest good lossless codec on real attention: see docs/data.md.
        compressors="auto" if text else [BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle")],
        dimension_names=spec.dims,
        attributes=plain(spec.attrs),
    )


def write_coordinates(
    group: zarr.Group, coordinates: Mapping[str, Coordinate], further: Sequence[str] = ()
) -> None:
    """Write coordinate arrays whole, and name them in ``coordinates`` so that xarray knows them as such.

    ``further`` names preallocated arrays that are coordinates, too (token tables that differ by sample).
    """
    for name, coordinate in coordinates.items():
        values = np.asarray(coordinate.values)
        group.create_array(
            name,
            data=values.astype(STRING) if values.dtype.kind in "OUT" else values,
            dimension_names=coordinate.dims,
            attributes=plain(coordinate.attrs),
        )
    named = [*(name for name, coordinate in coordinates.items() if coordinate.dims != (name,)), *further]
    if named:
        group.attrs["coordinates"] = " ".join(named)


def create(
    path: Path,
    attrs: Mapping[str, Any],
    specs: Sequence[ArraySpec],
    batch: int,
    groups: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Coordinate], Sequence[str]]],
    tables: Mapping[str, xr.Dataset],
) -> None:
    """Build a run with everything allocated and no sample computed yet, then move it into place.

    ``groups``: group path -> (attributes, coordinates, names of arrays in ``specs`` that are coordinates);
    ``tables``: group path -> small whole dataset.
    Raises StoreError where something is at ``path`` already or nothing can be written there.
    """
    path = Path(path)
    if path.exists():
        raise StoreError(f"{path}: exists already", remedy="choose another path, or remove it first")
    new = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in (new, ledger_folder(path)):
            shutil.rmtree(stale, ignore_errors=True)
        root = zarr.create_group(new, zarr_format=3, attributes=plain(attrs))
        for name, (notes, coordinates, further) in groups.items():
            write_coordinates(root.require_group(name), coordinates, further)
            root[name].attrs.update(plain(notes))
        for spec in specs:
            allocate(root, spec, batch)
        for name, table in tables.items():
            _write_table(new, name, table)
        consolidate(new)
        new.rename(path)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise StoreError(
            f"{path}: cannot be written ({error.strerror or error})", remedy="choose a folder you may write to"
        ) from error


def finalise(path: Path, tables: Mapping[str, xr.Dataset], attrs: Mapping[str, Any]) -> None:
    """Write the small tables from what the ledger knows, note ``attrs`` at the root, consolidate."""
    for name, table in tables.items():
        replace_group(path, name, table)
    update_attrs(path, attrs)


def replace_group(store: Path, name: str, table: xr.Dataset) -> None:
    """Write a whole dataset as group ``name``, in place of what stood there; never half there."""
    with building(store, name) as scratch:
        _write_table(scratch, name, table)


class building:  # noqa: N801  (used as a context manager only)
    """``with building(store, name) as scratch``: make group ``name`` in an empty store, then move it in."""

    def __init__(self, store: Path, name: str) -> None:
        self.store, self.name = Path(store), name
        self.scratch = ledger_folder(self.store) / f".new-{name.replace('/', '-')}"

    def __enter__(self) -> Path:
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.parent.mkdir(parents=True, exist_ok=True)
        zarr.create_group(self.scratch, zarr_format=3)
        return self.scratch

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            _unconsolidate(self.store)
            root = zarr.open_group(self.store, mode="r+", use_consolidated=False)
            parent = self.name.rpartition("/")[0]
            if parent:
                root.require_group(parent)
            place = self.store / self.name
            shutil.rmtree(place, ignore_errors=True)
            (self.scratch / self.name).rename(place)
            consolidate(self.store)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _write_table(store: Path, name: str, table: xr.Dataset) -> None:
    """``to_zarr`` with text as variable-length strings (fixed-width text has no stable zarr v3 type)."""
    clean = table.copy()
    for key, variable in clean.variables.items():
        if variable.dtype.kind in "OUST" or str(variable.dtype).startswith("str"):
            clean[key] = (variable.dims, np.asarray(variable.values).astype(object).astype(STRING), variable.attrs)
        else:
            clean[key].encoding = {}
    clean.attrs = plain(clean.attrs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clean.to_zarr(store, group=name, mode="a", zarr_format=3, consolidated=False)


def consolidate(store: Path) -> None:
    """Gather all metadata in one file: opening a tree of 22 groups takes 0.05 s instead of 0.7 s.

    Within :func:`consolidated_once` nothing is done yet.
    """
    if Path(store).absolute() in _POSTPONED:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not part of the Zarr format 3 specification": every reader takes it
        zarr.consolidate_metadata(store)


def _unconsolidate(store: Path) -> None:
    """Drop the gathered metadata before the tree changes: a writer that dies in between leaves none that lies."""
    place = store / "zarr.json"
    metadata = json.loads(place.read_text(encoding="utf-8"))
    if metadata.pop("consolidated_metadata", None) is not None:
        write_json(place, metadata)


_POSTPONED: set[Path] = set()


@contextmanager
def consolidated_once(store: Path) -> Iterator[None]:
    """Consolidate at the end instead of after every group: dozens of products would take a second each."""
    place = Path(store).absolute()
    _POSTPONED.add(place)
    try:
        yield
    finally:
        _POSTPONED.discard(place)
        consolidate(place)


def read_attrs(path: Path) -> dict[str, Any]:
    """Root attributes of a run. Raises StoreError where it is none, or is of a newer version."""
    path = Path(path)
    if not path.is_dir():
        raise StoreError(f"{path}: no such run", remedy="make one with: foveate capture MODEL IMAGES -o RUN.zarr")
    try:
        root = zarr.open_group(path, mode="r", use_consolidated=False)
    except (OSError, ValueError, KeyError) as error:
        raise StoreError(f"{path}: not a zarr store ({error})") from None
    attrs = dict(root.attrs)
    check_version(attrs, path)
    return attrs


def update_attrs(path: Path, changes: Mapping[str, Any]) -> None:
    """Change root attributes and consolidate."""
    zarr.open_group(path, mode="r+", use_consolidated=False).attrs.update(plain(changes))
    consolidate(path)


def prepare_resume(path: Path) -> Ledger:
    """Clear away what a killed writer left; returns the ledger of the capture."""
    sweep(path)
    for scratch in ledger_folder(path).glob(".new-*"):
        shutil.rmtree(scratch, ignore_errors=True)
    return Ledger(path)
