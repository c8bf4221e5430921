"""A user's table of samples (CSV, TSV, Parquet) as plain columns of one kind each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

TABLES = frozenset((".csv", ".tsv", ".parquet"))
"""Suffixes of files that are tables."""

Value = str | float | int | bool


@dataclass(frozen=True)
class Table:
    """One entry a row: unique ``ids``, ``paths`` as written, and every other column."""

    ids: Sequence[str]
    paths: Sequence[str]
    columns: Mapping[str, Sequence[Value]]


def read_table(path: Path, reserved: Collection[str], text: Sequence[str]) -> Table:
    """Read a table that has a ``path`` column; the columns ``text`` stay text, ``reserved`` ones are refused.

    Raises UsageError where it cannot be understood or its ids are not unique.
    """
    frame = _read(path, text)
    _check_columns(frame, path, reserved)
    id_column = next((name for name in ("id", "image_id") if name in frame), None)
    ids = frame[id_column or "path"].astype(str).tolist()
    if id_column and len(set(ids)) < len(ids):
        twice = next(value for value, count in Counter(ids).items() if count > 1)
        raise UsageError(f"manifest {path}: column {id_column!r} is not unique ({twice!r} occurs again)")
    columns = {str(name): _plain(frame[name]) for name in frame if name not in ("path", "id")}
    return Table(ids, frame["path"].astype(str).tolist(), columns)


def _read(path: Path, text_columns: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    try:
        if path.suffix.lower() == ".parquet":
            return pd.read_parquet(path)
        # "NA" is Namibia in a country column, and "007" an id: only an empty cell is missing.
        text: dict[Any, Any] = dict.fromkeys(text_columns, str)
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


def _check_columns(frame: pd.DataFrame, path: Path, reserved: Collection[str]) -> None:
    names = [str(name) for name in frame.columns]
    if "path" not in names:
        raise UsageError(
            f"manifest {path}: no column 'path' (columns: {', '.join(names)})",
            remedy="name the column with the image files 'path'",
        )
    if frame["path"].isna().any():
        raise UsageError(f"manifest {path}: row {int(frame['path'].isna().argmax()) + 1} has no path")
    for name in names:
        if name in reserved or "/" in name or not name.strip() or name.startswith("Unnamed: "):
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
