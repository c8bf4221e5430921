"""Which samples a run is about: a folder, files, or a table whose columns become sample coordinates.

For a model of images samples are images; for a model of clips they are videos, animated images and folders of
frames, or windows of them. The manifest is fixed before anything runs: ordered rows with unique, stable ids.
Everything that is stored later is preallocated from it, and a resumed run is recognised by its digest.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from foveate.data import videos
from foveate.data.clip_rows import clips_in, windows_of
from foveate.data.clips import Clip, most_frames, open_clip
from foveate.data.images import SUFFIXES, decode, read_mask
from foveate.data.sampling import Sampling, Selection
from foveate.data.tables import TABLES, Value, read_table
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Sample

TEXT = ("id", "image_id", "path", "mask", "label")
"""Columns of a table that stay text ..."""
TEXT_OF_CLIPS = ("start", "stop", "video")
"""... and those that do in a table of clips."""
RESERVED = frozenset(
    {"sample", "sha256", "status", "failure", "notes", "original_height", "original_width"}
    | {"input_height", "input_width", "scale_y", "scale_x", "offset_y", "offset_x"}
)
"""Names that a run gives its own sample coordinates; a manifest column cannot take them."""

OF_CLIPS = frozenset(("frames", "duration", "frame", "time", "frame_index", "frame_cell", "selection"))
"""Further such names in a run of clips; ``fps`` and ``video`` are understood (see :meth:`Manifest.discover`)."""

Media = Literal["image", "clip"]


@dataclass(frozen=True)
class Row:
    """One sample before it is decoded: ``columns`` is what the user's table says of it.

    Of a clip, ``selection`` says which frames, and ``video`` names the recording that it is part of: the unit
    of statistics.
    """

    id: str
    path: Path
    columns: Mapping[str, Value] = field(default_factory=dict)
    mask: Path | None = None
    selection: Selection | None = None
    video: str = ""


@dataclass(frozen=True)
class Manifest:
    """Ordered rows with unique ids; ``ignored`` counts the files of a folder that are not images, by suffix."""

    rows: tuple[Row, ...]
    ignored: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def discover(
        cls,
        inputs: Path | str | Iterable[Path | str],
        media: Media = "image",
        sampling: Sampling | None = None,
    ) -> Manifest:
        """Rows of folders (searched recursively, sorted), image files and CSV, TSV or Parquet tables.

        A table needs a ``path`` column (relative to the table); ``id`` (or ``image_id``), ``mask`` and
        ``label`` are understood, and every column becomes a sample coordinate. A file that is named twice
        counts once, unless a table names it.

        With ``media="clip"`` every video, animated image and folder that holds still images is a sample, and a
        table's paths are such; its columns ``start`` and ``stop`` (frame numbers, or seconds: ``1.5s``) choose a
        part, ``fps`` is the rate at which the frames were taken, ``video`` the recording (default: the file),
        ``mask`` may be a folder or array with a mask a frame. ``sampling`` chooses frames and cuts windows.

        Raises UsageError where an input does not exist, a table cannot be understood, or nothing is found.
        """
        given = [Path(inputs)] if isinstance(inputs, (str, Path)) else [Path(item) for item in inputs]
        rows: list[Row] = []
        ignored: Counter[str] = Counter()
        for item in given:
            rows += _rows_of(item, ignored, media)
        if not rows:
            raise UsageError(
                f"no {media} in {', '.join(map(str, given)) or 'an empty list of inputs'}{_says(ignored)}",
                remedy=_what_to_give(media),
            )
        unique = _unique(_without_repeats(rows))
        if media == "clip":
            return cls(tuple(_as_clips(unique, sampling or Sampling())), dict(ignored))
        if sampling not in (None, Sampling()):
            raise UsageError("--frames, --fps, --stride and --window choose frames of clips", remedy=_IMAGES_ONLY)
        return cls(unique, dict(ignored))

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
        said = [
            [row.id, {k: str(v) for k, v in sorted(row.columns.items())}, *_chosen_frames(row)]
            for row in self.rows
        ]
        return hashlib.sha256(json.dumps(said, ensure_ascii=False).encode()).hexdigest()

    def load(self, position: int) -> Sample:
        """Decode one sample and its mask. Raises SampleError with the reason."""
        return load_row(self.rows[position])

    @property
    def media(self) -> Media:
        """What the samples are."""
        return "clip" if any(row.selection for row in self.rows) else "image"

    def open(self, position: int) -> Clip:
        """The clip behind one sample, not decoded yet. Raises SampleError."""
        return open_row(self.rows[position])

    def most_frames(self) -> int:
        """An upper bound of the frames of any sample, 0 where no clip can be read; no video is decoded for it."""
        known = (most_frames(row.path, row.selection) for row in self.rows if row.selection)
        return max(known, default=0)

    def take(self, count: int) -> Manifest:
        """The first ``count`` rows."""
        return replace(self, rows=self.rows[:count])


def load_row(row: Row) -> Sample:
    """Decode the image or clip behind a row, and its mask. Raises SampleError with the reason."""
    if row.selection is not None:
        return open_row(row).read()
    if row.path.suffix.lower() in videos.SUFFIXES:
        raise SampleError(f"image {row.path}: a video, but this model takes images", remedy=_IMAGES_ONLY)
    decoded = decode(row.path)
    mask = None if row.mask is None else read_mask(row.mask, decoded.pixels.shape[:2])
    columns: dict[str, object] = dict(row.columns)
    if decoded.notes:
        columns["notes"] = "; ".join(decoded.notes)
    return Sample(row.id, decoded.pixels, decoded.sha256, str(row.path), mask=mask, columns=columns)


def open_row(row: Row) -> Clip:
    """The clip behind a row, its frames chosen but not decoded. Raises SampleError with the reason."""
    return open_clip(row.id, row.path, row.selection or Selection(), row.columns, row.mask)


def _chosen_frames(row: Row) -> list[str]:
    return [row.selection.to_json()] if row.selection else []


# ------------------------------------------------------------------------------------- finding rows

_IMAGES_ONLY = "choose a model of clips (foveate models shows them), or give images"


def _what_to_give(media: Media) -> str:
    if media == "clip":
        return (
            f"give videos ({' '.join(sorted(videos.SUFFIXES))}), folders of frames, or a table with a path column"
        )
    return f"give images ({' '.join(sorted(SUFFIXES))}), a folder, or a table with a path column"


def _rows_of(item: Path, ignored: Counter[str], media: Media) -> list[Row]:
    if item.is_dir():
        return _folder(item, ignored, media)
    if not item.exists():
        raise UsageError(f"input {item}: no such file or folder")
    if item.suffix.lower() in TABLES:
        return _table(item, media)
    return [Row(item.name, item)]


def _as_clips(rows: Iterable[Row], sampling: Sampling) -> Iterator[Row]:
    """Each row with its frames chosen, or its windows."""
    for row in rows:
        selection = Selection.of_columns(row.columns, sampling)
        video = str(row.columns.get("video", "")) or row.video or row.id
        # The rate is told by the sample's own column of that name; the recording by its own.
        columns = {name: value for name, value in row.columns.items() if name not in ("fps", "video")}
        for name, part in windows_of(row.id, row.path, selection):
            yield replace(row, id=name, columns=columns, selection=part, video=video)


def _folder(folder: Path, ignored: Counter[str], media: Media) -> list[Row]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not _hidden(path, folder))
    if media == "clip":
        return [Row(name, path) for name, path in clips_in(folder, files, ignored)]
    ignored.update(path.suffix.lower() or "no suffix" for path in files if path.suffix.lower() not in SUFFIXES)
    return [Row(path.relative_to(folder).as_posix(), path) for path in files if path.suffix.lower() in SUFFIXES]


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _says(ignored: Mapping[str, int]) -> str:
    if not ignored:
        return ""
    said = f" (ignored: {', '.join(f'{count} x {suffix}' for suffix, count in sorted(ignored.items()))})"
    return said + video_hint(ignored)


def video_hint(ignored: Mapping[str, int]) -> str:
    """What to do with videos that a model of images left out; empty where there are none."""
    left_out = sum(count for suffix, count in ignored.items() if suffix in videos.SUFFIXES)
    return f"; {left_out} of them videos: {_IMAGES_ONLY}" if left_out else ""


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


def _table(path: Path, media: Media) -> list[Row]:
    clips = media == "clip"
    table = read_table(path, RESERVED | OF_CLIPS if clips else RESERVED, TEXT + TEXT_OF_CLIPS if clips else TEXT)
    return [
        Row(
            name,
            path.parent / table.paths[i],
            {name: values[i] for name, values in table.columns.items()},
            _mask_path(path, table.columns, i),
            video=table.paths[i],
        )
        for i, name in enumerate(table.ids)
    ]


def _mask_path(table: Path, columns: Mapping[str, Sequence[Value]], i: int) -> Path | None:
    name = columns["mask"][i] if "mask" in columns else ""
    return table.parent / str(name) if name else None


def _filled(values: Sequence[Value | None]) -> list[Value]:
    """One column over inputs of which some lack it: text wins, numbers become float with NaN."""
    if any(isinstance(value, str) for value in values):
        return ["" if value is None else str(value) for value in values]
    if None in values:
        return [float("nan") if value is None else float(value) for value in values]
    return [value for value in values if value is not None]
