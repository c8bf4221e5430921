"""Reading published tables of attention statistics, whatever their columns are called.

Two kinds: a summary (one row a statistic with mean, standard deviation, least and largest value; or the other
way round, as ``DataFrame.describe`` prints it) and one row an image. CSV, Parquet, and Markdown documents that
hold pipe tables. Numbers are kept with their rounding, so that nothing is called impossible for a lost digit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from foveate.errors import UsageError

if TYPE_CHECKING:
    import pandas as pd

ROWS = {
    "mean": {"mean", "average", "avg", "mu"},
    "std": {"std", "std dev", "stdev", "standard deviation", "sd", "sigma"},
    "min": {"min", "minimum", "least"},
    "max": {"max", "maximum", "largest"},
    "count": {"count", "n"},
}
"""What a summary's columns are called."""

_STATED = re.compile(r"out of\s+(\d{1,6})\s+(?:total|patches|tokens|keys)", re.IGNORECASE)


@dataclass(frozen=True)
class Reported:
    """A printed number: its value, and half a unit of its last digit."""

    value: float
    half: float = 0.0
    text: str = ""

    @property
    def low(self) -> float:
        """Least value that rounds to what is printed."""
        return self.value - self.half

    @property
    def high(self) -> float:
        """Largest value that rounds to what is printed."""
        return self.value + self.half


@dataclass(frozen=True)
class SummaryTable:
    """``statistics[name][row]`` with name as in :func:`statistic_of` and row one of :data:`ROWS`."""

    statistics: Mapping[str, Mapping[str, Reported]]
    tokens: int | None = None
    title: str = ""


@dataclass(frozen=True, eq=False)
class ImageTable:
    """One value an image and statistic, float64 ``(image,)``; ``half`` is half a unit of the last digit."""

    columns: Mapping[str, NDArray[np.float64]]
    half: Mapping[str, float]
    ids: Sequence[str]
    tokens: int | None = None
    title: str = ""


Table = SummaryTable | ImageTable


def statistic_of(name: str) -> str | None:
    """Which statistic a heading means: entropy, entropy_normalised, top10, top25, count, spread, max, or None.

    foveate's own ``top10_mass`` is not ``top10``: it rounds the number of keys up, the study rounds it down.
    """
    if name in ("top10_mass", "top25_mass"):
        return None
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).strip()
    if "lift" in words or "minmax" in words or "effective" in words:
        return None
    if "entropy" in words:
        return "entropy_normalised" if re.search(r"norm|relative|ln k|evenness", words) else "entropy"
    if re.search(r"concentration|\btop ?\d|mass", words):
        percent = re.search(r"(?<!\d)(10|25)(?!\d)", words)
        return f"top{percent.group(1)}" if percent else None
    if re.search(r"high attention|high attn|above mean|above average", words):
        return "count"
    if "spread" in words:
        return "spread"
    return (
        "max" if re.fullmatch(r"(attention |attn )?(max|maximum)|max(imum)? (attention|weight)", words) else None
    )


def read_number(text: str) -> Reported | None:
    """``66.6%`` as 0.666 within 0.0005; None for what is no number."""
    clean = text.strip().strip("*`~ ").replace("\u2212", "-").replace(",", "")
    match = re.fullmatch(r"([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*(%?)", clean)
    if match is None:
        return None
    scale = 0.01 if match.group(2) else 1.0
    return Reported(float(match.group(1)) * scale, half_unit(match.group(1)) * scale, text.strip())


def half_unit(number: str) -> float:
    """Half a unit of the last printed digit; whole numbers have half a unit only when they stand for a mean."""
    mantissa, _, exponent = number.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(0.5 * 10.0 ** (int(exponent or 0) - decimals))


def read_tables(path: Path) -> list[Table]:
    """Every table of attention statistics in a file. Raises UsageError where there is none."""
    if not path.is_file():
        raise UsageError(f"audit: {path} is no file", remedy="give a CSV, Parquet or Markdown file")
    if path.suffix.lower() in (".parquet", ".pq"):
        tables = _from_frame(_parquet(path), str(path))
    elif path.suffix.lower() in (".csv", ".tsv"):
        tables = _from_frame(_csv(path), str(path))
    else:
        tables = read_document(path.read_text(encoding="utf-8", errors="replace"), str(path))
    if not tables:
        raise UsageError(
            f"audit: {path} holds no table of attention statistics",
            remedy="expected headings such as entropy, top-10% concentration, high attention patches, spread",
        )
    stated = _sidecar_tokens(path)
    return [_with_tokens(table, stated) for table in tables] if stated else tables


def read_document(text: str, title: str = "") -> list[Table]:
    """The pipe tables of a Markdown document; "95.2 patches out of 256 total" states the number of keys."""
    stated = _STATED.search(text)
    tokens = int(stated.group(1)) if stated else None
    tables: list[Table] = []
    for header, rows in _pipe_tables(text):
        import pandas as pd

        tables += _from_frame(pd.DataFrame(rows, columns=header, dtype=str), title)
    return [_with_tokens(table, tokens) for table in tables]


def _pipe_tables(text: str) -> list[tuple[list[str], list[list[str]]]]:
    found, lines = [], text.splitlines()
    for i, line in enumerate(lines[:-1]):
        if "|" in line and re.fullmatch(r"\s*\|?[\s:|-]*-[\s:|-]*\|?\s*", lines[i + 1]) and "|" in lines[i + 1]:
            header, rows = _cells(line), []
            for below in lines[i + 2 :]:
                if "|" not in below:
                    break
                cells = _cells(below)
                rows.append((cells + [""] * len(header))[: len(header)])
            found.append((header, rows))
    return found


def _cells(line: str) -> list[str]:
    return [cell.strip().strip("`*") for cell in line.strip().strip("|").split("|")]


def _csv(path: Path) -> pd.DataFrame:
    import pandas as pd

    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False, sep=separator, comment=None)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UsageError(f"audit: {path} is no readable CSV: {error}") from error


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    frame = pd.read_parquet(path)
    return frame.astype(str).replace({"nan": "", "None": "", "<NA>": ""})


def table_of(frame: pd.DataFrame, title: str = "") -> Table | None:
    """The table that a frame with one row an image holds, or None where it holds no attention statistic."""
    return next(iter(_from_frame(frame.astype(str).replace({"nan": ""}), title)), None)


def _from_frame(frame: pd.DataFrame, title: str) -> list[Table]:
    if frame.shape[1] == 0:
        return []
    summary = _summary(frame) or _summary(_turned(frame))
    if summary:
        return [SummaryTable(summary, title=title)]
    columns = {name: statistic_of(str(name)) for name in frame.columns}
    if not any(columns.values()):
        return []
    return [_per_image(frame, {str(k): v for k, v in columns.items() if v}, title)]


def _turned(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows as columns: what ``describe`` prints."""
    first = frame.columns[0]
    turned = frame.set_index(first).T.reset_index()
    turned.columns = [str(name) for name in turned.columns]
    return turned


def _row_of(name: str) -> str | None:
    words = re.sub(r"[^a-z]+", " ", str(name).lower()).strip()
    return next((row for row, names in ROWS.items() if words in names), None)


def _summary(frame: pd.DataFrame) -> dict[str, dict[str, Reported]]:
    rows = {column: row for column in frame.columns[1:] if (row := _row_of(column))}
    if len(set(rows.values()) & {"mean", "std", "min", "max"}) < 2:
        return {}
    statistics: dict[str, dict[str, Reported]] = {}
    for record in frame.itertuples(index=False):
        name = statistic_of(str(record[0]))
        numbers = {
            row: number
            for column, row in rows.items()
            if (number := read_number(str(record[frame.columns.get_loc(column)])))
        }
        if name and numbers and name not in statistics:
            statistics[name] = numbers
    return statistics


def _per_image(frame: pd.DataFrame, columns: Mapping[str, str], title: str) -> ImageTable:
    values, half = {}, {}
    for column, statistic in columns.items():
        numbers = [read_number(text) for text in frame[column].astype(str)]
        values[statistic] = np.array([np.nan if n is None else n.value for n in numbers], dtype=np.float64)
        known = [n.half for n in numbers if n is not None]
        # whole numbers are exact counts; a column's precision is that of its longest number
        half[statistic] = 0.0 if statistic == "count" else min(known, default=0.0)
    first = str(frame.columns[0])
    ids = [str(value) for value in frame[first]] if first not in columns else [str(i) for i in range(len(frame))]
    return ImageTable(values, half, ids, title=title)


def _sidecar_tokens(path: Path) -> int | None:
    """K from the provenance file that foveate writes beside its tables."""
    sidecar = path.with_name(path.name + ".provenance.json")
    if not sidecar.is_file():
        return None
    try:
        stated = json.loads(sidecar.read_text(encoding="utf-8")).get("K")
    except (ValueError, AttributeError) as error:
        raise UsageError(f"audit: {sidecar} is no provenance file: {error}") from error
    return stated if isinstance(stated, int) else None


def _with_tokens(table: Table, tokens: int | None) -> Table:
    return replace(table, tokens=tokens) if tokens else table
