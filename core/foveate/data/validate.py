"""Is a run on disk what it says it is? Structure, values, ledger against status, checksums.

Values are read one commit batch at a time. A run that is merely unfinished is valid; that is a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import zarr

from foveate.data.gaps import is_broken
from foveate.data.labels import VARIABLES
from foveate.data.layout import batches
from foveate.data.ledger import Ledger, checksum, ledger_folder
from foveate.data.records import OK
from foveate.data.schema import STATUS
from foveate.data.store import read_attrs
from foveate.errors import StoreError
from foveate.interfaces import TOKEN_KINDS

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROW_SUM_TOLERANCE: Mapping[str, float] = {"float16": 1e-3, "float32": 1e-5}
"""Largest |row sum - 1| by stored dtype; rounding to float16 alone costs up to 4e-4 over 577 keys."""


@dataclass(frozen=True)
class Problem:
    """Something found. A ``note`` does not make the run invalid."""

    where: str
    message: str
    level: Literal["error", "note"] = "error"


def validate(path: Path | str, *, deep: bool = False) -> list[Problem]:
    """Everything that is wrong with a run, errors first; ``deep`` also compares checksums of every file.

    Raises StoreError where there is no run at ``path`` or it is of a newer version.
    """
    store = Path(path)
    attrs = read_attrs(store)
    root = zarr.open_group(store, mode="r", use_consolidated=False)
    missing = list(_structure(root, attrs))
    if missing:
        return missing
    found = [*_ledger(store, root, attrs, deep=deep), *_values(store, root, attrs), *_products(store, deep=deep)]
    found += _unfinished(store, root)
    return sorted(found, key=lambda problem: problem.level != "error")


def _structure(root: zarr.Group, attrs: Mapping[str, Any]) -> Iterator[Problem]:
    """Every group and array that the root promises, of the promised size."""
    for name in ("config_hash", "plan", "model", "sites", "arrays", "commit_batch"):
        if name not in attrs:
            yield Problem("/", f"attribute {name!r} is missing")
    promised = ["samples/status", "samples/id", "predictions/label", *attrs.get("arrays", ())]
    for name in promised:
        array = root.get(name)
        if not isinstance(array, zarr.Array):
            yield Problem(name, "array is missing")
        elif _dims(array)[:1] != ("sample",):
            yield Problem(name, f"dims must begin with sample, got {_dims(array)}")
    sizes = {name: root[name].shape[0] for name in promised if _is_array(root, name)}  # type: ignore[union-attr]
    if len(set(sizes.values())) > 1:
        yield Problem("/", f"arrays disagree on the number of samples: {sizes}")
    for site in attrs.get("sites", ()):
        if not isinstance(root.get(f"sites/{site}"), zarr.Group):
            yield Problem(f"sites/{site}", "group is missing")


def _is_array(root: zarr.Group, name: str) -> bool:
    return isinstance(root.get(name), zarr.Array)


def _dims(array: zarr.Array[Any]) -> tuple[str, ...]:
    return tuple(getattr(array.metadata, "dimension_names", None) or ())


# ------------------------------------------------------------------------------------------- ledger


def _ledger(store: Path, root: zarr.Group, attrs: Mapping[str, Any], *, deep: bool) -> Iterator[Problem]:
    """Status says what the ledger says, and the files are those that were written."""
    status = _read(root, "samples/status")
    try:
        entries = Ledger(store).entries()
    except StoreError as error:
        yield Problem("ledger", error.message)
        return
    said = _recorded(entries, status)
    late = _late(attrs, status, said)
    for i in np.flatnonzero((said != status) & ~late):
        yield Problem("samples/status", f"sample {i}: {STATUS[status[i]]} here, {STATUS[said[i]]} in the ledger")
    if late.any():
        written = f"{int(late.sum())} samples of a killed job are safe but not listed"
        yield Problem("samples", f"{written}; the same foveate capture call enters them", "note")
    yield from _files(store, entries.values(), deep=deep)
    yield from _files(store, Ledger(store).blocks().values(), deep=deep)


def _recorded(entries: Mapping[int, Mapping[str, Any]], status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The status of each sample by the ledger."""
    said = np.zeros_like(status)
    for entry in entries.values():
        said[entry["start"] : entry["stop"]] = [sample["status"] for sample in entry["samples"]]
    return said


def _late(attrs: Mapping[str, Any], status: NDArray[np.uint8], said: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Samples that a killed job had written: tables are made from the ledger when a job ends."""
    unfinished = attrs.get("complete") is False
    late: NDArray[np.bool_] = (status == 0) & (said != 0) & unfinished
    return late


def _files(store: Path, entries: Iterable[Mapping[str, Any]], *, deep: bool) -> Iterator[Problem]:
    for entry in entries:
        for name, recorded in entry["files"].items():
            file = store / name
            if not file.is_file():
                yield Problem(name, "file is missing")
            elif file.stat().st_size != recorded["size"]:
                yield Problem(name, f"{file.stat().st_size} bytes, but {recorded['size']} were written")
            elif deep and checksum(file) != recorded:
                yield Problem(name, "checksum differs from what was written")


def _products(store: Path, *, deep: bool) -> Iterator[Problem]:
    """Files of the products that keep a ledger of their own."""
    folder = ledger_folder(store)
    for product in sorted({path.parent for path in folder.rglob("[0-9]*.json")} - {folder}):
        name = product.relative_to(folder).as_posix()
        yield from _files(store, Ledger(store, name).entries().values(), deep=deep)


def _unfinished(store: Path, root: zarr.Group) -> Iterator[Problem]:
    status = _read(root, "samples/status")
    missing = int((_effective(store, status) == 0).sum())
    if missing:
        remedy = "the same foveate capture call continues it"
        yield Problem("/", f"{missing} of {status.size} samples are missing; {remedy}", "note")
    left = len(list(store.rglob("*.partial")))
    if left:
        yield Problem("/", f"{left} half-written files of a killed job; resuming removes them", "note")


# ------------------------------------------------------------------------------------------- values


def _effective(store: Path, status: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Status by the tables and, where they say nothing, by the ledger."""
    try:
        said = _recorded(Ledger(store).entries(), status)
    except StoreError:  # reported by _ledger
        return status
    return np.where(status == 0, said, status)


def _values(store: Path, root: zarr.Group, attrs: Mapping[str, Any]) -> Iterator[Problem]:
    """What must hold of every array, commit by commit; the first violation of each kind is told."""
    status = _read(root, "samples/status")
    ok = (_effective(store, status) if attrs.get("complete") is False else status) == OK
    begun = {number for number, _ in Ledger(store).blocks()}
    # Clips that a killed job had begun: some of their blocks are there.
    free = np.array([i in begun and not ok[i] for i in range(ok.size)], bool)
    for path in attrs["arrays"]:
        seen: set[str] = set()
        for part, index in _parts(root, path, ok.size, attrs):
            try:
                block = np.asarray(root[path][index])  # type: ignore[index]
            except (OSError, ValueError, RuntimeError) as error:
                yield Problem(path, f"samples {part.start} to {part.stop} cannot be read: {error}")
                break
            if free[part].any():
                continue
            for kind, message in _check(root, path, block, ok[part]):
                if kind not in seen:
                    yield Problem(path, f"from sample {part.start} on: {message}")
                seen.add(kind)


def _parts(
    root: zarr.Group, path: str, samples: int, attrs: Mapping[str, Any]
) -> Iterator[tuple[slice, tuple[slice, ...]]]:
    """(samples, index into the array) of every commit: a batch of samples, or a block of frames of one."""
    array, frames = root[path], attrs.get("frame_block")
    dims = _dims(array)  # type: ignore[arg-type]
    for part in batches(samples, int(attrs["commit_batch"])):
        if not frames or "frame" not in dims:
            yield part, (part,)
            continue
        axis = dims.index("frame")
        for block in batches(array.shape[axis], int(frames)):  # type: ignore[union-attr]
            yield part, (part, *[slice(None)] * (axis - 1), block)


def _check(root: zarr.Group, path: str, block: NDArray[Any], ok: NDArray[np.bool_]) -> Iterator[tuple[str, str]]:
    """(kind, message) of what is wrong in one commit of one array."""
    good, other = block[ok], block[~ok]
    site, _, name = path.removeprefix("sites/").rpartition("/")
    if name not in VARIABLES:
        return
    group = root[f"sites/{site}"]
    keys = group["key_kind"].shape[-1]  # type: ignore[index,union-attr]
    told = {**group.attrs, "keys": keys, "shared_out": name == "attention" and _is_shared_out(group)}
    if block.dtype.kind == "f":
        dims = _dims(root[path])[1:]  # type: ignore[arg-type]
        broken = [not _gaps_only(sample, dims, told) for sample in good]
        if any(broken):
            count = sum(int((~np.isfinite(sample)).sum()) for sample, bad in zip(good, broken, strict=True) if bad)
            yield "finite", f"{count} values of captured samples are not finite"
            good = good[:0]
        if np.isfinite(other).any():
            yield "failed", "a sample that was not captured has values"
    check = CHECKS.get(name)
    if check is not None and good.size:
        yield from check(good, told)


def _is_shared_out(group: Any) -> bool:
    """Whether the kept row is a mean over frames or tracks, too: each of their rows then sums to its share."""
    grouped, readout = bool(group.attrs.get("group")), TOKEN_KINDS.index("readout")
    return grouped and "query_kind" in group and bool((group["query_kind"][:] == readout).all())


def _gaps_only(sample: NDArray[Any], dims: Sequence[str], site: Mapping[str, Any]) -> bool:
    """Whether what is not finite are frames, tracks or tokens that do not exist."""
    group, ragged = tuple(site.get("group", ())), bool(site.get("comes_and_goes"))
    optional = bool(site.get("optional"))
    if optional and not np.isfinite(sample).any():
        return not np.isinf(sample).any()  # the site did not run
    return not is_broken(sample, dims, group, comes_and_goes=ragged, padded=bool(group))


def _check_rows(rows: NDArray[Any], site: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Attention lies in [0, 1]; complete rows sum to one, or to zero where every key was masked.

    Rows that share one readout between frames or tracks sum to at most one.
    """
    tolerance = ROW_SUM_TOLERANCE[rows.dtype.name]
    known = rows[np.isfinite(rows).all(-1)]
    if not known.size:
        return
    if known.min() < 0 or known.max() > 1 + tolerance:
        yield "range", f"weights from {known.min():g} to {known.max():g}, expected 0 to 1"
    if site.get("form") == "dense" and site.get("normalised_over") == "key":
        sums = known.astype(np.float64).sum(-1)
        part = bool(site.get("shared_out"))
        off = np.maximum(sums - 1, 0.0) if part else np.where(sums == 0, 0.0, np.abs(sums - 1))
        if off.max() > tolerance:
            yield "sum", f"rows sum to 1 only within {off.max():.2g} (tolerance {tolerance:g})"


def _check_entropy(values: NDArray[Any], site: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    limit = math.log(site["keys"])
    known = values[np.isfinite(values)]
    if known.size and (known.min() < -1e-4 or known.max() > limit + 1e-4):
        yield "range", f"entropy from {known.min():g} to {known.max():g}, expected 0 to ln K = {limit:g}"


def _check_index(values: NDArray[Any], site: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.min() < -1 or values.max() >= site["keys"]:
        yield (
            "range",
            f"key positions from {values.min()} to {values.max()}, expected -1 (padding) to {site['keys'] - 1}",
        )


Check = Callable[[Any, Mapping[str, Any]], Iterator[tuple[str, str]]]
CHECKS: Mapping[str, Check] = {
    **{name: _check_rows for name, variable in VARIABLES.items() if variable.attention},
    "entropy": _check_entropy,
    "topk_index": _check_index,
}


def _read(root: zarr.Group, name: str) -> NDArray[Any]:
    array = root[name]
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{name}: not an array")
    return np.asarray(array[:])
