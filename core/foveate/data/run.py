"""A run on disk, read and added to: ``Run.open("run.zarr")``.

Everything is labelled xarray; big arrays are read when they are indexed. The store also opens with plain
``xr.open_datatree``; this class adds what needs foveate: geometries, token tables, the images, the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from foveate.data.labels import tokens_of
from foveate.data.layout import ArraySpec
from foveate.data.manifest import Row, load_row
from foveate.data.products import OWN, ProductWriter, as_coordinate, check_name
from foveate.data.records import GEOMETRY, OK
from foveate.data.store import read_attrs, replace_group
from foveate.errors import SampleError, StoreError, UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import AttentionSource, Sample, TokenAxis

if TYPE_CHECKING:
    from numpy.typing import NDArray


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
        self._check_ok(i)
        table = self.samples.isel(sample=i)
        own = {"sample", "path", "sha256", "status", "failure", "notes", *GEOMETRY}
        columns = {str(name): table[name].item() for name in table.coords if name not in own}
        mask = self._place(str(table["mask"].item()))
        row = Row(str(table["id"].item()), self._place(str(table["path"].item())) or Path(), columns, mask)
        sample = load_row(row)
        if sample.sha256 != table["sha256"].item():
            raise SampleError(
                f"image {row.path}: not the file that was captured (its SHA-256 differs)",
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
