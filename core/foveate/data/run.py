"""A run on disk, read and added to: ``Run.open("run.zarr")``.

Everything is labelled xarray; big arrays are read when they are indexed. The store also opens with plain
``xr.open_datatree``; this class adds what needs foveate: geometries, token tables, the images, the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import xarray as xr

from foveate.data.clips import Clip
from foveate.data.labels import tokens_of
from foveate.data.layout import ArraySpec
from foveate.data.manifest import OF_CLIPS, Row, load_row, open_row
from foveate.data.products import OWN, ProductWriter, as_coordinate, check_name
from foveate.data.records import GEOMETRY, OK
from foveate.data.sampling import Selection
from foveate.data.store import read_attrs, replace_group
from foveate.errors import SampleError, StoreError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import AttentionSource, Sample, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray


NOT_COLUMNS = frozenset({"sample", "path", "sha256", "status", "failure", "notes", *GEOMETRY})
"""Coordinates of samples that are not columns of the user's table."""


class Run:
    """One run. Positions (``i``) count samples in manifest order, failed ones included."""

    def __init__(self, path: Path, attrs: Mapping[str, Any]) -> None:
        self.path = path
        self.attrs = attrs
        self._samples: xr.Dataset | None = None
        self._predictions: xr.Dataset | None = None

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open a run. Raises StoreError where there is none, or it is of a newer version."""
        return cls(Path(path), read_attrs(Path(path)))

    def __repr__(self) -> str:
        return f"<Run {self.path}: {self.model_id}, {self.ok.size} of {len(self)} samples, sites {self.site_ids}>"

    def __len__(self) -> int:
        return int(self.samples.sizes["sample"])

    # ------------------------------------------------------------------------------------ what is there

    @property
    def model_id(self) -> str:
        """Which model was captured."""
        return str(self.attrs["model"]["id"])

    @property
    def samples(self) -> xr.Dataset:
        """Coordinates (sample): id, path, sha256, status, failure, geometry, every manifest column."""
        if self._samples is None:
            self._samples = self._table("samples").load()
        return self._samples

    @property
    def predictions(self) -> xr.Dataset:
        """label, score, class_index (sample, rank); confidence, correct (sample; 1, 0, -1 unknown)."""
        if self._predictions is None:
            self._predictions = self._table("predictions").load()
        return self._predictions

    @property
    def media(self) -> Literal["image", "clip"]:
        """What the samples are."""
        return "clip" if "frame_index" in self.samples.coords else "image"

    @property
    def tracks(self) -> xr.Dataset:
        """Masks, boxes and areas of the tracks of ``predictions``, by the frames that the model read.

        mask (sample, rank, frame, y, x): share of each cell of :meth:`track_canvas` inside the track; box_top, ...
        (original pixels) and area (share of the picture) (sample, rank, frame). NaN where there is no track or no
        frame. Raises StoreError where the model gave no masks of tracks.
        """
        if "tracks" not in _children(self.path):
            raise StoreError(f"{self.path}: no tracks (the model does not give masks of tracked objects)")
        return self._table("tracks")

    def track_canvas(self, i: int) -> CellGrid:
        """The cells of ``tracks/mask`` over sample ``i``, in original pixels: they span the whole picture."""
        geometry, sizes = self.geometry(i), self.tracks.sizes
        height, width = geometry.original_height, geometry.original_width
        return CellGrid.regular(sizes["y"], sizes["x"], height=height, width=width)

    def frame_index(self, i: int) -> NDArray[np.int64]:
        """Which frames of sample ``i`` the model read (frame,): positions of the frame axis of its arrays."""
        return self._by_frame("frame_index", i)

    def frame_cells(self, i: int) -> NDArray[np.int64]:
        """The frame cell of each frame that the model read of sample ``i`` (frame,)."""
        return self._by_frame("frame_cell", i)

    def times(self, i: int) -> NDArray[np.float64]:
        """Seconds of each frame that the model read of sample ``i`` (frame,), NaN where the clip has no clock."""
        return self._by_frame("time", i)

    def _by_frame(self, name: str, i: int) -> NDArray[Any]:
        self._check_ok(i)
        if self.media != "clip":
            raise UsageError(f"{self.path}: a run of images has no frames", remedy="give a run of clips")
        there = self.samples["frame_index"].values[i] >= 0
        values: NDArray[Any] = self.samples[name].values[i][there]
        return values

    @property
    def ok(self) -> NDArray[np.intp]:
        """Positions of the samples that were captured."""
        return np.flatnonzero(self.samples["status"].values == OK)

    def check_captured(self) -> None:
        """Raises StoreError where no sample was captured (all failed, or the job was killed before its end)."""
        if not self.ok.size:
            raise StoreError(
                f"{self.path}: no captured sample of {len(self)}",
                remedy="the same foveate capture call continues a run that was cut off; see foveate validate",
            )

    @property
    def site_ids(self) -> tuple[str, ...]:
        """The sites that were kept, in the source's order."""
        return tuple(self.attrs.get("sites", ()))

    def site(self, site_id: str) -> xr.Dataset:
        """Arrays of one site, read when indexed: attention (sample, *group, layer, head, query, key), ...

        Raises UsageError naming the sites that exist.
        """
        if site_id not in self.site_ids:
            raise UsageError(
                f"{self.path}: no site {site_id!r}", remedy=f"one of {', '.join(self.site_ids) or 'none'}"
            )
        return self._table(f"sites/{site_id}")

    def tokens(self, site_id: str, axis: str = "key", sample: int | None = None) -> TokenAxis:
        """The tokens along ``key``, ``query`` (kept rows) or ``token`` (all rows) of a site."""
        return tokens_of(self.site(site_id), axis, sample)

    @property
    def grid(self) -> CellGrid:
        """The model's natural cells (patches) over its input, in input pixels."""
        cells = self.attrs.get("cells")
        if not cells:
            raise StoreError(f"{self.path}: no constant grid of cells (the model's inputs differ in size)")
        return CellGrid(np.array(cells["y"]), np.array(cells["x"]))

    def geometry(self, i: int) -> Geometry:
        """How sample ``i`` became the model's input. Raises SampleError where it failed."""
        self._check_ok(i)
        row = {name: float(self.samples[name].values[i]) for name in GEOMETRY}
        whole = {name: int(value) for name, value in row.items() if name.endswith(("height", "width"))}
        return Geometry(**{**row, **whole})  # type: ignore[arg-type]  # sizes are whole numbers

    # -------------------------------------------------------------------------- images and model again

    def load_sample(self, i: int) -> Sample:
        """Decode sample ``i`` again. Raises SampleError where the file is gone or is not the same any more."""
        return self._checked(load_row(self._row(i)), i)

    def load_frames(self, i: int, start: int = 0, stop: int | None = None) -> Sample:
        """Frames ``start`` to ``stop`` (excluded) of clip ``i``; no others are held. Raises SampleError."""
        return self._checked(self.open_clip(i).read(start, stop), i)

    def open_clip(self, i: int) -> Clip:
        """Clip ``i``, opened but not decoded. Raises SampleError, and UsageError where it is an image."""
        row = self._row(i)
        if row.selection is None:
            raise UsageError(f"{self.path}: sample {row.id!r} is an image", remedy="load_sample")
        return open_row(row)

    def _row(self, i: int) -> Row:
        """Sample ``i`` as its manifest had it."""
        self._check_ok(i)
        table = self.samples.isel(sample=i)
        columns = {
            str(name): v.item() for name, v in table.coords.items() if name not in NOT_COLUMNS and not v.dims
        }
        clip = self.media == "clip"
        if clip:
            own = OF_CLIPS | {"fps", "video"}
            columns = {name: value for name, value in columns.items() if name not in own}
        mask = self._place(str(table["mask"].item()))
        path = self._place(str(table["path"].item())) or Path()
        selection = Selection.from_json(str(table["selection"].item())) if clip else None
        video = str(table["video"].item()) if clip else ""
        return Row(str(table["id"].item()), path, columns, mask, selection, video)

    def _checked(self, sample: Sample, i: int) -> Sample:
        if sample.sha256 != self.samples["sha256"].values[i]:
            raise SampleError(
                f"{self.media} {sample.path}: not the file that was captured (its SHA-256 differs)",
                remedy="restore the file, or capture again into a new run",
            )
        return sample

    def open_source(self, **overrides: Any) -> AttentionSource:
        """Open the model that was captured, as it was opened then. ``overrides`` replace options (device).

        Raises StoreError where the run does not know how, ModelError where the weights are not the same.
        """
        reference = str(self.attrs.get("reference", ""))
        if not reference:
            raise StoreError(
                f"{self.path}: captured from a source in memory, which cannot be opened again by name",
                remedy="pass the source yourself",
            )
        from foveate.plugins.opening import open_source

        options = {**dict(self.attrs.get("open_options", {})), **overrides}
        source = open_source(reference, **options)
        _check_weights(source, self.attrs["model"], self.path)
        return source

    # ---------------------------------------------------------------------------------------- products

    def products(self) -> list[str]:
        """Names of everything that was added: ``attributions/rollout``, ``metrics/<site>/entropy``, ..."""
        tops = [top for top in _children(self.path) if top not in OWN]
        return sorted(name for top in tops for name in _with_arrays(self.path / top, top))

    def product(self, name: str) -> xr.Dataset:
        """One product, read when indexed. Raises UsageError naming those that exist."""
        if name not in self.products():
            raise UsageError(
                f"{self.path}: no product {name!r}", remedy=f"there are: {', '.join(self.products()) or 'none'}"
            )
        return self._table(name)

    def write_product(self, name: str, dataset: xr.Dataset, attrs: Mapping[str, Any] | None = None) -> None:
        """Write a whole product, in place of an earlier one of that name; it is never half there."""
        check_name(name)
        replace_group(self.path, name, self._labelled(dataset).assign_attrs(dict(attrs or {})))

    def product_writer(
        self,
        name: str,
        variables: Mapping[str, tuple[Any, ...]],
        coords: Mapping[str, Any] | None = None,
        attrs: Mapping[str, Any] | None = None,
        *,
        overwrite: bool = False,
    ) -> ProductWriter:
        """A context manager for long jobs: ``with run.product_writer(...) as out: out.write(start, blocks)``.

        ``variables``: name -> ``(dims, shape, dtype[, attrs])``; dims begin with ``sample``, dtype may be
        "string". ``coords``: name -> values along that dim, or ``(dims, values[, attrs])``. The same call
        again continues a job that was cut off (``out.pending(positions)``); other settings under the same
        name raise StoreError unless ``overwrite``.
        """
        specs = [
            ArraySpec(key, tuple(dims), tuple(map(int, shape)), _dtype_name(dtype), dict(*further))
            for key, (dims, shape, dtype, *further) in variables.items()
        ]
        coordinates = {key: as_coordinate(key, value) for key, value in (coords or {}).items()}
        coordinates.setdefault("sample", as_coordinate("sample", self.samples["sample"].values))
        return ProductWriter(self.path, name, specs, coordinates, dict(attrs or {}), overwrite=overwrite)

    # --------------------------------------------------------------------------------------- internals

    def _table(self, group: str) -> xr.Dataset:
        try:
            dataset: xr.Dataset = xr.open_zarr(self.path, group=group, chunks=None, consolidated=False)
        except (OSError, KeyError, ValueError) as error:
            raise StoreError(
                f"{self.path}: group {group} cannot be read ({error})",
                remedy="foveate validate says what is wrong",
            ) from None
        text = [name for name, variable in dataset.variables.items() if variable.dtype.kind == "T"]
        plain = {name: dataset[name].astype(object) for name in text}
        coordinates = {name: values for name, values in plain.items() if name in dataset.coords}
        return dataset.assign(plain).assign_coords(coordinates)

    def _labelled(self, dataset: xr.Dataset) -> xr.Dataset:
        whole = dataset.sizes.get("sample") == len(self)
        if whole and "sample" not in dataset.coords:
            return dataset.assign_coords(sample=self.samples["sample"].values)
        return dataset

    def _check_ok(self, i: int) -> None:
        table = self.samples.isel(sample=i)
        if int(table["status"]) != OK:
            reason = str(table["failure"].item()) or "not captured yet"
            raise SampleError(f"sample {table['id'].item()!r}: {reason}")

    def _place(self, stored: str) -> Path | None:
        """A stored path is absolute, or relative to the folder that holds the run."""
        return self.path.absolute().parent / stored if stored else None


def _check_weights(source: AttentionSource, model: Mapping[str, Any], path: Path) -> None:
    from foveate.errors import ModelError

    recorded, live = str(model.get("weights_sha256", "")), source.card.weights_sha256
    if recorded and live and recorded != live:
        raise ModelError(
            f"{path}: captured with weights {recorded[:12]}..., but {source.card.id} now has {live[:12]}...",
            remedy="open the revision that the run records, or capture again",
        )


def _children(folder: Path) -> dict[str, str]:
    """Name -> "group" or "array" of what lies directly below a group; metadata files only, however many chunks."""
    found = sorted(child.name for child in folder.iterdir() if (child / "zarr.json").is_file())
    return {name: json.loads((folder / name / "zarr.json").read_text("utf-8"))["node_type"] for name in found}


def _with_arrays(folder: Path, name: str) -> list[str]:
    """The groups at or below one group that hold arrays."""
    children = _children(folder)
    if "array" in children.values():
        return [name]
    return [found for key in children for found in _with_arrays(folder / key, f"{name}/{key}")]


def _dtype_name(dtype: Any) -> str:
    if dtype in (str, object, "str", "string", "object", "O"):
        return "string"
    return str(np.dtype(dtype).name)
