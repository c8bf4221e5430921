"""Which samples a run is about: a folder, files, or a table whose columns become sample coordinates.

The manifest is fixed before anything runs: ordered rows with unique, stable ids. Everything that is stored
later is preallocated from it, and a resumed run is recognised by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.data.images import SUFFIXES, decode, read_mask
from foveate.errors import UsageError
from foveate.interfaces import Sample

if TYPE_CHECKING:
    import pandas as pd

TABLES = frozenset((".csv", ".tsv", ".parquet"))
RESERVED = frozenset(
    {"sample", "sha256", "status", "failure", "notes", "original_height", "original_width"}
    | {"input_height", "input_width", "scale_y", "scale_x", "offset_y", "offset_x"}
)
"""Names that a run gives its own sample coordinates; a manifest column cannot take them."""

Value = str | float | int | bool


@dataclass(frozen=True)
class Row:
    """One sample before it is decoded: ``columns`` is what the user's table says of it."""

    id: str
    path: Path
    columns: Mapping[str, Value] = field(default_factory=dict)
    mask: Path | None = None


@dataclass(frozen=True)
class Manifest:
    """Ordered rows with unique ids; ``ignored`` counts the files of a folder that are not images, by suffix."""

    rows: tuple[Row, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def discover(cls, inputs: Path | str | Iterable[Path | str]) -> Manifest:
        """Rows of folders (searched recursively, sorted), image files and CSV, TSV or Parquet tables.

        A table needs a ``path`` column (relative to the table); ``id`` (or ``image_id``), ``mask`` and
        ``label`` are understood, and every column becomes a sample coordinate. A file that is named twice
        counts once, unless a table names it. Raises UsageError where an input does not exist, a table cannot
        be understood, or nothing is found.
        """
        given = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(item) for item in inputs]
        rows: list[Row] = []
        ignored: Counter[str] = Counter()
        for item in given:
            rows += _rows_of(item, ignored)
        if not rows:
            raise UsageError(
                f"no image in {', '.join(map(str, given)) or 'an empty list of inputs'}{_says(ignored)}",
                remedy=f"give images ({' '.join(sorted(SUFFIXES))}), a folder, or a table with a path column",
            )
        return cls(_unique(_without_repeats(rows)), dict(ignored))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def ids(self) -> tuple[str, ...]:
        """The ids, in order."""
        return tuple(row.id for row in self.rows)

    @property
    def columns(self) -> dict[str, list[Value]]:
        """Every column over all rows; a row that lacks one has ``""`` (text) or NaN (numbers)."""
        names = dict.fromkeys(name for row in self.rows for name in row.columns)
        return {name: _filled([row.columns.get(name) for row in self.rows]) for name in names}

    @property
    def digest(self) -> str:
        """SHA-256 of ids and columns, in order: what makes two runs be about the same samples.

        Places on disk do not count (a folder may move); contents are hashed as they are decoded.
        """
        said = [[row.id, {k: str(v) for k, v in sorted(row.columns.items())}] for row in self.rows]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()

    def load(self, position: int) -> Sample:
        """Decode one sample and its mask. Raises SampleError with the reason."""
        return load_row(self.rows[position])

    def take(self, count: int) -> Manifest:
        """The first ``count`` rows."""
        return replace(self, rows=self.rows[:count])


def load_row(row: Row) -> Sample:
    """Decode the image behind a row, and its mask. Raises SampleError with the reason."""
    decoded = decode(row.path)
    mask = None if row.mask is None else read_mask(row.mask, decoded.pixels.shape[:2])
    columns: dict[str, object] = dict(row.columns)
    if decoded.notes:
        columns["notes"] = "; ".join(decoded.notes)
    return Sample(row.id, decoded.pixels, decoded.sha256, str(row.path), mask=mask, columns=columns)


# ------------------------------------------------------------------------------------- finding rows


def _rows_of(item: Path, ignored: Counter[str]) -> list[Row]:
    if item.is_dir():
        return _folder(item, ignored)
    if not item.exists():
        raise UsageError(f"input {item}: no such file or folder")
    if item.suffix.lower() in TABLES:
        return _table(item)
    return [Row(item.name, item)]


def _folder(folder: Path, ignored: Counter[str]) -> list[Row]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    ignored.update(path.suffix.lower() or "no suffix" for path in files if path.suffix.lower() not in SUFFIXES)
    return [Row(path.relative_to(folder).as_posix(), path) for path in files if path.suffix.lower() in SUFFIXES]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _says(ignored: Mapping[str, int]) -> str:
    if not ignored:
        return ""
    return f" (ignored: {', '.join(f'{count} x {suffix}' for suffix, count in sorted(ignored.items()))})"


def _without_repeats(rows: Sequence[Row]) -> list[Row]:
    """A file named twice on the command line is one sample; a table's rows all stay (their columns differ)."""
    kept: list[Row] = []
    seen: set[Path] = set()
    for row in rows:
        place = row.path.resolve()
        if row.columns or place not in seen:
            kept.append(row)
        seen.add(place)
    return kept


def _unique(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Equal ids get their folder in front, and where that is not enough a number behind."""
    counts = Counter(row.id for row in rows)
    named = [
        row if counts[row.id] == 1 or row.columns else replace(row, id=f"{row.path.parent.name}/{row.id}")
        for row in rows
    ]
    seen: Counter[str] = Counter()
    taken = {row.id for row in named}
    unique = []
    for row in named:
        seen[row.id] += 1
        name, number = row.id, seen[row.id]
        while number > 1 and name in taken:
            name, number = f"{row.id}#{number}", number + 1
        taken.add(name)
        unique.append(replace(row, id=name))
    return tuple(unique)


# ------------------------------------------------------------------------------------------- tables


def _table(path: Path) -> list[Row]:
    frame = _read_table(path)
    _check_columns(frame, path)
    id_column = next((name for name in ("id", "image_id") if name in frame), None)
    ids = frame[id_column or "path"].astype(str).tolist()
    if id_column and len(set(ids)) < len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise UsageError(f"manifest {path}: column {id_column!r} is not unique ({twice!r} occurs again)")
    columns = {str(name): _plain(frame[name]) for name in frame if name not in ("path", "id")}
    return [
        Row(
            ids[i],
            path.parent / str(frame["path"].iloc[i]),
            {name: values[i] for name, values in columns.items()},
            _mask_path(path, columns, i),
        )
        for i in range(len(frame))
    ]


def _mask_path(table: Path, columns: Mapping[str, Sequence[Value]], i: int) -> Path | None:
    name = columns["mask"][i] if "mask" in columns else ""
    return table.parent / str(name) if name else None


def _read_table(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        # "NA" is Namibia in a country column, and "007" an id: only an empty cell is missing.
        text: dict[Any, Any] = dict.fromkeys(("id", "image_id", "path", "mask", "label"), str)
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
        return pd.read_csv(
            path, sep=separator, dtype=text, keep_default_na=False, na_values=[""], encoding="utf-8-sig"
        )
    except ImportError as error:
        raise UsageError(
            f"manifest {path}: Parquet needs pyarrow ({error})",
            remedy="pip install 'foveate[parquet]', or give a CSV",
        ) from None
    except (ValueError, OSError) as error:
        raise UsageError(f"manifest {path}: cannot be read as a table ({error})") from None


def _check_columns(frame: pd.DataFrame, path: Path) -> None:
    names = [str(name) for name in frame.columns]
    if "path" not in names:
        raise UsageError(
            f"manifest {path}: no column 'path' (columns: {', '.join(names)})",
            remedy="name the column with the image files 'path'",
        )
    if frame["path"].isna().any():
        raise UsageError(f"manifest {path}: row {int(frame['path'].isna().argmax()) + 1} has no path")
    for name in names:
        if name in RESERVED or "/" in name or not name.strip() or name.startswith("Unnamed: "):
            raise UsageError(
                f"manifest {path}: column {name!r} cannot be a sample coordinate", remedy="rename the column"
            )


def _plain(column: pd.Series[Any]) -> list[Value]:
    """A column as Python values of one kind: bool, int, float (NaN where missing) or text ("" where missing)."""
    import pandas as pd

    if pd.api.types.is_bool_dtype(column) and not column.isna().any():
        return [bool(value) for value in column]
    if pd.api.types.is_numeric_dtype(column):
        whole = pd.api.types.is_integer_dtype(column) and not column.isna().any()
        return [int(v) for v in column] if whole else [float("nan") if pd.isna(v) else float(v) for v in column]
    return ["" if value is None or value is pd.NaT or value != value else str(value) for value in column]


def _filled(values: Sequence[Value | None]) -> list[Value]:
    """One column over inputs of which some lack it: text wins, numbers become float with NaN."""
    if any(isinstance(value, str) for value in values):
        return ["" if value is None else str(value) for value in values]
    if None in values:
        return [float("nan") if value is None else float(value) for value in values]
    return [value for value in values if value is not None]
