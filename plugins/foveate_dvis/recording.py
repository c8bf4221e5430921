"""Reading what the exporter wrote: arrays by name, and plain facts about the model and its calls.

The file is a ``.npz`` without pickles: attention of every call as ``attention/<module path>::<call>::<field>``,
further tensors by name, and ``meta``, JSON as bytes. Arrays are read one at a time: a
long clip needs no memory.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import ModelError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMAT, VERSION = "foveate-recording", 1
FORMS = ("dense", "deformable", "slot", "pool")
TOLERANCE = {"float16": 1e-2, "bfloat16": 4e-2}
"""Largest relative error between recorded attention times values and the module's own output, by precision ..."""
USUAL_TOLERANCE = 1e-3
"""... and in float32; a wrong head, scale or mask is off by 0.1 and more."""
_REMEDY = "record it again with the exporter of this version: python -m foveate_dvis.exporter -o foveate_export.py"


@dataclass(frozen=True)
class RecordedCall:
    """One execution of an attention module; ``error``: how far from the module's own output, None: unknown."""

    path: str
    number: int
    form: str
    owner: str
    error: float | None
    precision: str = "float32"

    def name(self, field: str) -> str:
        """Name of one of its arrays."""
        return f"attention/{self.path}::{self.number}::{field}"


class Recording:
    """An opened recording. Raises ModelError where the file is none, cut off, or of another version."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self._arrays = np.load(self.path, allow_pickle=False)
            self.meta: Mapping[str, Any] = json.loads(bytes(self._arrays["meta"]))
        except FileNotFoundError:
            raise ModelError(
                f"recording {path}: no such file", remedy="give the .npz that the exporter wrote"
            ) from None
        except (OSError, ValueError, KeyError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            why = str(error) if zipfile.is_zipfile(self.path) else "no .npz file, or cut off"
            raise ModelError(f"recording {path}: not a readable recording ({why})", remedy=_REMEDY) from None
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise ModelError(f"recording {path}: expected format {FORMAT!r}", remedy=_REMEDY)
        if self.meta.get("version") != VERSION:
            raise ModelError(
                f"recording {path}: of version {self.meta.get('version')!r}, expected {VERSION}", remedy=_REMEDY
            )
        self._check()

    def _check(self) -> None:
        if self.meta["forwards"] > 1:
            raise ModelError(
                f"recording {self.path}: {self.meta['forwards']} forwards in one file: expected one clip or image",
                remedy="open one record(...) for each",
            )
        if "frames" not in self:
            raise ModelError(
                f"recording {self.path}: holds no pictures, so that nothing can be placed",
                remedy="record(model, out, frames=...): uint8 (frame, y, x, 3) RGB, as the model was given them",
            )
        for call in self.calls:
            if call.form not in FORMS or call.name("weights") not in self:
                raise ModelError(
                    f"recording {self.path}: {call.path} call {call.number} is incomplete", remedy=_REMEDY
                )
            limit = TOLERANCE.get(call.precision, USUAL_TOLERANCE)
            if call.error is not None and not call.error <= limit:
                raise ModelError(
                    f"recording {self.path}: {call.path} call {call.number}: weights times values are "
                    f"{call.error:.2g} from the module's own output, expected at most {limit:g}",
                    remedy="the module computes something else than the exporter knows: leave it out with sites=",
                )

    def __contains__(self, name: object) -> bool:
        return name in self._arrays.files

    def __getitem__(self, name: str) -> NDArray[Any]:
        """One array. Raises ModelError where it is not there or not readable."""
        try:
            return np.asarray(self._arrays[name])
        except (KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ModelError(
                f"recording {self.path}: array {name!r} cannot be read ({error})", remedy=_REMEDY
            ) from None

    @cached_property
    def calls(self) -> tuple[RecordedCall, ...]:
        """Every recorded call in execution order."""
        told = self.meta["calls"]
        usual = "float32"
        return tuple(
            RecordedCall(c["path"], c["call"], c["form"], c["class"], c["error"], c.get("dtype", usual))
            for c in told
        )

    @property
    def worst_error(self) -> float | None:
        """Largest relative error of all calls that could be checked in the environment that recorded them."""
        known = [call.error for call in self.calls if call.error is not None]
        return max(known, default=None)

    @cached_property
    def frames(self) -> NDArray[np.uint8]:
        """Pictures as the model was given them, uint8 (frame, y, x, 3) RGB, before its own padding."""
        pictures = self["frames"]
        if pictures.ndim != 4 or pictures.shape[-1] != 3 or pictures.dtype != np.uint8 or not pictures.size:
            raise ModelError(
                f"recording {self.path}: pictures are {pictures.dtype} {pictures.shape}, "
                "expected uint8 (frame, y, x, 3)",
                remedy=_REMEDY,
            )
        return pictures

    @property
    def original(self) -> tuple[int, int]:
        """(height, width) of the pictures before they were resized for the model, as detectron2 was told."""
        height, width = self.meta["geometry"]["original"]
        return int(height), int(width)

    @property
    def padded(self) -> tuple[int, int]:
        """(height, width) of the model's input; of models that do not tell, the pictures' own size."""
        height, width = self.meta.get("input", self.frames.shape[1:3])
        return int(height), int(width)

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        total = hashlib.sha256()
        with self.path.open("rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
        return total.hexdigest()

    def weights(self, call: RecordedCall) -> NDArray[np.float32]:
        """Attention ``(batch, head, query, key)`` of a call; deformable: (batch, query, head, level, point)."""
        found = self[call.name("weights")].astype(np.float32)
        if call.form == "slot":  # (batch, input, slot): slots read inputs
            return found.transpose(0, 2, 1)[:, None]
        if call.form == "pool":  # (layer, batch, frame, instance, 1): each instance reads frames
            return found[-1, 0, :, :, 0].T[:, None, None, :]
        return found

    def blocked(self, call: RecordedCall) -> NDArray[np.bool_] | None:
        """Where the model was not allowed to read, bool (batch, head or 1, query, key), or None."""
        name = call.name("blocked")
        return self[name] if name in self else None  # noqa: SIM401  # no mapping
